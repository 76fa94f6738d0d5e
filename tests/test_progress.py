"""What is seen of a run: its introduction, bars or lines, its last words; and callbacks of a user's own."""

from __future__ import annotations

import logging
import random
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_forks import Forks
from helpers_run import REPOSITORY, Inputs, built, lines, same_bits, train_here, train_lines

from minimind_dpo import Callback, train_dpo
from minimind_dpo.config import load_config
from minimind_dpo.demo.run import demo_config
from minimind_dpo.engine import console
from minimind_dpo.training import progress
from minimind_dpo.training.introduction import side_lengths

LIMIT = 160  # tokens a side, so that some are cut
LINE = r"^step +(\d+)/9  loss (\S+)  accuracy (\S+)  margin (\S+)  \S+ pairs/s  rate (\S+)  (\S+) left$"  # of 9 steps


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (720, "12:00"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_counted_work_in_a_log_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """100 pairs, 10 every 20 s: a line after 60, 120 and 180 s."""
    now = 0.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(console, "shows_bars", lambda: False)
    caplog.set_level(logging.INFO, "minimind_dpo")
    with (
        console.Progress("scoring", "pairs", 100) as counted,
        console.Progress("scoring", "pairs", 100, False) as other,
    ):
        for _ in range(10):
            now += 20
            counted.update(10)
            other.update(10)
    assert caplog.messages == [
        "scoring: 30 of 100 pairs, 2:20 left",
        "scoring: 60 of 100 pairs, 1:20 left",
        "scoring: 90 of 100 pairs, 0:20 left",
    ]


def test_a_log_has_a_line_for_each_logged_step(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path / "run", num_train_epochs=3, logging_steps=4, eval_data=inputs.eval_data)
    assert forks.run(flags, tmp_path) == [0]
    said = (tmp_path / "log").read_text("utf-8")
    assert "\r" not in said and "|" not in said
    shown = re.findall(LINE, said, re.M)
    logged = train_lines(tmp_path / "run")
    assert [int(line[0]) for line in shown] == [line["step"] for line in logged] == [4, 8, 9]
    names = ("loss", "rewards/accuracies", "rewards/margins", "learning_rate")
    for line, values in zip(shown, logged, strict=True):
        assert [float(word) for word in line[1:5]] == pytest.approx(
            [values[name] for name in names], rel=1e-2, abs=1e-2
        )
    assert shown[-1][5] == "0:00"


def test_a_terminal_has_a_bar_and_what_is_said_above_it(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (console, progress):
        monkeypatch.setattr(module, "shows_bars", lambda: True)
    assert train_here(inputs.flags(tmp_path)) == 0
    seen = capsys.readouterr().err
    assert "100%" in seen and "3/3" in seen and "accuracy" in seen and "step 1/3" not in seen


def test_the_introduction(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minimind_dpo")
    config = load_config(inputs.flags(tmp_path, max_length=LIMIT, eval_data=inputs.eval_data, num_train_epochs=2))
    run = built(config)
    pairs, held_out = len(run.train_data), sum(map(len, run.eval_sets.values()))
    sides = [
        len(run.train_data.dataset[i][f"{side}_input_ids"]) for i in range(pairs) for side in ("chosen", "rejected")
    ]
    full = sum(max(pair) == LIMIT for pair in zip(sides[::2], sides[1::2], strict=True))
    median = int(statistics.median(sides))
    assert side_lengths(run.train_data, LIMIT) == (median, LIMIT, full) and 0 < full < pairs
    parameters = sum(parameter.numel() for parameter in run.policy.parameters())
    for line in (
        f"policy     llama, {parameters / 1e6:.3g} M parameters, all trained, 4 heads",
        f"pairs      {pairs}; a side has {median} tokens (median), {LIMIT} at most; {full} reach max_length {LIMIT} "
        f"and are cut there; {held_out} held out",
        "loss       sigmoid, beta 0.5; tokens that count: all_assistant",
        f"steps      {run.state.total_steps} of 8 pairs on 1 process (2 epochs); adamw, rate 0.01, minimind",
        f"precision  fp32, products by {run.config.matmul}",
    ):
        assert line in caplog.messages, caplog.text


def test_assumed_heads_are_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minimind_dpo")
    built(demo_config(tmp_path, max_steps=1))
    assert re.search(r"policy +MiniMind generation 2 \(llama\), 1.68 M parameters, .* 8 heads \(assumed", caplog.text)


def test_last_words(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minimind_dpo")
    flags = inputs.flags(tmp_path, save_steps=1, num_train_epochs=2)
    train_here(flags)
    first, *_, last = train_lines(tmp_path)
    assert "done: 6 steps, 42 pairs in" in caplog.text
    assert f"steps 1 -> 6, training pairs: loss {first['loss']:.3g} -> {last['loss']:.3g}, accuracy" in caplog.text
    assert f"  next    transformers chat {tmp_path / 'model'}" in caplog.messages
    caplog.clear()
    assert train_here(flags) == 0
    assert "nothing was left to do: all 6 steps were done before" in caplog.text and "done: 6" not in caplog.text


class Told(Callback):
    """Notes what it is told, and does what a callback should not be able to disturb a run with."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("log", step, metrics["loss"]))
        torch.rand(7), random.random(), np.random.rand()  # noqa: B018
        torch.set_grad_enabled(False)
        with pytest.raises(TypeError):
            metrics["loss"] = 0.0  # type: ignore[index]

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("evaluate", step, metrics["eval_loss"]))
        torch.manual_seed(1)

    def on_save(self, step: int, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.told.append(("save", step, path.name))


def test_callbacks_are_told_and_change_nothing(inputs: Inputs, tmp_path: Path) -> None:
    options = {"dropout": 0.3, "eval_data": inputs.eval_data, "eval_steps": 2, "save_steps": 2, "num_train_epochs": 2}
    train_here(inputs.flags(tmp_path / "alone", **options))
    callback = Told()
    train_dpo(load_config(inputs.flags(tmp_path / "told", **options)), callbacks=[callback])
    assert same_bits(tmp_path / "alone", tmp_path / "told")
    told = [one[:2] for one in callback.told]
    assert [one for one in told if one[0] != "log"] == [
        ("evaluate", 0), ("evaluate", 2), ("save", 2), ("evaluate", 4), ("save", 4), ("evaluate", 6), ("save", 6)
    ]  # fmt: skip
    values = {(kind, step): value for kind, step, value in callback.told}
    for line in lines(tmp_path / "alone"):
        kind = "evaluate" if "eval_loss" in line else "log"
        assert values[kind, line["step"]] == line["eval_loss" if kind == "evaluate" else "loss"]


def test_a_callback_that_fails_ends_the_run(inputs: Inputs, tmp_path: Path) -> None:
    """With its own error; the same call without it goes on from what was saved."""

    class Failing(Callback):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 2:
                raise ZeroDivisionError("mine")

    config = load_config(inputs.flags(tmp_path / "run", save_steps=1))
    with pytest.raises(ZeroDivisionError, match="mine"):
        train_dpo(config, callbacks=[Failing()])
    assert train_dpo(config)["steps"] == 3
    train_here(inputs.flags(tmp_path / "alone", save_steps=1))
    assert same_bits(tmp_path / "run", tmp_path / "alone")


def test_only_the_main_process_is_told(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    program = REPOSITORY / "tests" / "programs" / "told_by_a_rank.py"
    flags = [str(tmp_path / "told"), *inputs.flags(tmp_path / "run")]
    assert forks.run(flags, tmp_path, "multi_cpu", program=str(program)) == [0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "told").read_text() == "0 1\n0 2\n"  # 21 pairs in steps of 16
