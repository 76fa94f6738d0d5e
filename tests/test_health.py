"""Runs that go wrong and say so: failures of preference training, numbers that are not finite, spikes."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import write_jsonl
from helpers_forks import Forks
from helpers_run import REPOSITORY, WORDS, Inputs, lines, train_here, train_lines, weights

from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.demo.run import ASSETS
from minimind_dpo.errors import TrainingError
from minimind_dpo.training import numbers
from minimind_dpo.training.health import Spikes

WARNED = ["nothing learned", "lose probability", "by heart", "has moved by", "follow the length", "far apart"]


def pairs_of(count: int, chosen: Any, rejected: Any) -> list[dict[str, str]]:
    """Rows whose prompt is random and whose answers `chosen` and `rejected` make of a random generator."""
    rng = random.Random(1)
    return [
        {"prompt": " ".join(rng.choices(WORDS, k=4)), "chosen": chosen(rng), "rejected": rejected(rng)}
        for _ in range(count)
    ]


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def warnings_of(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: list[dict[str, str]], **options: Any
) -> list[str]:
    """Which of `WARNED` a run warns of."""
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    settings = {"train_data": tmp_path / "pairs.jsonl", "completion_mask": "final_turn", "beta": 0.1} | options
    with caplog.at_level(logging.WARNING, "minimind_dpo"):
        train_here(inputs.flags(tmp_path / "run", **settings))
    text = "\n".join(record.message for record in caplog.records)
    return [part for part in WARNED if part in text]


def test_a_healthy_run_is_silent(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs_of(160, lambda rng: "good " + words(rng, 3, 9), lambda rng: "bad " + words(rng, 3, 9))
    options = {"learning_rate": 1e-3, "num_train_epochs": 3}
    assert warnings_of(inputs, tmp_path, caplog, rows, **options) == []
    assert train_lines(tmp_path / "run")[-1]["rewards/margins"] > 0.05


@pytest.mark.parametrize("options", [{"learning_rate": 1e-9}, {"learning_rate": 1e-6, "max_steps": 8}])
def test_nothing_learned(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    rows = pairs_of(100, lambda rng: words(rng, 3, 9), lambda rng: words(rng, 3, 9))
    assert warnings_of(inputs, tmp_path, caplog, rows, **options) == ["nothing learned"]
    assert "raise learning_rate or the number of steps" in caplog.text


def test_the_originals_settings_are_told_without_alarm(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "minimind_dpo"):
        train_here(inputs.flags(tmp_path, learning_rate=4e-8, num_train_epochs=3))
    assert [record.levelno for record in caplog.records if "nothing learned" in record.message] == [logging.INFO]


def test_a_dry_run_has_nothing_to_learn(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs_of(100, lambda rng: words(rng, 3, 9), lambda rng: words(rng, 3, 9))
    assert warnings_of(inputs, tmp_path, caplog, rows, learning_rate=0) == []


def test_memorised(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs_of(16, lambda rng: words(rng, 3, 9), lambda rng: words(rng, 3, 9))
    options = {"learning_rate": 1e-2, "num_train_epochs": 30}
    assert "by heart" in warnings_of(inputs, tmp_path, caplog, rows, **options)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"loss_type": "hinge"}])
def test_other_losses_memorise_too(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """With smoothing a pair costs 0.325 at least, the entropy of one in ten."""
    rows = pairs_of(16, lambda rng: words(rng, 3, 9), lambda rng: words(rng, 3, 9))
    given = {"learning_rate": 1e-2, "num_train_epochs": 30} | options
    assert "by heart" in warnings_of(inputs, tmp_path, caplog, rows, **given)


def test_a_small_beta_makes_small_margins(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nats, not rewards, tell whether something was learned."""
    rows = pairs_of(160, lambda rng: "good " + words(rng, 3, 9), lambda rng: "bad " + words(rng, 3, 9))
    options = {"learning_rate": 1e-4, "num_train_epochs": 3, "beta": 0.001}
    assert "nothing learned" not in warnings_of(inputs, tmp_path, caplog, rows, **options)
    assert 1e-4 < train_lines(tmp_path / "run")[-1]["rewards/margins"] < 0.01


def test_chosen_answers_fall(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same words in both answers, one of them foul: every pair is told apart early, then both are unlearned."""
    rows = pairs_of(32, lambda rng: words(rng, 8, 8), lambda rng: words(rng, 8, 8))
    for row in rows:
        row["rejected"] = row["chosen"] + " red"
    options = {"learning_rate": 3e-3, "num_train_epochs": 20, "beta": 0.01}
    assert "lose probability" in warnings_of(inputs, tmp_path, caplog, rows, **options)


def test_the_end_of_answers_drifts(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rejected answer goes on where the chosen one ends."""
    rows = pairs_of(64, lambda rng: words(rng, 3, 5), lambda rng: "")
    for row in rows:
        row["rejected"] = row["chosen"] + " red blue green"
    options = {"learning_rate": 3e-3, "num_train_epochs": 10}
    assert "has moved by" in warnings_of(inputs, tmp_path, caplog, rows, **options)
    drift = float(re.findall(r"has moved by ([+-][0-9.]+) nats", caplog.text)[0])
    assert ("replies will run on" if drift < 0 else "replies will break off") in caplog.text


def test_length_drives_the_margin(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing but the number of words tells the answers apart."""
    rows = pairs_of(256, lambda rng: "red " * rng.randint(5, 40), lambda rng: "red " * rng.randint(1, 4))
    options = {"learning_rate": 1e-3, "num_train_epochs": 2}
    assert "follow the length" in warnings_of(inputs, tmp_path, caplog, rows, **options)


def test_a_reference_far_from_the_policy(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_here(inputs.flags(tmp_path / "other", num_train_epochs=20, learning_rate=3e-2))
    rows = pairs_of(16, lambda rng: words(rng, 3, 9), lambda rng: words(rng, 3, 9))
    options = {"ref_model_name_or_path": tmp_path / "other", "learning_rate": 1e-4}
    caplog.clear()
    assert "far apart" in warnings_of(inputs, tmp_path, caplog, rows, **options)


def test_the_demo_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its trained model, its settings; a quarter of its pairs."""
    write_jsonl(
        tmp_path / "a.jsonl", [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()[:160]]
    )
    flags = ["--config", str(ASSETS / "demo.yaml"), "--model_name_or_path", str(next(ASSETS.glob("*.pth")))]
    flags += ["--tokenizer_name_or_path", str(ASSETS / "tokenizer"), "--train_data", str(tmp_path / "a.jsonl")]
    flags += ["--eval_data", str(ASSETS / "heldout.jsonl"), "--output_dir", str(tmp_path / "run")]
    with caplog.at_level(logging.WARNING, "minimind_dpo"):
        train_here(flags)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_spikes() -> None:
    """Losses around 0.6 and norms around 2, then a loss of 3.5, told once in 50 steps, and a norm of 50."""
    spikes = Spikes()
    assert [spikes.take(step, 0.6 + 0.1 * (step % 3), 2.0) for step in range(1, 31)] == [None] * 30
    assert "loss 3.60 at step 31, 0.70 before" in str(spikes.take(31, 3.6, 2.0))
    assert spikes.take(32, 3.5, 2.0) is None
    assert [spikes.take(step, 0.6, 2.0) for step in range(33, 90)] == [None] * 57
    assert "gradient norm 50.00 at step 90, 2.00 before" in str(spikes.take(90, 0.6, 50.0))


def poisoned(inputs: Inputs, path: Path, bad: list[int]) -> Path:
    """The training pairs with a weight, in some rows, whose gradient overflows fp32."""
    rows = [json.loads(line) for line in inputs.train_data.read_text().splitlines()]
    for index in bad:
        rows[index]["weight"] = 3e38
    write_jsonl(path, rows)
    return path


def states(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The weights and both moments of a checkpoint."""
    reader = FragmentReader(checkpoint)
    return {
        (kind, name): reader.read(kind, name, 0, torch.Size(shape).numel())
        for name, shape in reader.shapes.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def test_a_step_that_is_not_finite_is_skipped(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Row 9 of 21 lies in step 2 of 3: weights and moments there are those of step 1, and training goes on."""
    data = poisoned(inputs, tmp_path / "bad.jsonl", [9])
    options = {"train_data": data, "shuffle": "false", "save_steps": 1, "save_total_limit": 0}
    with pytest.raises(TrainingError, match="of optimizer step 2 is not finite"):
        train_here(inputs.flags(tmp_path / "stop", **options))
    assert train_here(inputs.flags(tmp_path / "run", on_nonfinite="skip", **options)) == 0
    first, second, third = (states(tmp_path / "run" / "checkpoints" / f"step-00000{step}") for step in (1, 2, 3))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(second[key], third[key]) for key in second)
    assert "step 2 is not finite: skipped" in caplog.text and f"{data}:10" in caplog.text
    written = [json.loads(line) for line in (tmp_path / "run/nonfinite/step-000002.jsonl").read_text().splitlines()]
    assert [row["place"] for row in written] == [f"{data}:{number}" for number in range(9, 17)]
    assert written[1]["weight"] == 3e38 and written[1]["chosen_input_ids"] and "chosen" in written[1]["chosen_text"]
    logged = {line["step"]: line for line in train_lines(tmp_path / "run")}
    assert logged[2]["grad_norm"] is None and logged[2]["skipped_steps"] == 1 and logged[3]["grad_norm"] > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("engine", ["multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu"])
def test_one_ranks_infinity_is_skipped_by_all(inputs: Inputs, tmp_path: Path, forks: Forks, engine: str) -> None:
    data = poisoned(inputs, tmp_path / "bad.jsonl", [2])
    options = {"train_data": data, "shuffle": "false", "on_nonfinite": "skip", "gradient_accumulation_steps": 1}
    codes = forks.run(inputs.flags(tmp_path / "run", **options), tmp_path, engine)
    said = (tmp_path / "log").read_text("utf-8")
    assert codes == [0, 0] and said.count("step 1 is not finite: skipped") == 1, said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert train_lines(tmp_path / "run")[1]["loss"] == pytest.approx(
        0.693147, abs=1e-5
    )  # weights are still the start's


def test_skipping_has_an_end(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2 here, 10 in earnest, of the last 100 steps."""
    monkeypatch.setattr(numbers, "_MOST_SKIPPED", 2)
    data = poisoned(inputs, tmp_path / "bad.jsonl", [0, 4, 9, 12])
    options = {"train_data": data, "shuffle": "false", "gradient_accumulation_steps": 1, "on_nonfinite": "skip"}
    with pytest.raises(TrainingError, match="more than 2 of the last 100 steps were skipped"):
        train_here(inputs.flags(tmp_path / "run", **options))
    assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 3


def test_skips_are_remembered_over_a_resume(inputs: Inputs, tmp_path: Path) -> None:
    data = poisoned(inputs, tmp_path / "bad.jsonl", [2])
    options = {"train_data": data, "shuffle": "false", "on_nonfinite": "skip", "save_steps": 1}
    train_here(inputs.flags(tmp_path / "run", **options))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.rename(tmp_path / "aside")
    train_here(inputs.flags(tmp_path / "run", **options))
    assert lines(tmp_path / "run")[-1]["skipped_steps"] == 1


def test_each_warning_is_in_the_docs() -> None:
    text = (REPOSITORY / "docs" / "health.md").read_text("utf-8")
    assert [part for part in WARNED if part not in text] == []
