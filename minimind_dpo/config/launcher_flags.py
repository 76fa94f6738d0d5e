"""Flags of commands that are the launcher's business: processes, machines, precision."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from minimind_dpo.errors import UserError

ACCELERATE_CONFIG = "accelerate_config"
# Flags of `accelerate launch` that a command hands on, by accelerate's own names, and what they say; a test compares
# them with accelerate's parser. Those that contradict the training configuration are not among them.
VALUES = {
    ACCELERATE_CONFIG: "a file of configs/accelerate by its name (ds_zero2, multi_cpu, ...), or the path of one",
    "num_processes": "processes of all machines together",
    "mixed_precision": "no | bf16 | fp16",
    "gpu_ids": "of the GPUs that are used on this machine, as in 0,1",
    "num_machines": "machines",
    "machine_rank": "which of them this is, from 0",
    "main_process_ip": "address of machine 0, seen from all",
    "main_process_port": "a port that is free there (one machine: any that is free)",
    "num_cpu_threads_per_process": "threads of each process",
    "rdzv_backend": "how torchrun's agents meet",
    "rdzv_conf": "more of it, as in timeout=900",
    "monitor_interval": "seconds between torchrun's looks at its processes",
    "log_dir": "folder for what processes print",
    "deepspeed_config_file": "another DeepSpeed file than the configuration's",
    "deepspeed_hostfile": "DeepSpeed's list of machines",
    "deepspeed_multinode_launcher": "pdsh | standard | ...: what starts the other machines",
    "deepspeed_exclusion_filter": "machines that it leaves out",
    "deepspeed_inclusion_filter": "machines that it takes",
}
SWITCHES = {"same_network": "machines are in one local network", "enable_cpu_affinity": "bind processes to cores"}


def split_launcher_flags(argv: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Take the launcher's flags out of a command line: them by name (a switch has None), and the rest in its order.

    Raises:
        UserError: one of them has no value.
    """
    told: dict[str, str | None] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in VALUES | SWITCHES:
            rest.append(word)
        elif name in SWITCHES:
            told[name] = None
        else:
            told[name] = value if has_value else next(words, "--")
            if str(told[name]).startswith("--"):
                raise UserError(f"--{name}: has no value; it is {VALUES[name]}")
    return told, rest


def add_launcher_help(parser: argparse.ArgumentParser) -> None:
    """List the launcher's flags in a command's help; they are taken out before it parses."""
    group = parser.add_argument_group(
        "processes, machines, precision",
        "the launcher's; with any of them the command runs as `accelerate launch` would",
    )
    absent = argparse.SUPPRESS
    for name, help in VALUES.items():
        metavar = "NAME|FILE" if name == ACCELERATE_CONFIG else "VALUE"
        group.add_argument(f"--{name}", metavar=metavar, help=help, default=absent)
    for name, help in SWITCHES.items():
        group.add_argument(f"--{name}", action="store_true", help=help, default=absent)
