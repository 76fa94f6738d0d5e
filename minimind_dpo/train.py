"""The entry point of training: build everything from a configuration, run the loop, leave a run directory.

`python -m minimind_dpo.train` equals `minimind-dpo train`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from minimind_dpo.checkpoints.directory import find_checkpoint
from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.data.tokenized import load_tokenizer
from minimind_dpo.engine.ranks import on_main
from minimind_dpo.errors import exit_code
from minimind_dpo.training.loop import train
from minimind_dpo.training.run_directory import finish_run, held
from minimind_dpo.training.session import in_session, tokenizer_path
from minimind_dpo.training.setup import build_run
from minimind_dpo.training.signals import StopRequest


def run(config: TrainConfig, last_act: bool = False) -> int:
    """Train as `config` says; 0 when the run is done, 75 when a signal stopped it with a checkpoint written.

    Args:
        config: of the run.
        last_act: the process ends after it; signals that come then are ignored.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """

    def work(accelerator: Accelerator, stop: StopRequest) -> None:
        directory = Path(config.output_dir)
        with ExitStack() as stack:
            on_main(accelerator, lambda: stack.enter_context(held(directory)))
            checkpoint = on_main(accelerator, lambda: find_checkpoint(directory / "checkpoints", config.resume))
            tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
            training = build_run(config, accelerator, tokenizer, checkpoint, stop)
            train(training)
            finish_run(training)

    return in_session(config, work, last_act)


def main(argv: list[str]) -> int:
    """`minimind-dpo train`."""
    return run(load_config(argv), last_act=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
