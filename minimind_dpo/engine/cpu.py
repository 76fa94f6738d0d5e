"""How a run uses a processor: what it is, its threads, and the memory that it frees."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
LARGE = 32 << 20  # bytes; blocks from this size on come from the system, one by one. glibc allows no larger value

# Kernels that oneDNN keeps, one for each shape of a product. It would keep 1,024; as lengths change from batch to batch
# that took 300 MiB more in 16 steps of 26M parameters. Those of one micro-batch have to fit, or each layer builds them
# anew: some 20 of layers and head, and in bf16 up to 60 of attention (with 64 kept a bf16 step took a tenth more time).
KERNELS = 128


class Processor(NamedTuple):
    """What an x86 processor says of itself: `vendor`, such as AuthenticAMD, `family`, and its `flags`."""

    vendor: str
    family: int
    flags: frozenset[str]


def read_processor(path: Path = Path("/proc/cpuinfo")) -> Processor | None:
    """This machine's processor; None where it is no x86 one, or the system does not tell as Linux does."""
    try:
        lines = path.read_text("utf-8").split("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in lines if ":" in line)}
        return Processor(facts["vendor_id"], int(facts["cpu family"]), frozenset(facts["flags"].split()))
    except (OSError, KeyError, ValueError):
        return None


@lru_cache(maxsize=1)
def has_bf16_units() -> bool:
    """Whether this machine's processor multiplies bf16 itself; else such products are slower than those of fp32."""
    processor = read_processor()
    return processor is not None and not processor.flags.isdisjoint({"avx512_bf16", "amx_bf16"})


def set_up_cpu(processes: int) -> None:
    """Set the threads of this rank, one of so many in all, and keep the memory it frees."""
    torch.set_num_threads(_threads(processes))
    _keep_freed_memory()
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's own and oneDNN's
        os.environ.setdefault(name, str(KERNELS))


def set_up_host_steps(processes: int) -> None:
    """Set the threads of a rank beside a GPU whose optimizer steps in the host's memory."""
    threads = _threads(processes)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # DeepSpeed's own AdamW has an OpenMP library of its own, loaded later


def _threads(processes: int) -> int:
    """The user's OMP_NUM_THREADS, or the machine's cores shared by its ranks.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 whenever the user said nothing, which would idle the other
    cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if asked and not (launched and asked == "1"):
        return torch.get_num_threads()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return max(1, available_cores() // local_ranks)


def available_cores() -> int:
    """Cores that this process may use, which only Linux tells; elsewhere all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed at the end of its heap for the next step.

    By default it returns whatever exceeds 64 MiB there, most of a step's activations, and the next step pays for every
    page again: 3 to 4 % of its time. Blocks from `LARGE` on still go back at once. A user's own settings stay.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None or "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE)  # where it comes to rest by itself, unless one of the two is set
    mallopt(_M_TRIM_THRESHOLD, -1)
