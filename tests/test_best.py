"""The best checkpoint: found by any metric, kept beside the newest, in model/ when asked, over any resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_forks import Bomb, Forks, train_on
from helpers_run import Inputs, lines, relative_distance, same_bits, train_here, weights

from minimind_dpo.checkpoints.state import TrainerState, read_state
from minimind_dpo.config import make_config
from minimind_dpo.errors import UserError
from minimind_dpo.models.loading import load_model


def flags(inputs: Inputs, directory: Path, **options: Any) -> list[str]:
    """Six steps with an evaluation after each."""
    given = {"eval_data": inputs.eval_data, "eval_steps": 1, "num_train_epochs": 2, "metric_for_best_model": "loss"}
    return inputs.flags(directory, **given | options)


def kept(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").iterdir())


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


# The held-out loss falls from step to step here, so the best by it is the last, and the worst is the first.
FIRST = {"greater_is_better": "true"}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (FIRST, [1]),  # save_steps 0: nothing else is kept
        (FIRST | {"save_steps": 1}, [1, 6]),
        (FIRST | {"save_steps": 1, "save_total_limit": 1}, [1, 6]),
        (FIRST | {"save_steps": 1, "save_total_limit": 3}, [1, 5, 6]),
        ({"save_steps": 1, "save_total_limit": 1}, [6]),
        ({"metric_for_best_model": "eval_rewards/margins"}, [5, 6]),  # rises all the time; both were the best once
    ],
)
def test_the_best_is_kept(inputs: Inputs, tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    assert train_here(flags(inputs, tmp_path, **options)) == 0
    logged = {line["step"]: line for line in lines(tmp_path) if "eval_loss" in line}
    metric = "eval_" + options.get("metric_for_best_model", "loss").removeprefix("eval_")
    values = {step: line[metric] for step, line in logged.items() if step}
    best = (max if steps[0] == 1 or "margins" in metric else min)(values, key=values.__getitem__)
    assert summary(tmp_path)["best"] == {"metric": metric, "value": values[best], "step": best}
    assert (kept(tmp_path), best) == (steps, steps[0] if options.get("greater_is_better") else 6)


@pytest.mark.parametrize("engine", [None, "multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu"])
def test_model_is_of_the_best(inputs: Inputs, tmp_path: Path, forks: Forks, engine: str | None) -> None:
    options = FIRST | {"load_best_model_at_end": "true", "save_steps": 3}
    directory = tmp_path / "run"
    train_on(engine, flags(inputs, directory, **options), forks, tmp_path)
    best = load_model(directory / "checkpoints" / "step-000001").state_dict()
    ours = weights(directory)
    assert all(torch.equal(ours[name], best[name]) for name in ours)
    steps = kept(directory)[-1]
    assert kept(directory) == [1, steps]
    last = load_model(directory / "checkpoints" / f"step-{steps:06d}").state_dict()
    assert any(not torch.equal(ours[name], last[name]) for name in ours)
    assert (summary(directory)["model_step"], summary(directory)["steps"]) == (1, steps)


def test_it_is_the_same_over_a_kill(inputs: Inputs, tmp_path: Path, forks: Forks) -> None:
    """Killed after the best was found, a run goes on to the same best, and to the same model/."""
    options = FIRST | {"load_best_model_at_end": "true", "save_steps": 2, "save_total_limit": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forks.run(flags(inputs, whole, **options), tmp_path) == [0]
    bomb = Bomb("training.loop", "optimizer_step", nth=4)
    assert forks.run(flags(inputs, cut, **options), tmp_path, bomb=bomb) != [0]
    assert kept(cut) == [1, 2]
    assert forks.run(flags(inputs, cut, **options), tmp_path) == [0]
    assert same_bits(whole, cut) and kept(whole) == kept(cut) == [1, 6]
    assert summary(whole)["best"] == summary(cut)["best"]
    assert forks.run(flags(inputs, cut, **options), tmp_path) == [0]  # once more: nothing is left to do
    assert same_bits(whole, cut)
    assert "nothing was left to do: all 6 steps were done before" in (tmp_path / "log").read_text("utf-8")


def test_looking_for_it_changes_no_bit(inputs: Inputs, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_here(flags(inputs, one, metric_for_best_model="none")) == 0
    assert train_here(flags(inputs, two, **FIRST)) == 0
    assert same_bits(one, two) and relative_distance(one, two) == 0
    assert "best" not in summary(one)


def test_a_state_of_before_there_was_a_best_is_read(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "total_steps": 6}))
    assert read_state(tmp_path) == TrainerState(step=3, total_steps=6, best=None)


def test_mistakes(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metric_for_best_model: eval_f1 is none of eval_loss, "):
        train_here(flags(inputs, tmp_path, metric_for_best_model="f1"))
    with pytest.raises(UserError, match="metric_for_best_model: needs eval_data or eval_split"):
        make_config({"model_name_or_path": "m", "train_data": "d", "load_best_model_at_end": True})


def test_evaluations_are_told(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "minimind_dpo"):
        assert train_here(flags(inputs, tmp_path, eval_steps=3)) == 0
    told = [record.getMessage() for record in caplog.records if "evaluation at" in record.getMessage()]
    values = {line["step"]: line for line in lines(tmp_path) if "eval_loss" in line}
    assert [line.split(":")[0] for line in told] == [f"evaluation at step {step}" for step in (0, 3, 6)]
    assert (
        f"loss {values[3]['eval_loss']:.4f}, rewards/accuracies {values[3]['eval_rewards/accuracies']:.1%}" in told[1]
    )
    end = [record.getMessage().strip() for record in caplog.records]
    end = end[next(place for place, line in enumerate(end) if line.startswith("done: 6 steps, 42 pairs")) :]
    at = end.index("held-out pairs, before -> after:")
    assert end[at + 1].split() == ["loss", "0.6931", "->", f"{values[6]['eval_loss']:.4f}"]
    assert end[at + 6] == f"best by eval_loss: {values[6]['eval_loss']:.4g} at step 6, which model/ is of"
