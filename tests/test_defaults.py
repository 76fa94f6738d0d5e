"""What a run does when it is told little: defaults that learn, runs that began under other defaults, recipes named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from helpers_run import Inputs, same_bits, train_here, train_lines

from minimind_dpo.config import load_config
from minimind_dpo.demo.run import ASSETS
from minimind_dpo.training import setup

FORMER = {
    "loss_type": "sigmoid_norm",
    "learning_rate": 4e-8,
    "lr_scheduler_type": "minimind",
    "completion_mask": "all_assistant",
}


def plain_flags(inputs: Inputs, output_dir: Path, **options: Any) -> list[str]:
    """A command that names nothing of what a loss or a schedule is."""
    values = {
        "model_name_or_path": inputs.model,
        "train_data": inputs.train_data,
        "output_dir": output_dir,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
    } | options
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_plain_settings_move_a_model(inputs: Inputs, tmp_path: Path) -> None:
    """Cosine with a tenth of warmup, as transformers' Trainer counts: the first of 21 steps has rate 0."""
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "save_steps": 0}
    train_here(plain_flags(inputs, tmp_path, **options))
    logged = train_lines(tmp_path)
    assert [line["learning_rate"] for line in logged[:4]] == pytest.approx([0.0, 1e-6 / 3, 2e-6 / 3, 1e-6])
    assert logged[-1]["learning_rate"] < 1e-7
    assert logged[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and logged[-1]["rewards/margins"] != 0


def test_a_run_of_former_defaults_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Continued twice by a command that names no setting: the bits of one that named the former defaults."""
    train_here(plain_flags(inputs, tmp_path / "whole", **FORMER))
    with monkeypatch.context() as former:
        former.setattr(setup, "DEFAULTS", {})  # its checkpoints named none
        train_here(plain_flags(inputs, tmp_path / "run", **FORMER))
    for turn in range(2):  # the second time from what the first one left
        max((tmp_path / "run" / "checkpoints").iterdir()).rename(tmp_path / f"newest-{turn}")
        with caplog.at_level(logging.INFO, "minimind_dpo"):
            train_here(plain_flags(inputs, tmp_path / "run"))
        assert "the run began with other defaults, which stay: loss_type: sigmoid_norm" in caplog.text
        caplog.clear()
        assert same_bits(tmp_path / "whole", tmp_path / "run")


def test_todays_runs_are_held_to_their_settings(inputs: Inputs, tmp_path: Path) -> None:
    """Who names the former loss on a run of today's defaults is told that it is another run."""
    train_here(plain_flags(inputs, tmp_path))
    with pytest.raises(ValueError, match="loss_type: was sigmoid, is sigmoid_norm"):
        train_here(plain_flags(inputs, tmp_path, loss_type="sigmoid_norm"))


@pytest.mark.parametrize(("options", "named"), [({}, True), ({"learning_rate": 5e-6}, False), ({"beta": 0.2}, False)])
def test_raw_weights_without_a_recipe_are_told_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], named: bool
) -> None:
    demo = Inputs(next(ASSETS.glob("*.pth")), ASSETS / "heldout.jsonl", ASSETS / "heldout.jsonl")
    flags = plain_flags(demo, tmp_path, tokenizer_name_or_path=ASSETS / "tokenizer", max_steps=1, **options)
    with caplog.at_level(logging.INFO, "minimind_dpo"):
        train_here(flags)
    assert ("--config minimind2_small has MiniMind's own settings" in caplog.text) is named
    assert load_config(flags).loss_type == ["sigmoid"]
