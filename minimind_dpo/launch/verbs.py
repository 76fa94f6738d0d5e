"""Verbs whose command line may ask for several processes: `minimind-dpo train --accelerate_config ds_zero2 ...`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from minimind_dpo.config import load_config
from minimind_dpo.config.launcher_flags import ACCELERATE_CONFIG, split_launcher_flags
from minimind_dpo.config.shipped import find_config
from minimind_dpo.errors import UserError
from minimind_dpo.launch import main as launch

LAUNCHED = {verb: f"minimind_dpo.{verb}" for verb in ("train", "precompute", "evaluate")}  # the modules that ranks run
_TAKES_SETTINGS = ("train", "precompute")


def launched(verb: str, argv: Sequence[str]) -> int | None:
    """Run a verb as `accelerate launch` would, if its command line has any of the launcher's flags.

    Returns:
        The exit code of its processes; None where there is nothing to launch.

    Raises:
        UserError: a launcher's flag without a value, one that names no file, or a process that a launcher started.
    """
    if verb not in LAUNCHED or not {"-h", "--help"}.isdisjoint(argv):
        return None
    told, rest = split_launcher_flags(argv)
    if not told:
        return None
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            f"--{next(iter(told))}: this process was started by a launcher already, whose flag it is: write it before "
            f"-m {LAUNCHED[verb]}"
        )
    if (config := told.pop(ACCELERATE_CONFIG, None)) is not None:
        find_config(f"--{ACCELERATE_CONFIG}", config, "accelerate")  # a mistake is told before anything slow
        told = {"config_file": config, **told}
    if verb in _TAKES_SETTINGS:
        load_config(rest, verb)  # so are those of the settings, and once
    flags = [word for name, value in told.items() for word in (f"--{name}", value) if word is not None]
    return launch([*flags, "-m", LAUNCHED[verb], *rest])
