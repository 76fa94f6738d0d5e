"""Held-out prompts and mixtures: what is taken, to the pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_data import row, say, tiny_tokenizer, write_jsonl

from minimind_dpo.config import make_config
from minimind_dpo.config.data import COLUMNS
from minimind_dpo.data import forms, tokenized
from minimind_dpo.data.records import parse_row
from minimind_dpo.data.split import mixture, prompt_hash
from minimind_dpo.errors import UserError

ROWS = [row(f"question {i // 2}", chosen=f"yes {i}", rejected=f"no {i}", id=str(i)) for i in range(200)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(tmp_path / "cache"))


def ids(source: Any, **options: Any) -> list[str]:
    settings = {"max_length": 256, "completion_mask": "all_assistant", "on_bad_row": "auto"} | options
    return list(tokenized.tokenize_files(source, tiny_tokenizer(), **settings).dataset["id"])


@pytest.mark.parametrize("size", [0.2, 31, 40.0])
def test_a_split_divides_prompts_and_forgets_no_pair(tmp_path: Path, size: float) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    train, held_out = ids(path, eval_split=size), ids(path, eval_split=size, held_out=True)
    assert sorted(train + held_out, key=int) == [str(i) for i in range(200)]
    assert not {int(i) // 2 for i in train} & {int(i) // 2 for i in held_out}
    if size > 1:
        assert len(held_out) == size // 2 * 2  # two pairs a prompt
    else:
        assert 20 <= len(held_out) <= 60


def test_a_share_does_not_move_with_other_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    fewer = write_jsonl(tmp_path / "g.jsonl", ROWS[150:] + ROWS[:50])
    held_out = set(ids(path, eval_split=0.2, held_out=True))
    kept = {str(i) for i in [*range(50), *range(150, 200)]}
    assert set(ids(fewer, eval_split=0.2, held_out=True)) == held_out & kept
    reordered = write_jsonl(tmp_path / "h.jsonl", ROWS[::-1])
    assert set(ids(reordered, eval_split=30, held_out=True)) == set(ids(path, eval_split=30, held_out=True))


def test_the_hash_is_of_what_is_asked() -> None:
    asked = prompt_hash(parse_row(row("why?"), "x"))
    assert asked == 0.2635432456264326
    for same in (
        row("why? ", chosen="other", rejected="words", weight=2),
        row("system: be kind", "why?"),
        {"prompt": "why?", "chosen": "a", "rejected": "b"},
        {"prompt": say("why?", "be"), "chosen": "cause", "rejected": "fore"},
        row("why?", chosen="same", rejected="same"),
    ):
        assert prompt_hash(parse_row(same, "y")) == asked
    assert prompt_hash(parse_row(row("where?"), "x")) != asked
    cafe = prompt_hash(parse_row(row("what is a café?"), "x"))
    assert cafe == 0.6498385749692268  # as before white space and the like were looked at
    for same in ("what  is\na café?", "what is a\u00a0cafe\u0301?", "\ufeffwhat is\u200b a café?"):
        assert prompt_hash(parse_row(row(same), "y")) == cafe
    named = row("what is a café?")
    for side in ("chosen", "rejected"):
        named[side][0]["name"] = "Ann"
    assert prompt_hash(parse_row(named, "y")) == cafe
    assert prompt_hash(parse_row(row("hello", "hi", "why?"), "x")) != asked


def test_an_empty_part_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS[:2])
    with pytest.raises(UserError, match="eval_split: no pair of .* is left to train on"):
        ids(path, eval_split=2)
    with pytest.raises(UserError, match="eval_split: no pair of .* is held out"):
        ids(path, eval_split=1e-9, held_out=True)


def test_a_malformed_row_is_spoken_of_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [*ROWS, b"{"])
    options = {"max_length": 256, "completion_mask": "all_assistant", "on_bad_row": "drop", "eval_split": 0.2}
    reports = [
        tokenized.tokenize_files(path, tiny_tokenizer(), held_out=part, **options).report for part in (False, True)
    ]
    assert [report.dropped for report in reports] == [{"broken_json": 1}, {}]
    assert sum(report.rows for report in reports) == 201


@pytest.mark.parametrize(
    "weight, times", [(0.5, [0, 1, 0, 1]), (1.5, [1, 2, 1, 2]), (2, [2] * 4), (0.29, [0, 0, 0, 1])]
)
def test_mixture_by_hand(weight: float, times: list[int]) -> None:
    taken = Counter(mixture(np.asarray([1, 0, 1, 1, 1]), [1.0, weight]).tolist())
    assert [taken[i] for i in (0, 2, 3, 4)] == times and taken[1] == 1
    assert len(mixture(np.zeros(100, dtype=np.int64), [0.29])) == 29


def test_a_mixture_of_files(tmp_path: Path) -> None:
    first, second = (write_jsonl(tmp_path / f"{name}.jsonl", ROWS[i : i + 4]) for i, name in ((0, "a"), (4, "b")))
    sources = [{"path": first, "weight": 0.5}, {"path": second, "weight": 2}]
    assert ids(sources) == ["1", "3", "4", "4", "5", "5", "6", "6", "7", "7"]
    assert ids([first, second]) == list("01234567")
    settings = {"max_length": 256, "completion_mask": "all_assistant", "on_bad_row": "auto"}
    mixed, plain = (tokenized.tokenize_files(s, tiny_tokenizer(), **settings) for s in (sources, [first, second]))
    assert mixed.digest != plain.digest and len(mixed.tokens) == 10
    assert mixed.dataset[3]["place"] == f"{second}:1"
    assert mixed.dataset.__getitems__([0, 9])[1]["id"] == "7"


def config(**values: Any) -> Any:
    return make_config({"model_name_or_path": "m", "train_data": "f.jsonl"} | values)


def test_settings_of_data() -> None:
    assert config(columns="prompt=question,chosen=good").columns == ["prompt=question", "chosen=good"]
    assert config(columns={"prompt": "question"}).columns == ["prompt=question"]
    assert config(train_data=[{"path": "a", "weight": 2}, "b"]).train_data == [{"path": "a", "weight": 2}, "b"]
    assert config(eval_split="0.05", eval_steps=3).eval_split == 0.05
    assert frozenset(COLUMNS) == forms.COLUMNS


@pytest.mark.parametrize(
    "values, message",
    [
        ({"eval_split": 0.1, "eval_data": "g.jsonl"}, "eval_split: stands beside eval_data"),
        ({"eval_split": 0}, "eval_split: must be positive"),
        ({"eval_split": 1.5}, "eval_split: must be a share below 1 or a whole number"),
        ({"eval_steps": 3}, "eval_steps: needs eval_data or eval_split"),
        ({"columns": "prompt"}, "columns: expected prompt=question"),
        ({"columns": "promt=q"}, "columns: 'promt' is none of prompt"),
        ({"columns": "prompt=q,prompt=r"}, "columns: names a column twice"),
        ({"train_data": [{"path": "a", "weight": 0}]}, "train_data: the weight of a must be"),
        ({"train_data": [{"file": "a"}]}, "train_data: expected {path: NAME"),
        ({"template_date": "today"}, "template_date: expected a day"),
    ],
)
def test_settings_that_cannot_be_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**values)
