"""What somebody sees while a command works: bars on a terminal and in a notebook, a line now and then elsewhere.

A bar in the log of a batch job would be one line of thousands of carriage returns.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_LINE_SECONDS = 60


def shows_bars() -> bool:
    """Whether standard error is a terminal, or the output of a notebook's cell."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def duration(seconds: float) -> str:
    """As 0:07, 12:00 or 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Counted work; a context manager. On a terminal a bar, elsewhere a line a minute.

    Args:
        what: is done.
        unit: of what is counted, in the plural.
        total: how many there are, None where nothing tells.
        shown: False on every rank that leaves it to another.
    """

    def __init__(self, what: str, unit: str, total: int | None = None, shown: bool = True):
        self._what, self._unit, self._total = what, unit, total
        self._bar: Any = tqdm(total=total, desc=what, unit=f" {unit}", disable=not (shown and shows_bars()))
        self._lines = shown and not shows_bars()
        self._begin = self._said = time.monotonic()
        self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.close()

    def update(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._lines and now - self._said >= _LINE_SECONDS:
            self._said = now
            logger.info("%s", self._line(now - self._begin))

    def _line(self, elapsed: float) -> str:
        text = f"{self._what}: {self._done}"
        if self._total is None or not self._done:
            return f"{text} {self._unit}"
        left = max(self._total - self._done, 0) * elapsed / self._done
        return f"{text} of {self._total} {self._unit}, {duration(left)} left"


def name_accelerator() -> None:
    """Tell DeepSpeed of a machine without a GPU: it warns when it has to find out itself."""
    import torch  # late: see `quiet_libraries`

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quiet_libraries() -> None:
    """Silence what libraries say of themselves and nobody can act on; for the start of a command."""
    from transformers.utils.logging import disable_progress_bar  # late: seconds, for those who only count

    disable_progress_bar()  # of shards read and written
    name_accelerator()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight at every checkpoint
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is; it warns of a package
    # torch's own calls of names that torch is about to rename
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated")
