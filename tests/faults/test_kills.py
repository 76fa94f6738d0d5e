"""A run is killed, or asked to stop, wherever it could matter, and goes on to the undisturbed run's bits."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from faults.runs import Alone, flags_of, goes_on, group
from helpers_forks import Bomb, Forks
from helpers_run import Inputs

ENGINES = (None, "multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu")
STEPS = [Bomb("training.loop", "optimizer_step", nth, when) for nth in range(1, 7) for when in ("before", "after")]
AMID_STEPS = [Bomb("training.step", "score_batch", nth, "after") for nth in (1, 4, 7)]
EVALUATIONS = [Bomb("training.evaluation", "score_batch", nth, "after") for nth in (1, 4)]
WRITES = [
    Bomb(module, name, nth, when)
    for module, names in {
        "checkpoints.directory": "make_anew write_state write_fragments _entries sync put_in_place _prune",
        "data.cache": "sync_all",
        "reference.stored": "put_in_place",
        "training.run_directory": "save_config save_model seal_model write_text write_report",
        "training.metrics": "sync",
    }.items()
    for name in names.split()
    for nth in (1, 2)
    for when in ("before", "after")
    if nth == 1 or module in ("checkpoints.directory", "training.metrics")
]
BOMBS = [*STEPS, *AMID_STEPS, *EVALUATIONS, *WRITES]
QUICK = [STEPS[4], AMID_STEPS[1], EVALUATIONS[1], WRITES[9], WRITES[20]]


def cases(bombs: list[Bomb], engine: str | None, quick: list[Bomb]) -> list[object]:
    name = engine or "plain"
    return [
        pytest.param(
            engine, bomb, id=f"{name}: {bomb}", marks=[group(engine), *([] if bomb in quick else [pytest.mark.faults])]
        )
        for bomb in bombs
    ]


@pytest.mark.parametrize(
    ("engine", "bomb"),
    [*cases(BOMBS, None, QUICK), *(case for engine in ENGINES[1:] for case in cases(BOMBS, engine, []))],
)
def test_a_kill_changes_nothing(
    forks: Forks, alone: Alone, inputs: Inputs, tmp_path: Path, engine: str | None, bomb: Bomb
) -> None:
    """A kill at a chosen place: each step, amid a step, in an evaluation, in each phase of each write."""
    codes = forks.run(flags_of(inputs, tmp_path), tmp_path, engine, bomb)
    assert -signal.SIGKILL in codes, f"{bomb} never came: {(tmp_path / 'log').read_text('utf-8')}"
    assert goes_on(forks, inputs, tmp_path, engine) == alone(engine)


@pytest.mark.faults
@pytest.mark.parametrize("engine", [pytest.param(engine, marks=group(engine)) for engine in ENGINES])
@pytest.mark.parametrize("seed", range(25))
def test_random_kills_change_nothing(
    forks: Forks, alone: Alone, inputs: Inputs, tmp_path: Path, engine: str | None, seed: int
) -> None:
    """Up to three kills at random places in one run, of either rank."""
    rng = random.Random(f"{engine} {seed}")
    for _ in range(3):
        bomb = rng.choice(BOMBS)
        rank = 0 if engine is None or bomb in WRITES else rng.randrange(2)
        forks.run(
            flags_of(inputs, tmp_path),
            tmp_path,
            engine,
            Bomb(bomb.module, bomb.name, rng.randint(1, 4), bomb.when, rank),
        )
    assert goes_on(forks, inputs, tmp_path, engine) == alone(engine)


SIGNALLED = [
    Bomb("training.data", "_tokenize", 1, "after", signal=int(signal.SIGTERM)),
    Bomb("reference.filling", "split_by_tokens", 1, "after", signal=int(signal.SIGINT)),
    Bomb("training.loop", "optimizer_step", 2, "before", signal=int(signal.SIGUSR1)),
    Bomb("training.evaluation", "score_batch", 3, "after", signal=int(signal.SIGTERM)),
    Bomb("checkpoints.directory", "put_in_place", 1, "before", signal=int(signal.SIGTERM)),
]


@pytest.mark.parametrize(
    ("engine", "bomb"),
    [
        *cases(SIGNALLED, None, SIGNALLED[2:3]),
        *(case for engine in ENGINES[1:] for case in cases(SIGNALLED, engine, [])),
    ],
)
def test_a_signal_changes_nothing(
    forks: Forks, alone: Alone, inputs: Inputs, tmp_path: Path, engine: str | None, bomb: Bomb
) -> None:
    """A signal in each phase: every rank ends with 75, and the run goes on."""
    codes = forks.run(flags_of(inputs, tmp_path), tmp_path, engine, bomb)
    assert set(codes) == {75}, (tmp_path / "log").read_text("utf-8")
    assert goes_on(forks, inputs, tmp_path, engine) == alone(engine)
