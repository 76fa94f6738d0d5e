"""Mistakes that a user can make and mend, and the exit codes that commands end with."""

from __future__ import annotations

import os
import sys
import traceback

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75


class UserError(ValueError):
    """A wrong command line, configuration or data file.

    Its message says what is wrong, where (file:line, key, rank) and what to do. The command line prints it
    without a traceback and exits with code 2.
    """


class TrainingError(RuntimeError):
    """The run cannot go on, through no mistake of its configuration; exit code 1, with its message alone."""


class StoppedEarly(Exception):
    """A signal asked the run to stop; what it did so far is kept and the same command continues; exit code 75."""


def code_of(error: BaseException) -> int:
    """The exit code that an error ends a command with."""
    return EXIT_USAGE if isinstance(error, UserError) else EXIT_FAILED


def report(error: BaseException) -> None:
    """Print an error: its message alone where that says it all, else its traceback; with the rank if there are many."""
    where = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    if isinstance(error, (UserError, TrainingError)):
        print(f"minimind-dpo: {where}error: {error}", file=sys.stderr, flush=True)
    else:
        trace = "".join(traceback.format_exception(error))
        print(f"minimind-dpo: {where}failed\n{trace}", file=sys.stderr, flush=True)
