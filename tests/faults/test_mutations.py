"""The comparison of bits is sharp: a checkpoint that lacks any one thing would be noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.runs import group, oracle
from helpers_forks import Forks
from helpers_run import Inputs, train_here

from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.data.order import PairOrder
from minimind_dpo.engine import plain
from minimind_dpo.errors import UserError
from minimind_dpo.training import data as run_data
from minimind_dpo.training import loop
from minimind_dpo.training.schedule import learning_rate_schedule

OPTIONS: dict[str, Any] = {"num_train_epochs": 2, "save_steps": 1, "learning_rate": 1e-3}


SHORT = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}  # bf16 is slow on a CPU
STOPPING = [["--max_hours", "1e-9"]]  # after the first step


def moments_lost(patched: pytest.MonkeyPatch) -> None:
    honest = FragmentReader.read
    patched.setattr(
        FragmentReader, "read", lambda self, kind, *args, **kw: honest(self, kind, *args, **kw) * (kind == "weight")
    )


def weights_lost(patched: pytest.MonkeyPatch) -> None:
    honest = FragmentReader.read
    patched.setattr(
        FragmentReader, "read", lambda self, kind, *args, **kw: honest(self, kind, *args, **kw) * (kind != "weight")
    )


def step_count_lost(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(plain, "set_step_count", lambda optimizer, count: None)


def rate_lost(patched: pytest.MonkeyPatch) -> None:
    """The schedule begins anew where the run goes on, after step 1."""

    def begun_anew(*args: Any) -> Callable[[int], float]:
        honest = learning_rate_schedule(*args)
        return lambda step: honest(max(step - 1, 1))

    patched.setattr(loop, "learning_rate_schedule", begun_anew)


def order_lost(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(
        run_data, "PairOrder", lambda pairs, batch, seed, shuffle: PairOrder(pairs, batch, seed + 1, shuffle)
    )


MUTATIONS = [moments_lost, weights_lost, step_count_lost, rate_lost, order_lost]


def ends_with(inputs: Inputs, run: Path, mutate: Callable[[pytest.MonkeyPatch], None] | None, **options: Any) -> str:
    """sha256 of a run's weights that was stopped after its first step and went on, with a mutation from there."""
    flags = inputs.flags(run, **(OPTIONS | options))
    assert train_here([*flags, "--max_hours", "1e-9"]) == 75
    with pytest.MonkeyPatch.context() as patched:
        if mutate is not None:
            mutate(patched)
        assert train_here(flags) == 0
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("alone")
    assert train_here(inputs.flags(run, **OPTIONS)) == 0
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_nothing_lost_gives_the_same_bits(inputs: Inputs, tmp_path: Path, undisturbed: str) -> None:
    assert ends_with(inputs, tmp_path, None) == undisturbed


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_what_is_lost_shows_in_the_bits(
    inputs: Inputs, tmp_path: Path, undisturbed: str, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """A checkpoint that lacks weights, moments, step count, rate or order gives other bits."""
    assert ends_with(inputs, tmp_path, mutate) != undisturbed


@pytest.mark.parametrize("lost", ["train_data_digest", "reference_digest", "learning_rate"])
def test_what_an_identity_lacks_is_noticed(inputs: Inputs, tmp_path: Path, lost: str) -> None:
    """Other data, another reference, another rate are refused by the part of the identity that is theirs."""
    assert train_here([*inputs.flags(tmp_path / "run", **OPTIONS), "--max_hours", "1e-9"]) == 75
    rows = inputs.train_data.read_text("utf-8").splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-1]) + "\n", "utf-8")
    train_here(inputs.flags(tmp_path / "other", max_steps=1))
    changed = {
        "train_data_digest": {"train_data": tmp_path / "fewer.jsonl"},
        "reference_digest": {"ref_model_name_or_path": tmp_path / "other"},
        "learning_rate": {"learning_rate": 2e-3},
    }[lost]
    with pytest.raises(UserError, match=f"{lost}: was"):
        train_here(inputs.flags(tmp_path / "run", **(OPTIONS | changed)))


@pytest.mark.faults
@group(None)
def test_a_lost_count_of_rounding_steps_shows_in_the_bits(forks: Forks, inputs: Inputs, tmp_path: Path) -> None:
    """A checkpoint that lacks the step of stochastic rounding gives other bits."""
    ends = {}
    for name, forgets, limits in (("alone", None, []), ("kept", None, STOPPING), ("lost", "steps", STOPPING)):
        place = tmp_path / name
        place.mkdir()
        flags = inputs.flags(place / "run", weight_rounding="stochastic", reference="live", save_steps=1, **SHORT)
        for limit, code in [*((limit, 75) for limit in limits), ([], 0)]:
            codes = forks.run([*flags, *limit], place, forgets=forgets, ACCELERATE_MIXED_PRECISION="bf16")
            assert codes == [code], (place / "log").read_text("utf-8")
        ends[name] = oracle(place)
    assert ends["kept"] == ends["alone"] != ends["lost"]
