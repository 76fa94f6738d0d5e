"""Pages of runs with several sets of held-out pairs and replies on the way, and of several runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_run import Inputs, lines, train_here
from test_report import HOSTILE, Page, loads_nothing, make_run

from minimind_dpo.cli import main as cli
from minimind_dpo.report.comparison import differences
from minimind_dpo.report.facts import in_order
from minimind_dpo.report.reading import held_out_sets


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with two sets, of five pairs and of three, and replies to two prompts of each."""
    directory = tmp_path_factory.mktemp("finished")
    few = directory / "few.jsonl"
    few.write_text("".join(inputs.eval_data.read_text("utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    sets = ["--eval_data", f"all={inputs.eval_data}", f"few={few}"]
    flags = inputs.flags(directory / "run", max_steps=2, generate_prompts=2, max_new_tokens=3)
    assert train_here([*flags, *sets]) == 0
    return directory / "run"


def kept(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file of record/."""
    return [json.loads(line) for line in (run / "record" / name).read_text("utf-8").splitlines()]


def test_each_set_is_kept_and_shown_on_its_own(finished: Path) -> None:
    rows = kept(finished, "rewards.jsonl")
    assert [(row["step"], row["set"], row["pairs"]) for row in rows] == [
        (0, "all", 5), (0, "few", 3), (2, "all", 5), (2, "few", 3)
    ]  # fmt: skip
    last = [line for line in lines(finished) if "eval_all_loss" in line][-1]
    for row in rows[2:]:
        mean = sum(group["pairs"] * group["margin"] for group in row["by_length"]) / row["pairs"]
        assert mean == pytest.approx(last[f"eval_{row['set']}_rewards/margins"], abs=1e-5) and abs(mean) > 1e-3
    assert [(pair["set"], pair["kind"]) for pair in kept(finished, "pairs.jsonl")] == [
        *[("all", kind) for kind in ("worst", "worst", "best", "best")], ("few", "worst"), ("few", "best")
    ]  # fmt: skip
    page = Page((finished / "report.html").read_text("utf-8"))
    charts = json.loads(page.raw["script"][0])
    assert [line["label"] for line in charts[0]["lines"]] == ["training", "held-out (all)", "held-out (few)"]
    assert charts[0]["lines"][2]["y"][-1] == pytest.approx(last["eval_few_loss"], rel=1e-4)
    tones = [line["tone"] for line in charts[1]["lines"]]
    assert len(tones) == len(set(tones)) == 5
    assert {"Held-out margins, by quantile (all)", "Held-out margins, by quantile (few)"} <= set(page.text)
    assert {"all", "few", "eval all", "eval few", "few_logps/accuracies"} <= set(page.text)
    assert any(part.startswith("few: held-out loss, before") for part in page.text)


def test_replies_on_the_way_are_shown(finished: Path) -> None:
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text("utf-8").splitlines()]
    html = (finished / "report.html").read_text("utf-8")
    page = Page(html)
    assert len(samples) == 8 and {row["step"] for row in samples} == {0, 2}
    for row in samples:
        assert row["prompt"].strip() in page.text and row["reply"].strip() in page.text
    assert "Replies: length (tokens)" in page.text
    loads_nothing(html)


def test_names_of_sets() -> None:
    assert held_out_sets(["loss", "eval_loss", "eval_dpo_loss"]) == {"eval_": ""}
    assert held_out_sets(["eval_a_dpo_loss", "eval_a_b_dpo_loss", "eval_a_loss"]) == {
        "eval_a_": "a",
        "eval_a_b_": "a_b",
    }
    assert held_out_sets(["eval_loss"]) == {"eval_": ""} and held_out_sets(["loss"]) == {}
    names = ["b_loss", "b_dpo_loss", "a_rewards/ties", "a_dpo_loss", "replies/tokens", "a_logps/accuracies"]
    assert in_order(dict.fromkeys(names)) == [
        "a_logps/accuracies", "a_dpo_loss", "a_rewards/ties", "b_loss", "b_dpo_loss", "replies/tokens"
    ]  # fmt: skip


def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    runs = tmp_path / "one", tmp_path / "two"
    for run, rate in zip(runs, (1e-6, 5e-6), strict=True):
        run.mkdir()
        make_run(run)
        config = {"beta": 0.1, "learning_rate": rate, "output_dir": str(run), "run_name": f"{rate} {HOSTILE}"}
        (run / "config.yaml").write_text(json.dumps(config))
    return runs


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = two_runs(tmp_path)
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 14, "eval_loss": 0.09}) + "\n")
    third = tmp_path / "third"
    third.mkdir()
    row = {"step": 9, "eval_few_loss": 0.5, "eval_few_dpo_loss": 0.5}
    (third / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (third / "config.yaml").write_text("beta: 0.1\nlearning_rate: 1.0e-6\n")
    output = tmp_path / "both.html"
    assert cli(["report", *map(str, (*runs, third)), "--output", str(output)]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    html = output.read_text("utf-8")
    loads_nothing(html)
    page = Page(html)
    told = page.text
    settings = told[told.index("Differences of settings") : told.index("Figures", told.index("What differs"))]
    assert "learning_rate" in settings and "1e-06" in settings and "5e-06" in settings
    assert "beta" not in settings and "output_dir" not in settings and "run_name" not in settings
    charts = json.loads(page.raw["script"][0])
    assert [line["label"] for line in charts[0]["lines"]] == [f"1e-06 {HOSTILE}", f"5e-06 {HOSTILE}"]
    assert charts[0]["lines"][0]["tone"] != charts[0]["lines"][1]["tone"]
    assert charts[0]["lines"][0]["y"] == [0.6931, 0.12] and charts[0]["lines"][1]["y"] == [0.6931, 0.12, 0.09]
    assert [line["label"] for line in charts[1]["lines"]] == ["third"] and "Held-out loss (few)" in told
    assert "0.09" in told and "0.12" in told  # of the last evaluation of each


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    assert differences([{"beta": 0.1}, {"beta": 0.1}]) == []
    assert differences([{"beta": 0.1}, {"beta": 0.2, "seed": 1}]) == [("beta", ["0.1", "0.2"]), ("seed", ["–", "1"])]
    run = two_runs(tmp_path)[0]
    output = tmp_path / "same.html"
    assert cli(["report", str(run), str(run), "--output", str(output)]) == 0
    assert any(part.startswith("Nothing: the runs have the same settings") for part in Page(output.read_text()).text)


def test_a_run_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = two_runs(tmp_path)[0]
    assert cli(["report", str(run)]) == 0 and cli(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (run / "report.html").read_bytes() == (tmp_path / "page.html").read_bytes()
    assert cli(["report", str(run), "--output", str(run / "metrics.jsonl" / "page.html")]) == 2
    assert "--output" in capsys.readouterr().err
