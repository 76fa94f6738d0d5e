"""`minimind-dpo train`, but one rank comes to grief at the start of an optimizer step.

accelerate launch ... tests/programs/one_rank.py RANK STEP fails|user_error|stops [train's flags]
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from minimind_dpo.ending import Ending
from minimind_dpo.errors import UserError
from minimind_dpo.train import main
from minimind_dpo.training import step as stepping

rank, step, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
seed = stepping._seed


def grief(run: Any, current: int, index: int) -> None:
    """Stand in for the first thing that an optimizer step does."""
    if current == step and run.engine.rank == rank:
        if what == "fails":
            raise RuntimeError("the disk of this rank is on fire")
        if what == "user_error":
            raise UserError("a file that only this rank misses")
        os.kill(os.getpid(), signal.SIGSTOP)  # neither works nor leaves
    seed(run, current, index)


stepping._seed = grief
with Ending() as ending:
    ending.code = main(sys.argv[4:])
sys.exit(ending.code)
