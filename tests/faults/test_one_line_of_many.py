"""One corrupt line among 100,000: named by `data check` and by a run, whatever `on_bad_row` makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_run import Inputs

from minimind_dpo.cli import main as cli

CORRUPT = {
    "a flipped bit": lambda line: line.replace(b'"chosen"', b'"cho3en"'),
    "a cut": lambda line: line[: len(line) // 2],
    "zeros": lambda line: line[:10] + bytes(8) + line[18:],
    "no utf-8": lambda line: line[:30] + b"\xff" + line[31:],
}
SHORT = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "reference": "live"}


def write(path: Path, kind: str, rows: int, bad: int) -> str:
    lines = [b'{"prompt": "%d?", "chosen": "yes %d", "rejected": "no %d"}' % (n, n, n) for n in range(1, rows + 1)]
    lines[bad - 1] = CORRUPT[kind](lines[bad - 1])
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "rows"), [*((kind, 500) for kind in CORRUPT), pytest.param("a cut", 100_000, marks=pytest.mark.faults)]
)
def test_a_corrupt_line_among_many_is_named(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, rows: int
) -> None:
    """A corrupt line among 100,000 is named by data check, refused by a run, or dropped, counted and named."""
    bad = rows * 3 // 4 + 1  # lines are counted from 1
    data = write(tmp_path / "data.jsonl", kind, rows, bad)
    place = f"{data}:{bad}"
    assert cli(["data", "check", "--data", data, "--tokenizer", str(inputs.model), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["kept"]) == (rows, rows - 1)
    assert [(found["reason"], found["count"], found["places"]) for found in report["findings"]] == [
        ("malformed_row", 1, [place])
    ]
    for policy in ("auto", "drop") if rows > 500 else ("fail", "auto", "drop"):
        flags = inputs.flags(tmp_path / policy, train_data=data, on_bad_row=policy, **SHORT)
        code = cli(["train", *flags])
        seen = capsys.readouterr().err
        assert "Traceback" not in seen
        if policy == "drop":
            assert code == 0
        else:
            assert code == 2 and seen.count("minimind-dpo: error:") == 1 and place in seen, seen
