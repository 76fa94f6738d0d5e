"""The entry point of training: build everything from a configuration, run the loop, leave a run directory.

`python -m minimind_dpo.train` equals `minimind-dpo train`, and `train_dpo` is the same run from Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_dpo.config import TrainConfig, as_told, load_config, make_config
from minimind_dpo.ending import Ending
from minimind_dpo.errors import EXIT_DONE, EXIT_STOPPED, StoppedEarly
from minimind_dpo.launch.verbs import launched

if TYPE_CHECKING:
    from minimind_dpo.training.callbacks import Callback


def train_dpo(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Train as `minimind-dpo train` does; in a launched program every rank must call it.

    Args:
        config: of the run; it is checked as the command's is.
        callbacks: of your own, called on the main process (`minimind_dpo/training/callbacks.py`).

    Returns:
        What `summary.json` in the run directory holds: `steps`, `pairs_seen`, `seconds`, `pairs_per_second`,
        `peak_memory_gib` and `reference_digest`; with `eval_data` also `eval_before` and `eval_after`. A notebook
        shows it with the run's curves.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
        TrainingError: the run cannot go on.
        StoppedEarly: a signal stopped it with a checkpoint written; the same call continues there.
        SystemExit: this or another of several ranks failed; the first one has said why.
    """
    code = run(make_config(as_told(config)), callbacks=callbacks)
    if code == EXIT_STOPPED:
        raise StoppedEarly(f"with a checkpoint in {config.output_dir}; the same call continues there")
    if code != EXIT_DONE:
        raise SystemExit(code)
    from minimind_dpo.report.figure import Summary  # late: matplotlib is for those who look at it

    return Summary(Path(config.output_dir).expanduser())


def run(config: TrainConfig, ends_process: bool = False, callbacks: Sequence[Callback] = ()) -> int:
    """Train as `config` says; 0 when the run is done, 75 when a signal stopped it with a checkpoint written.

    Args:
        config: of the run.
        ends_process: the process ends after it; signals that come then are ignored.
        callbacks: of the user's own, in Python.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """
    # late: torch and transformers take seconds, which --help and a mistake in the settings need not wait for
    from minimind_dpo.checkpoints.directory import find_checkpoint
    from minimind_dpo.engine.devices import repeating
    from minimind_dpo.engine.ranks import on_main
    from minimind_dpo.training.conclusion import conclude
    from minimind_dpo.training.loop import train
    from minimind_dpo.training.progress import StepProgress
    from minimind_dpo.training.run_directory import finish_run, locked
    from minimind_dpo.training.run_log import open_run
    from minimind_dpo.training.session import Session
    from minimind_dpo.training.setup import build_run

    with repeating(config.deterministic), Session(config, ends_process) as session, ExitStack() as stack:
        directory, engine = Path(config.output_dir), session.engine
        on_main(engine, lambda: stack.enter_context(locked(directory)))
        checkpoint = on_main(engine, lambda: find_checkpoint(directory / "checkpoints", config.resume))
        training = build_run(config, engine, checkpoint, session.stop)
        log, begun = open_run(training, checkpoint is not None, callbacks), training.state.step
        with StepProgress(training) as progress, log.keeping_warnings():
            train(training, replace(log, progress=progress))
        conclude(training, log, finish_run(training, log), begun)
    return session.exit_code


def main(argv: list[str]) -> int:
    """`minimind-dpo train`."""
    return run(load_config(argv), ends_process=True)


if __name__ == "__main__":
    with Ending() as ending:
        code = launched("train", sys.argv[1:])
        ending.code = main(sys.argv[1:]) if code is None else code
    sys.exit(ending.code)
