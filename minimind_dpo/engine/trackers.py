"""Which experiment trackers a run can report to: those of accelerate, and any that is registered with it."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from minimind_dpo.errors import UserError


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
        f"report_to: {name} is not installed (pip install {name.replace('_', '-')})"
        if name in missing
        else f"report_to: {name!r} is no tracker; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or none"
        for name in names
        if name in missing or name not in LOGGER_TYPE_TO_CLASS
    ]
    if problems:
        raise UserError("\n".join(problems))
