from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_data import row, say, tiny_tokenizer, write_jsonl

from minimind_dpo.data import inspect
from minimind_dpo.data.inspect import run_inspect
from minimind_dpo.data.spans import chat_template
from minimind_dpo.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = [row("a", "b", "question", chosen="hello there", rejected="hello you"), "", b"{broken",
            row("same", chosen="x", rejected="x")]  # fmt: skip
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return ["--data", write_jsonl(tmp_path / "f.jsonl", rows), "--tokenizer", str(tmp_path / "tokenizer")]


def shown(capsys: pytest.CaptureFixture[str], argv: list[str]) -> Any:
    assert run_inspect([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = shown(capsys, files)
    assert list(result) == ["index", "chosen", "rejected", "shared_prefix_tokens"]
    assert result["index"] == 0 and list(result["chosen"]) == ["input_ids", "completion_mask", "text"]
    tokenizer = tiny_tokenizer()
    for name, words in (("chosen", "hello there"), ("rejected", "hello you")):
        side = result[name]
        assert side["text"] == chat_template(tokenizer).render(say("a", "b", "question", words))
        assert side["input_ids"] == tokenizer(side["text"])["input_ids"]
        counted = [i for i, m in zip(side["input_ids"], side["completion_mask"], strict=True) if m]
        assert tokenizer.decode(counted) == f"b<|im_end|>\n{words}<|im_end|>\n"
    chosen, rejected = result["chosen"]["input_ids"], result["rejected"]["input_ids"]
    shared = result["shared_prefix_tokens"]
    assert chosen[:shared] == rejected[:shared] and chosen[shared] != rejected[shared]


def test_options(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    final = shown(capsys, [*files, "--completion_mask", "final_turn"])
    counted = [i for i, m in zip(*[final["chosen"][k] for k in ("input_ids", "completion_mask")], strict=True) if m]
    assert tiny_tokenizer().decode(counted) == "hello there<|im_end|>\n"
    short = shown(capsys, [*files, "--max_length", "9"])
    assert short["chosen"]["input_ids"] == final["chosen"]["input_ids"][:9]
    assert len(short["chosen"]["completion_mask"]) == 9 and short["shared_prefix_tokens"] == 8


def test_a_pair_that_would_be_dropped_is_shown_with_the_reason(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inspect([*files, "--index", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert "would be dropped (identical_sides)" in printed.err
    result = json.loads(printed.out)
    assert result["index"] == 2 and result["chosen"] == result["rejected"]
    assert result["shared_prefix_tokens"] == len(result["chosen"]["input_ids"]) - 1


def test_text(files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_inspect(files)
    printed = capsys.readouterr().out
    assert "<|im_start|>assistant\n«b<|im_end|>\n»<|im_start|>user\nquestion" in printed
    assert f"{files[1]}:1: the two sides share their first" in printed
    monkeypatch.setattr(inspect, "_wants_colour", lambda: True)
    run_inspect(files)
    assert "assistant\n\033[32mhello there<|im_end|>\n\033[0m" in capsys.readouterr().out


def test_errors(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"{files[1]}:3: broken JSON"):
        run_inspect([*files, "--index", "1"])
    with pytest.raises(UserError, match="--index 3: the data has 3 rows, an index lies between 0 and 2"):
        run_inspect([*files, "--index", "3"])
    with pytest.raises(SystemExit) as stopped:
        run_inspect([*files, "--index", "-1"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        run_inspect(["--help"])
    assert stopped.value.code == 0 and "--completion_mask" in capsys.readouterr().out


def test_only_the_pair_asked_for_is_read(tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def counting(file: Any, read_rows: Any = inspect.read_rows) -> Any:
        for number, payload in read_rows(file):
            reads.append(number)
            yield number, payload

    monkeypatch.setattr(inspect, "read_rows", counting)
    run_inspect([*files, "--index", "0"])
    assert reads == [1]
