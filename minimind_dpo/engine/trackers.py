"""Which experiment trackers a run can report to, and how one that fails is kept from stopping it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from minimind_dpo.errors import UserError

logger = logging.getLogger(__name__)

EXTRAS = ("mlflow", "swanlab", "tensorboard", "trackio")  # of setup.cfg; wandb comes with the package
_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 600.0  # seconds in which a tracker that failed is left alone
_TRIES = 3  # of one message: it may be what the tracker stumbles over
_MOST_WAITING = 10_000  # messages


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what accelerate would pass over in silence, all of it at once.

    Args:
        names: as `Accelerator(log_with=...)` takes them: accelerate's own, or of a class that was handed to
            `accelerate.tracking.register_tracker_class`.

    Raises:
        UserError: no tracker has such a name, or its package is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    missing = set(LoggerType.list()) - {"all", *installed}
    problems = [
        f"report_to: {name} is not installed ({_installing(name)})"
        if name in missing
        else f"report_to: {name!r} is no tracker; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or none"
        for name in names
        if name in missing or name not in LOGGER_TYPE_TO_CLASS
    ]
    if problems:
        raise UserError("\n".join(problems))


def _installing(name: str) -> str:
    return f"pip install 'minimind-dpo[{name}]'" if name in EXTRAS else f"pip install {name.replace('_', '-')}"


class Guarded:
    """A started tracker whose failures neither stop a run nor change it.

    What it does not take waits, is told again after a pause that doubles, and once more at the end. A failure is
    warned of once, until the tracker has answered again.

    Attributes:
        own: accelerate's tracker.
        name: as `report_to` has it.
    """

    def __init__(self, own: Any):
        self.own = own
        self.name = str(own.name)
        self._waiting: deque[Callable[[Any], None]] = deque(maxlen=_MOST_WAITING)
        self._tries = 0
        self._pause, self._quiet_until = 0.0, 0.0

    def tell(self, message: Callable[[Any], None]) -> None:
        """Hand on a message, after those that wait.

        Args:
            message: it is called with the tracker, and may raise.
        """
        self._waiting.append(message)
        if time.monotonic() >= self._quiet_until:
            self._send()

    def _send(self) -> None:
        try:
            while self._waiting:
                self._waiting[0](self.own)
                self._waiting.popleft()
                self._tries = 0
        except Exception as error:  # each tracker has errors of its own
            self._rest(error)
        else:
            if self._pause:
                logger.info("report_to: %s answers again", self.name)
            self._pause = 0.0

    def _rest(self, error: Exception) -> None:
        if not self._pause:
            logger.warning(
                "report_to: %s failed (%s: %s); the run goes on, its numbers are in metrics.jsonl and are sent again "
                "later",
                self.name,
                type(error).__name__,
                error,
            )
        self._pause = min(2 * self._pause or _FIRST_PAUSE, _LONGEST_PAUSE)
        self._quiet_until = time.monotonic() + self._pause
        self._tries += 1
        if self._tries == _TRIES:
            self._waiting.popleft()
            self._tries = 0

    def finish(self) -> None:
        """Send what still waits, and end the tracker."""
        self._send()
        if self._waiting:
            logger.info("report_to: %s lacks the last %d messages", self.name, len(self._waiting))
        try:
            self.own.finish()
        except Exception as error:  # as above
            if not self._pause:
                logger.warning("report_to: %s did not end well (%s: %s)", self.name, type(error).__name__, error)
            if self.name == "wandb":
                _let_go_of_wandb()


def _let_go_of_wandb() -> None:
    """Take back what W&B would do when the process ends: without its service that is a traceback."""
    import wandb  # late: only where it is asked for

    with suppress(Exception):
        wandb.teardown()
