"""Mistakes that a user can make and mend, and how a command ends on them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

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


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; 2 with one message for a user's mistake, 1 with a traceback for a failure."""
    try:
        return command()
    except (UserError, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":  # every rank makes the same mistake; one message is enough
            print(f"minimind-dpo: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE if isinstance(error, UserError) else EXIT_FAILED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
