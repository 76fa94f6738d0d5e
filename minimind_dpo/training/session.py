"""What every command that the launcher may start on several ranks has around its work: log, signals, exit codes."""

from __future__ import annotations

import logging
from types import TracebackType

from accelerate.utils import set_seed

from minimind_dpo.config import TrainConfig
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.console import quiet_libraries
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.ranks import end_with_launcher, leave_together
from minimind_dpo.errors import EXIT_DONE, EXIT_STOPPED, StoppedEarly

logger = logging.getLogger(__name__)


class Session:
    """A context manager around a command's work on this rank.

    Attributes:
        engine: on what it goes.
        stop: whether this process was asked to stop.
        exit_code: afterwards: 0 when the work was done, 75 when a signal stopped it early.
    """

    def __init__(self, config: TrainConfig, ends_process: bool = False):
        """Meet the other processes.

        Args:
            config: of the run.
            ends_process: the process ends after the work; signals that come then are ignored.

        Raises:
            UserError: the launcher's settings and the configuration contradict each other.
        """
        end_with_launcher()
        quiet_libraries()
        self.engine = start_engine(config)
        self.stop = StopRequest(ends_process, config.max_hours)
        self.exit_code = EXIT_DONE
        level = logging.WARNING if self.engine.is_main else logging.ERROR
        logging.basicConfig(level=level, format="%(message)s")
        if self.engine.is_main:
            logging.getLogger("minimind_dpo").setLevel(logging.INFO)
        set_seed(config.seed, device_specific=True)

    def __enter__(self) -> Session:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the group of processes; on several ranks the first one that failed tells its error, the others leave."""
        self.stop.__exit__(kind, error, trace)
        try:
            if isinstance(error, StoppedEarly):
                logger.info("stopped early %s; the same command continues there", error)
                self.exit_code = EXIT_STOPPED
                return True
            if isinstance(error, Exception) and self.engine.world_size > 1:
                self.exit_code = leave_together(error)
                return True
            return False
        finally:
            self.engine.end()
