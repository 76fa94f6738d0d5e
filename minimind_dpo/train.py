"""The entry point of training: build everything from a configuration, run the loop, leave a run directory.

`python -m minimind_dpo.train` equals `minimind-dpo train`.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.data.tokenized import load_tokenizer
from minimind_dpo.engine import make_accelerator
from minimind_dpo.errors import EXIT_DONE, EXIT_STOPPED, StoppedEarly, UserError, exit_code
from minimind_dpo.models.loading import locate_model
from minimind_dpo.ranks import end_with_launcher, leave_together, on_main
from minimind_dpo.training.checkpoint import find_checkpoint
from minimind_dpo.training.loop import train
from minimind_dpo.training.run_directory import finish_run, held
from minimind_dpo.training.setup import build_run
from minimind_dpo.training.signals import StopRequest

logger = logging.getLogger("minimind_dpo.train")  # not __name__: the module also runs as __main__


def run(config: TrainConfig, last_act: bool = False) -> int:
    """Train as `config` says; 0 when the run is done, 75 when a signal stopped it with a checkpoint written.

    Args:
        config: of the run.
        last_act: the process ends after it; signals that come then are ignored.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """
    end_with_launcher()
    accelerator = make_accelerator(config)
    logging.basicConfig(level=logging.WARNING if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    if accelerator.is_main_process:
        logging.getLogger("minimind_dpo").setLevel(logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight at every checkpoint
    disable_progress_bar()  # transformers' own, of shards read and written
    set_seed(config.seed, device_specific=True)
    try:
        with StopRequest(last_act) as stop, ExitStack() as stack:
            directory = Path(config.output_dir)
            on_main(accelerator, lambda: stack.enter_context(held(directory)))
            checkpoint = on_main(accelerator, lambda: find_checkpoint(directory / "checkpoints", config.resume))
            tokenizer = load_tokenizer(_tokenizer_path(config), config.trust_remote_code)
            training = build_run(config, accelerator, tokenizer, checkpoint, stop)
            train(training)
            finish_run(training)
        return EXIT_DONE
    except StoppedEarly as where:
        logger.info("stopped early %s; the same command continues there", where)
        return EXIT_STOPPED
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        return leave_together(error)
    finally:
        accelerator.end_training()


def _tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer named, or the one that lies with the model (for a raw .pth: beside it, or in ../model)."""
    if config.tokenizer_name_or_path:
        return config.tokenizer_name_or_path
    path = locate_model(config.model_name_or_path)
    if path is None or path.suffix != ".pth":
        return str(path or config.model_name_or_path)
    for candidate in (path.parent, path.parent.parent / "model"):
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    raise UserError(f"tokenizer_name_or_path: missing; raw weights ({path}) carry no tokenizer, and none lies beside "
                    "them or in ../model. Name the directory with MiniMind's tokenizer.json")


def main(argv: list[str]) -> int:
    """`minimind-dpo train`."""
    return run(load_config(argv), last_act=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
