from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers_data import row, say, tiny_tokenizer, write_jsonl
from rich.cells import cell_len

from minimind_dpo.data import inspect
from minimind_dpo.data.inspect import run_inspect
from minimind_dpo.data.spans import chat_template
from minimind_dpo.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = [row("a", "b", "question", chosen="hello there", rejected="hello you"), "", b"{broken",
            row("same", chosen="x", rejected="x")]  # fmt: skip
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return ["--data", write_jsonl(tmp_path / "f.jsonl", rows), "--tokenizer", str(tmp_path / "tokenizer"),
            "--completion_mask", "all_assistant"]  # fmt: skip


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


def test_a_templates_day_is_that_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %m %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "dated")
    argv = ["--data", write_jsonl(tmp_path / "f.jsonl", [row("q")]), "--tokenizer", str(tmp_path / "dated")]
    assert shown(capsys, argv)["chosen"]["text"].startswith("26 07 2024")
    assert shown(capsys, [*argv, "--template_date", "2031-03-05"])["chosen"]["text"].startswith("05 03 2031")
    with pytest.raises(SystemExit) as stopped:
        run_inspect([*argv, "--template_date", "today"])
    assert stopped.value.code == 2 and "expected a day as 2024-07-26, found 'today'" in capsys.readouterr().err


def test_a_pair_that_would_be_dropped_is_shown_with_the_reason(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_inspect([*files, "--index", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert "would be dropped (identical_sides)" in printed.err
    result = json.loads(printed.out)
    assert result["index"] == 2 and result["chosen"] == result["rejected"]
    assert result["shared_prefix_tokens"] == len(result["chosen"]["input_ids"]) - 1


def test_text(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_inspect(files)
    printed = capsys.readouterr().out
    assert "<|im_start|>assistant\n«b<|im_end|>\n»<|im_start|>user\nquestion" in printed
    assert f"{files[1]}:1: the two sides share their first" in printed


def in_terminal(
    argv: list[str], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """What a terminal of that width gets: lines as they are, and without their colours."""
    monkeypatch.setattr(inspect, "_wants_colour", lambda: True)
    for name, value in (("COLUMNS", str(width)), ("FORCE_COLOR", "1"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run_inspect(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, [re.sub(r"\033\[[\d;]*m", "", line) for line in lines]


def columns(lines: list[str], width: int) -> tuple[list[str], list[str]]:
    """The lines of both columns, which are as wide as each other, without what fills them up."""
    each = (width - 5) // 2
    return [line[1 : 1 + each].rstrip() for line in lines], [line[4 + each : 4 + 2 * each].rstrip() for line in lines]


def test_a_terminal_gets_both_sides_beside_each_other(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shown(capsys, files)["shared_prefix_tokens"]
    coloured, lines = in_terminal(files, 60, capsys, monkeypatch)
    assert all(cell_len(line) <= 60 for line in lines)
    mark = next(at for at, line in enumerate(lines) if f"▲ {shared} shared tokens" in line)
    header = next(at for at, line in enumerate(lines) if "chosen:" in line)
    left, right = columns(lines[header + 1 : mark], 60)
    assert left == right and "<|im_start|>assistant↵" in left and any("question<|im_end|>↵" in line for line in left)
    left, right = columns(lines[mark + 1 :], 60)
    assert ("".join(left), "".join(right)) == (" there<|im_end|>↵", " you<|im_end|>↵")
    assert any("\033[2;32mb<|im_end|>↵" in line for line in coloured[:mark])  # shared, and it counts
    assert any("\033[2m<|im_start|>assistant↵" in line for line in coloured[:mark])
    assert any("\033[32m" in line and "you<|im_end|>" in line for line in coloured[mark:])


def test_wide_characters_and_what_a_terminal_would_obey(
    tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = row("你好，世界" * 20, chosen="世界世界\033[31m红\x07", rejected="丗界\u202e")  # 世 and 丗 share two bytes
    path = write_jsonl(tmp_path / "wide.jsonl", [pair])
    for width in (40, 61, 100):
        coloured, lines = in_terminal(["--data", path, *files[2:]], width, capsys, monkeypatch)
        assert all(cell_len(line) <= width for line in lines)
        mark = next(at for at, line in enumerate(lines) if "▲" in line)
        assert "\ufffd" not in "".join(lines) and sum(line.count("界") for line in lines[:mark]) == 40
        assert "世界世界␛[31m红␇" in "".join(lines[mark:]).replace(" ", "") or width == 40
        assert "丗界<202E>" in "".join(lines[mark:])
        assert "\033[31m" not in "".join(coloured)


@pytest.mark.parametrize("no_color, terminal, coloured", [("", True, True), ("1", True, False), ("", False, False)])
def test_colour_is_for_terminals_that_want_it(
    no_color: str, terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(inspect.sys.stdout, "isatty", lambda: terminal)
    assert inspect._wants_colour() == coloured


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
