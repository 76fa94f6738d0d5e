"""What training keeps for the page: the right numbers, on any number of ranks, for no bit of the run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import tiny_tokenizer
from helpers_forks import Forks
from helpers_run import Inputs, lines, same_bits, train_here

from minimind_dpo.errors import UserError
from minimind_dpo.report.spread import by_length, correlation, histogram, widen
from minimind_dpo.training import record
from minimind_dpo.training.run_log import RunLog
from minimind_dpo.training.spread import extremes, pieces


def kept(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file of record/."""
    return [json.loads(line) for line in (run / "record" / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with evaluations before it, after two and at its end."""
    directory = tmp_path_factory.mktemp("finished")
    assert train_here(inputs.flags(directory, eval_data=inputs.eval_data, eval_steps=2, ld_alpha=0.5)) == 0
    return directory


def test_rewards_add_up_to_the_metrics(finished: Path) -> None:
    evaluations = [line for line in lines(finished) if "eval_loss" in line]
    rows = kept(finished, "rewards.jsonl")
    assert [row["step"] for row in rows] == [line["step"] for line in evaluations] == [0, 2, 3]
    for row, line in zip(rows, evaluations, strict=True):
        assert row["pairs"] == sum(row["chosen"]["counts"]) == sum(row["rejected"]["counts"]) == 5
        for key, name in (("margin", "margins"), ("accuracy", "accuracies")):
            mean = sum(group["pairs"] * group[key] for group in row["by_length"]) / 5
            assert mean == pytest.approx(line[f"eval_rewards/{name}"], abs=1e-5)
        for side in ("chosen", "rejected"):
            width, counts = 2.0 ** row[side]["power"], row[side]["counts"]
            low = sum(count * width * (row[side]["first"] + place) for place, count in enumerate(counts)) / 5
            assert low - 1e-6 <= line[f"eval_rewards/{side}"] <= low + width + 1e-6
    assert rows[0]["margins"] == pytest.approx([0] * 5, abs=1e-5) and rows[2]["margins"] == sorted(rows[2]["margins"])
    assert rows[2]["margins"][-1] > 0.05


def test_pairs_add_up_to_their_rewards(finished: Path) -> None:
    """The log-ratios of an answer's tokens times beta are its reward, though the loss discounts long answers."""
    pairs = kept(finished, "pairs.jsonl")
    assert [pair["kind"] for pair in pairs] == ["worst"] * 2 + ["best"] * 2
    margins = [pair["margin"] for pair in pairs]
    assert margins[0] < margins[1] < margins[3] < margins[2]
    for pair in pairs:
        assert pair["margin"] == pytest.approx(pair["chosen"]["reward"] - pair["rejected"]["reward"])
        for side in ("chosen", "rejected"):
            moved = [ratio for _, ratio in pair[side]["tokens"] if ratio is not None]
            assert 0.5 * sum(moved) == pytest.approx(pair[side]["reward"], abs=1e-3)
            assert f"assistant\n{side} " in pair[side]["before"] + "".join(text for text, _ in pair[side]["tokens"])
            assert pair[side]["before"].endswith("assistant\n")
    assert all(abs(pair["chosen"]["reward"]) > 1e-3 for pair in pairs)


def test_two_ranks_keep_the_same(inputs: Inputs, forks: Forks, tmp_path: Path, finished: Path) -> None:
    """Five pairs on two ranks: one of them gets a filler."""
    flags = inputs.flags(
        tmp_path / "run", eval_data=inputs.eval_data, eval_steps=2, ld_alpha=0.5, gradient_accumulation_steps=1
    )
    assert set(forks.run(flags, tmp_path, "multi_cpu")) == {0}, (tmp_path / "log").read_text("utf-8")
    ours, theirs = (kept(path, "pairs.jsonl") for path in (tmp_path / "run", finished))
    assert [pair["place"] for pair in ours] == [pair["place"] for pair in theirs]
    assert [pair["margin"] for pair in ours] == pytest.approx([pair["margin"] for pair in theirs], rel=1e-3)
    for one, two in zip(kept(tmp_path / "run", "rewards.jsonl"), kept(finished, "rewards.jsonl"), strict=True):
        assert one["margins"] == pytest.approx(two["margins"], rel=1e-3, abs=1e-5)
    told = json.loads((tmp_path / "run" / "record" / "environment.json").read_text())
    assert told["processes"] == 2 and told["minimind-dpo"]


def test_it_costs_no_bit_of_the_run(
    inputs: Inputs, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunLog, "record_rewards", lambda *_: None)
    monkeypatch.setattr(RunLog, "refresh_page", lambda *_: None)
    assert train_here(inputs.flags(tmp_path, eval_data=inputs.eval_data, eval_steps=2, ld_alpha=0.5)) == 0
    assert same_bits(tmp_path, finished)
    timing = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
    ours, theirs = (
        [{name: value for name, value in line.items() if name not in timing} for line in lines(run)]
        for run in (tmp_path, finished)
    )
    assert ours == theirs and not (tmp_path / "record" / "pairs.jsonl").exists()


def test_data_are_described(inputs: Inputs, finished: Path) -> None:
    told = json.loads((finished / "record" / "data.json").read_text())
    assert (told["train"]["pairs"], told["eval"]["pairs"]) == (21, 5)
    pairs = kept(finished, "pairs.jsonl")  # four of the five held-out ones, with their counted tokens
    counted = sorted(sum(ratio is not None for _, ratio in pair["chosen"]["tokens"]) for pair in pairs)
    lengths = told["eval"]["tokens"]["chosen"]
    assert counted[-1] <= lengths["longest"] and counted[1] <= lengths["median"] <= counted[2]
    assert sum(told["eval"]["difference"]["counts"]) == 5
    longer = sum(pair["longer"] > 0 for pair in pairs)
    assert longer / 5 <= told["eval"]["longer"]["chosen"] <= (longer + 1) / 5


def test_warnings_are_kept_with_their_step_and_cut_back_on_a_resume(inputs: Inputs, tmp_path: Path) -> None:
    """A rate at which nothing is learned is told at the end, and once more where the run goes on from there."""
    flags = {"learning_rate": 1e-12, "save_steps": 5, "num_train_epochs": 5}
    assert train_here(inputs.flags(tmp_path, max_steps=5, **flags)) == 0
    (warning,) = kept(tmp_path, "warnings.jsonl")
    assert warning["step"] == 5 and warning["text"].startswith("nothing learned after 5 steps")
    assert warning["text"].split(":")[0] in (tmp_path / "report.html").read_text("utf-8")
    for name in ("warnings.jsonl", "rewards.jsonl"):
        with (tmp_path / "record" / name).open("a") as file:
            file.write('{"step": 6, "text": "of a step that the checkpoint does not know"}\n')
    assert train_here(inputs.flags(tmp_path, max_steps=10, **flags)) == 0
    assert [(row["step"], row["text"][:15]) for row in kept(tmp_path, "warnings.jsonl")] == [
        (5, "nothing learned"),
        (10, "nothing learned"),
    ]
    assert kept(tmp_path, "rewards.jsonl") == []
    handlers = logging.getLogger("minimind_dpo").handlers
    assert not any(isinstance(handler, record.Record) for handler in handlers)


@pytest.mark.parametrize("seconds", [0.02, 0.5, 7.0])
def test_the_page_takes_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A save a second; a page takes `seconds`, and later twice that."""
    now, spent = [0.0], []

    def write(_: Path) -> None:
        took = seconds * (2 if len(spent) >= 3 else 1)
        now[0] += took
        spent.append(took)

    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(record, "write_report", write)
    page = record.PageWriter(tmp_path)
    for _ in range(20_000):
        now[0] += 1
        page.refresh()
    assert len(spent) > 10
    assert 0.007 < sum(spent[:-1]) / now[0] <= 0.0101 or seconds == 0.02 and sum(spent) / now[0] <= 0.02


def test_a_page_that_cannot_be_written_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> None:
        raise UserError("replies.jsonl: damaged")

    monkeypatch.setattr(record, "write_report", fail)
    page = record.PageWriter(tmp_path)
    page._ended -= 1000
    with caplog.at_level(logging.INFO):
        page.refresh()
    assert "report.html stays as it is for now: replies.jsonl: damaged" in caplog.text


def test_histogram_by_hand() -> None:
    """A range of 3 in bins of 1/16: the smallest power of two that needs no more than 64."""
    bins = histogram(np.array([-1.0, -0.99, 0.0, 2.0, math.inf, math.nan]))
    assert (bins["power"], bins["first"], sum(bins["counts"])) == (-4, -16, 4)
    assert bins["counts"][0] == 2 and bins["counts"][16] == 1 and bins["counts"][48] == 1
    assert widen(bins, 0) == {"power": 0, "first": -1, "counts": [2, 1, 0, 1]}
    assert histogram(np.array([-3.0, 4.0, 4.0]), finest=0) == {"power": 0, "first": -3, "counts": [1] + [0] * 6 + [2]}
    assert histogram(np.array([math.nan]))["counts"] == []
    values = np.random.default_rng(0).normal(size=1000) * 3
    fine = histogram(values)
    assert widen(fine, 0)["counts"] == histogram(np.floor(values), finest=0)["counts"] and len(fine["counts"]) <= 66


def test_length_by_hand() -> None:
    lengths, margins = np.array([-4, -1, 0, 0, 3.0]), np.array([-1.0, 1, 1, 3, 5])
    assert correlation(lengths, 2 * lengths + 1) == pytest.approx(1) and correlation(lengths, -lengths) < -0.999
    assert correlation(lengths, np.zeros(5)) is None and correlation(lengths, lengths * math.nan) is None
    groups = by_length(lengths, margins)
    assert [(group["from"], group["to"], group["pairs"], group["margin"], group["accuracy"]) for group in groups] == [
        (-4, -4, 1, -1.0, 0.0),
        (-1, -1, 1, 1.0, 1.0),
        (0, 0, 2, 2.0, 1.0),
        (3, 3, 1, 5.0, 1.0),
    ]


def test_extremes_never_show_a_pair_twice() -> None:
    values = np.array([[0.0, 1, 0], [3, 0, 0], [0, 0, 0]])
    assert extremes(values) == [("worst", 0), ("best", 1)] and extremes(values[:1]) == []
    assert len({pair for _, pair in extremes(np.random.default_rng(0).normal(size=(40, 3)))}) == 12


def test_tokens_that_share_a_character_are_joined() -> None:
    """An emoji is four tokens of this tokenizer: its log-ratio is theirs together."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("user", add_special_tokens=False).input_ids
    answer = tokenizer("hi 🦜!", add_special_tokens=False).input_ids
    row = {"chosen_input_ids": ids + answer, "chosen_completion_mask": [0] * len(ids) + [1] * len(answer)}
    found = pieces(row, "chosen", [1.0] * len(answer), tokenizer)
    assert found["before"] == "user" and "".join(text for text, _ in found["tokens"]) == "hi 🦜!"
    assert sum(ratio for _, ratio in found["tokens"]) == len(answer) > len(found["tokens"]) and found["cut"] == 0
