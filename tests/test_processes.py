"""Processes that work on blocks of rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

PROGRAM = """
import sys, time
from minimind_dpo.data.processes import map_blocks
from minimind_dpo.data.rows import read_rows  # any room: a child imports what its work needs

def work(block):
    return len(block)

if __name__ == "__main__":
    blocks = ([(0, row, "place", b"{}")] for row in range(10**9))
    for number, (block, found) in enumerate(map_blocks(blocks, work, 2)):
        if number == 50:
            print("at work", flush=True)
            time.sleep(600)
"""


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "at work\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    psutil.wait_procs(children, timeout=20)
    left = [child.pid for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
