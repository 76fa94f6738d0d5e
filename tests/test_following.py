"""A reference that follows the policy (TR-DPO): under every engine, by hand, and over a resume."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_forks import Forks, train_on
from helpers_run import Inputs, train_here, train_lines

from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.config import load_config
from minimind_dpo.errors import UserError
from minimind_dpo.precompute import run as precompute

MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
ENGINES = [None, "multi_cpu", "ds_zero1_cpu", "ds_zero3_cpu"]


def flags(inputs: Inputs, output_dir: Path, engine: str | None, **options: Any) -> list[str]:
    """The same global batch on one rank and on two."""
    return inputs.flags(output_dir, **MOVING | {"gradient_accumulation_steps": 1 if engine else 2} | options)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reference_that_becomes_the_policy(inputs: Inputs, tmp_path: Path, engine: str | None, forks: Forks) -> None:
    """With all of the way gone after each step, every step begins where policy and reference are equal."""
    train_on(engine, flags(inputs, tmp_path, engine, ref_model_mixup_alpha=1.0), forks, tmp_path)
    losses = [line["loss"] for line in train_lines(tmp_path)]
    assert len(losses) == 3 and losses == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert max(line["grad_norm"] for line in train_lines(tmp_path)) > 0.1


@pytest.mark.parametrize(
    ("engine", "precision", "rounding"),
    [
        ("single_cpu", "bf16", "dithered"),
        ("single_cpu", "bf16", "stochastic"),
        ("ds_zero2_cpu", "bf16", "dithered"),
        ("single_cpu", "fp16", "nearest"),
    ],
)
def test_in_half_precision_too(
    inputs: Inputs, tmp_path: Path, forks: Forks, engine: str, precision: str, rounding: str
) -> None:
    """Both are rounded alike: what one weight is in products is what the other is."""
    given = flags(inputs, tmp_path, None, ref_model_mixup_alpha=1.0, max_steps=2, weight_rounding=rounding)
    train_on(f"{engine} --mixed_precision {precision}", given, forks, tmp_path)
    assert [line["loss"] for line in train_lines(tmp_path)] == pytest.approx([math.log(2)] * 2, abs=1e-6)


@pytest.fixture(scope="module")
def alone(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process whose reference goes a third of the way at steps 2 and 4, checkpoints at each."""
    run = tmp_path_factory.mktemp("alone")
    options = {"ref_model_mixup_alpha": 1 / 3, "ref_model_sync_steps": 2, "num_train_epochs": 2}
    assert train_here(flags(inputs, run, None, save_steps=1, save_total_limit=0, **options)) == 0
    return run


def test_it_moves_by_hand(inputs: Inputs, alone: Path) -> None:
    """(1 - 1/3) of where it was and 1/3 of the policy, at every second step."""
    readers = [FragmentReader(alone / f"checkpoints/step-{step:06d}") for step in range(1, 7)]
    for name, shape in readers[0].shapes.items():
        size = math.prod(shape)
        weights = [reader.read("weight", name, 0, size) for reader in readers]
        references = [reader.read("reference", name, 0, size) for reader in readers]
        assert torch.equal(references[1], torch.lerp(references[0], weights[1], 1 / 3))
        assert torch.equal(references[2], references[1])
        assert torch.equal(references[3], torch.lerp(references[2], weights[3], 1 / 3))
        assert not torch.equal(references[1], references[0])


@pytest.mark.parametrize("engine", ["multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu"])
def test_engines_agree(inputs: Inputs, alone: Path, tmp_path: Path, engine: str, forks: Forks) -> None:
    options = {"ref_model_mixup_alpha": 1 / 3, "ref_model_sync_steps": 2, "num_train_epochs": 2}
    train_on(engine, flags(inputs, tmp_path, engine, **options), forks, tmp_path)
    assert [line["loss"] for line in train_lines(tmp_path)] == pytest.approx(
        [line["loss"] for line in train_lines(alone)], rel=1e-4
    )


def test_a_resumed_run_has_the_same_bits(inputs: Inputs, alone: Path, tmp_path: Path) -> None:
    """From between two moves."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(run / "model")
    for step in (4, 5, 6):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    options = {"ref_model_mixup_alpha": 1 / 3, "ref_model_sync_steps": 2, "num_train_epochs": 2}
    assert train_here(flags(inputs, run, None, save_steps=1, save_total_limit=0, **options)) == 0
    assert [line["loss"] for line in train_lines(run)] == [line["loss"] for line in train_lines(alone)]
    assert (run / "model/model.safetensors").read_bytes() == (alone / "model/model.safetensors").read_bytes()


def test_a_margin_that_starts_anew_is_no_sign_of_nothing_learned(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train_here(flags(inputs, tmp_path, None, ref_model_mixup_alpha=1.0, num_train_epochs=3)) == 0
    assert "nothing learned" not in caplog.text and len(train_lines(tmp_path)) == 9


def test_no_cache_is_filled_for_it(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a reference that follows the policy reads no cache"):
        precompute(load_config(flags(inputs, tmp_path, None), "precompute"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, "lora_r 4 trains matrices"),
        ({"reference": "cache"}, "reference cache does not hold"),
        ({"ref_model_name_or_path": "x"}, "ref_model_name_or_path x is another model"),
        ({"loss_type": "simpo"}, "loss_type simpo has no reference to follow"),
        ({"ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha: must be in (0, 1]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps: must be positive"),
    ],
)
def test_what_can_not_follow(inputs: Inputs, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        train_here(flags(inputs, tmp_path, None, **options))
    assert message in str(caught.value)


def test_another_pace_is_another_run(inputs: Inputs, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone / "checkpoints/step-000003", run / "checkpoints/step-000003")
    with pytest.raises(UserError, match=r"ref_model_mixup_alpha: was 0\.33"):
        train_here(flags(inputs, run, None, ref_model_mixup_alpha=0.5, ref_model_sync_steps=2, num_train_epochs=2))
    assert json.loads((alone / "summary.json").read_text())["steps"] == 6
