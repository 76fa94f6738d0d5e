"""The memory that a run frees stays with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
