"""What every command that the launcher may start on several ranks has around its work: log, signals, exit codes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.launcher import make_accelerator
from minimind_dpo.engine.ranks import end_with_launcher, leave_together
from minimind_dpo.errors import EXIT_DONE, EXIT_STOPPED, StoppedEarly, UserError
from minimind_dpo.models.loading import locate_model
from minimind_dpo.training.signals import StopRequest

logger = logging.getLogger(__name__)


def in_session(config: TrainConfig, work: Callable[[Accelerator, StopRequest], None], last_act: bool) -> int:
    """Do `work` on every rank; 0 when it is done, 75 when a signal stopped it early.

    Args:
        config: of the run.
        work: what is to be done, with the Accelerator that the launcher asks for.
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
        with StopRequest(last_act) as stop:
            work(accelerator, stop)
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


def tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer named, or the one that lies with the model (for a raw .pth: beside it, or in ../model).

    Raises:
        UserError: raw weights without a tokenizer.
    """
    if config.tokenizer_name_or_path:
        return config.tokenizer_name_or_path
    path = locate_model(config.model_name_or_path)
    if path is None or path.suffix != ".pth":
        return str(path or config.model_name_or_path)
    for candidate in (path.parent, path.parent.parent / "model"):
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    raise UserError(
        f"tokenizer_name_or_path: missing; raw weights ({path}) carry no tokenizer, and none lies beside "
        "them or in ../model. Name the directory with MiniMind's tokenizer.json"
    )
