"""The memory that a run frees stays with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_forks import Forks

from minimind_dpo.engine.cpu import available_cores

# 256 MiB in blocks of 4, twice: what the second round pays for
PROGRAM = """
import resource
import torch
from minimind_dpo.engine.cpu import set_up_cpu

def fill():
    blocks = [torch.ones(2**20) for _ in range(64)]

set_up_cpu(1)
fill()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 256 * 2**20 // os.sysconf("SC_PAGE_SIZE")


def page_faults(**extra: str) -> int:
    """Pages that the last round of `PROGRAM` gets from the system."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return int(subprocess.check_output([sys.executable, "-c", PROGRAM], env=own | extra))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    """Unless the user has set up the allocator."""
    assert page_faults() < PAGES / 20
    assert page_faults(MALLOC_TRIM_THRESHOLD_="1000000") > PAGES / 2


LAUNCHED = {"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DeepSpeed is for Linux")
@pytest.mark.parametrize(
    ("optimizer", "extra", "threads"),
    [
        ("offload", {"TORCHELASTIC_RUN_ID": "none"}, "all"),
        ("offload", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "all"),
        ("offload", {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "3"}, "3"),
        ("here", {"TORCHELASTIC_RUN_ID": "none"}, "1"),
    ],
)
def test_an_optimizer_on_the_host_has_its_share_of_the_cores(
    forks: Forks, tmp_path: Path, optimizer: str, extra: dict[str, str], threads: str
) -> None:
    """`accelerate launch` and torchrun leave each rank one thread, unless the user asked for more."""
    program = "tests/programs/threads_of_a_rank.py"
    codes = forks.run([optimizer], tmp_path, program=program, **LAUNCHED | extra)
    said = (tmp_path / "log").read_text("utf-8")
    expected = available_cores() if threads == "all" else int(threads)
    assert codes == [0] and f"THREADS {expected} {expected}\n" in said, said
