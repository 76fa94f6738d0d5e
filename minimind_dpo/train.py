"""The entry point of training: build everything from a configuration, run the loop, leave a run directory.

`python -m minimind_dpo.train` equals `minimind-dpo train`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from minimind_dpo.checkpoints.directory import find_checkpoint
from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.engine.ranks import on_main
from minimind_dpo.errors import exit_code
from minimind_dpo.training.loop import train
from minimind_dpo.training.run_directory import finish_run, locked, open_run
from minimind_dpo.training.session import Session
from minimind_dpo.training.setup import build_run


def run(config: TrainConfig, ends_process: bool = False) -> int:
    """Train as `config` says; 0 when the run is done, 75 when a signal stopped it with a checkpoint written.

    Args:
        config: of the run.
        ends_process: the process ends after it; signals that come then are ignored.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """
    session = Session(config, ends_process)
    with session, ExitStack() as stack:
        directory, engine = Path(config.output_dir), session.engine
        on_main(engine, lambda: stack.enter_context(locked(directory)))
        checkpoint = on_main(engine, lambda: find_checkpoint(directory / "checkpoints", config.resume))
        training = build_run(config, engine, checkpoint, session.stop)
        log = open_run(training, resumed=checkpoint is not None)
        train(training, log)
        finish_run(training, log)
    return session.exit_code


def main(argv: list[str]) -> int:
    """`minimind-dpo train`."""
    return run(load_config(argv), ends_process=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
