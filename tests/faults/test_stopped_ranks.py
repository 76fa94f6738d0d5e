"""A rank that neither works nor leaves, as a process that is stopped or a node that hangs: the others leave."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from faults.runs import Alone, flags_of, goes_on, group
from helpers_forks import Bomb, Forks
from helpers_run import Inputs

PATIENCE = 8  # seconds
STOP = int(signal.SIGSTOP)
ANYWHERE = [
    Bomb("training.data", "_tokenize", 1, "after", 0, STOP),
    Bomb("reference.filling", "split_by_tokens", 1, "after", 0, STOP),
    Bomb("training.evaluation", "score_batch", 2, "after", 1, STOP),
    Bomb("checkpoints.directory", "_entries", 2, "before", 1, STOP),
    Bomb("training.run_directory", "seal_model", 1, "before", 0, STOP),
]
AMID_STEPS = [Bomb("training.step", "score_batch", 3, "after", rank, STOP) for rank in (0, 1)]


def marks(engine: str, bomb: Bomb) -> list[pytest.MarkDecorator]:
    """One try is a quick one: DeepSpeed's own group waits by another clock than the run's unless it is told."""
    quick = engine == "ds_zero2_cpu" and bomb.rank == 0
    return [group(engine)] if quick else [group(engine), pytest.mark.faults]


@pytest.mark.parametrize(
    ("engine", "bomb"),
    [
        pytest.param(engine, bomb, id=f"{engine}: {bomb}, {bomb.rank}", marks=marks(engine, bomb))
        for engine in ("multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu")
        for bomb in [*AMID_STEPS, *(ANYWHERE if engine == "multi_cpu" else [])]
    ],
)
def test_a_stopped_rank_is_left(
    forks: Forks, alone: Alone, inputs: Inputs, tmp_path: Path, engine: str, bomb: Bomb
) -> None:
    """A rank is stopped in each phase: the other one ends within ddp_timeout and says so, and the run goes on later."""
    expected, begin = alone(engine), time.monotonic()
    codes = forks.run(flags_of(inputs, tmp_path, ddp_timeout=PATIENCE), tmp_path, engine, bomb)
    seconds, log = time.monotonic() - begin, (tmp_path / "log").read_text("utf-8")
    assert codes[bomb.rank] == -signal.SIGKILL and codes[1 - bomb.rank] == 1, log  # killed once the other one has left
    assert seconds < PATIENCE + 90 and "ddp_timeout" in log, log
    assert goes_on(forks, inputs, tmp_path, engine) == expected
