"""A disk that is full when a test wants it to be."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BALLAST = "ballast"


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 16 MiB in memory, mounted at `place`; the test is skipped where nothing may be mounted."""
    if shutil.which("mount") is None:
        pytest.skip("a small disk needs the command mount")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left: int = 0) -> None:
    """Leave `left` bytes free."""
    with (disk / BALLAST).open("wb") as file:
        state = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_bsize - left)


def make_room(disk: Path) -> None:
    """Undo `fill`."""
    (disk / BALLAST).unlink()
