from __future__ import annotations

import errno
import json
import logging
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import row, tiny_tokenizer, write_jsonl

from minimind_dpo.data import cache, processes, tokenized
from minimind_dpo.data.chat import shared_prefix_length
from minimind_dpo.data.drops import tokenize_pair
from minimind_dpo.data.records import RowError, parse_row
from minimind_dpo.data.tokenized import tokenize_files
from minimind_dpo.errors import TrainingError, UserError

ROWS = [row(f"question {i}", chosen=f"yes {i}", rejected=f"no {i}", weight=1 + i, id=i) for i in range(5)]
SIDES = ("chosen_input_ids", "chosen_completion_mask", "rejected_input_ids", "rejected_completion_mask")


def run(source: Any, **options: Any) -> tokenized.TokenizedData:
    settings = {"max_length": 128, "completion_mask": "all_assistant", "on_bad_row": "auto"} | options
    return tokenize_files(source, settings.pop("tokenizer", None) or tiny_tokenizer(), **settings)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the pairs that are tokenized."""
    seen: list[str] = []

    def counting(pair: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(pair.place)
        return tokenize_pair(pair, *args, **kwargs)

    monkeypatch.setattr(processes, "tokenize_pair", counting)
    return seen


def test_rows_are_the_tokenized_pairs_in_file_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    data = run(path)
    assert len(data) == 5 and str(data.report) == "kept 5 of 5 pairs"
    for index, item in enumerate(ROWS):
        pair = tokenize_pair(
            parse_row(item, f"{path}:{index + 1}"), tiny_tokenizer(), max_length=128, completion_mask="all_assistant"
        )
        expected = {name: getattr(pair, name) for name in pair.__slots__}  # type: ignore[union-attr]
        sides = pair.chosen_input_ids, pair.rejected_input_ids  # type: ignore[union-attr]
        expected["tokens"] = sum(map(len, sides)) - 2 - shared_prefix_length(*sides)
        assert data.dataset[index] == expected and data.tokens[index] == expected["tokens"]
    assert data.dataset[[3, 1]]["place"] == [f"{path}:4", f"{path}:2"]
    assert data.dataset["weight"][2] == 3.0 and data.dataset["margin"][0] is None and data.dataset[0]["id"] == "0"
    assert data.dataset.cache_files and data.dataset.cache_files[0]["filename"].endswith("pairs.arrow")


def test_the_second_call_reads_the_cache(tmp_path: Path, calls: list[str]) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    first = run(path)
    assert len(calls) == 5
    moved = tmp_path / "moved.jsonl"
    os.rename(path, moved)
    second = run(str(moved))
    assert len(calls) == 5
    assert second.digest == first.digest and second.dataset[4]["place"] == f"{moved}:5"
    assert [second.dataset[i]["chosen_input_ids"] for i in range(5)] == [
        first.dataset[i]["chosen_input_ids"] for i in range(5)
    ]


def test_what_changes_the_tokens_changes_the_key(tmp_path: Path, calls: list[str]) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    changes: list[dict[str, Any]] = [
        {}, {"max_length": 127}, {"completion_mask": "final_turn"}, {"on_bad_row": "drop"},
        {"tokenizer": tiny_tokenizer("minimind3")},
    ]  # fmt: skip
    for number, change in enumerate(changes, 1):
        run(path, **change)
        assert len(calls) == 5 * number
    tiny_tokenizer()(["a", "b b b"], padding=True, truncation=True, max_length=2)  # leaves a state behind
    run(path)
    assert len(calls) == 5 * len(changes)
    write_jsonl(tmp_path / "f.jsonl", [*ROWS[:4], row("other")])
    run(path)
    assert len(calls) == 5 * len(changes) + 5


def test_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digest = run(write_jsonl(tmp_path / "a.jsonl", ROWS)).digest
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    assert run(str(tmp_path / "b.json")).digest == digest
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for name in ("b.parquet", "saved"):
        data = run(str(tmp_path / name))
        assert data.digest == digest and data.dataset[4]["place"] == f"{tmp_path / name}:row 5"
    halves = [write_jsonl(tmp_path / "c.jsonl", ROWS[:2]), write_jsonl(tmp_path / "d.jsonl", ROWS[2:])]
    data = run(halves)
    assert data.digest == digest and [data.dataset[i]["place"] for i in (1, 2)] == [f"{halves[0]}:2", f"{halves[1]}:1"]
    assert run(halves[::-1]).digest != digest
    assert run(write_jsonl(tmp_path / "e.jsonl", [item | {"weight": 1} for item in ROWS])).digest != digest
    final = run(str(tmp_path / "a.jsonl"), completion_mask="final_turn")
    assert final.digest == digest  # single turns: both policies count the same


BAD = [
    row("good"),
    b'{"broken',
    row("same", chosen="x", rejected="x"),
    b'{"chosen": "\xff"}',
    {"chosen": []},
    row("empty", rejected=""),
    {"chosen": [], "rejected": []},
    row("same", chosen="y", rejected="y"),
    {"chosen": [{"role": "narrator", "content": "q"}], "rejected": []},
    row("words " * 200),
]


def test_drop_counts_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", BAD)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.INFO, "minimind_dpo"):
            report = run(path, on_bad_row="drop").report
        assert (report.rows, report.kept) == (10, 1)
        assert report.dropped == {
            "identical_sides": 2, "broken_json": 1, "not_utf8": 1, "wrong_keys": 1, "empty_answer": 1,
            "empty_list": 1, "wrong_role": 1, "no_completion_token": 1,
        }  # fmt: skip
        assert report.examples["identical_sides"] == f"{path}:3" and report.examples["wrong_role"] == f"{path}:9"
        told = [record.getMessage() for record in caplog.records]
        assert told == [str(report)]
        assert told[0].startswith(f"kept 1 of 10 pairs; dropped 9: 2 identical_sides (first: {path}:3), 1 ")


def test_auto_fails_at_malformed_rows_only(tmp_path: Path) -> None:
    good = [item for item in BAD if item in (BAD[0], BAD[2], BAD[5], BAD[9])]
    report = run(write_jsonl(tmp_path / "good.jsonl", good)).report
    assert report.dropped == {"identical_sides": 1, "empty_answer": 1, "no_completion_token": 1}
    path = write_jsonl(tmp_path / "bad.jsonl", [*good, *BAD])
    with pytest.raises(RowError, match=rf"^{path}:6: broken JSON.*on_bad_row: drop"):
        run(path)


def test_fail_names_the_first_row_without_signal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [BAD[0], BAD[2], BAD[1]])
    with pytest.raises(RowError, match=rf"^{path}:2: both sides have the same tokens") as caught:
        run(path, on_bad_row="fail")
    assert caught.value.reason == "identical_sides"
    assert not list(cache.entry_path("x").parent.iterdir())  # nothing half-written is left behind


def test_no_usable_pair(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [BAD[2], BAD[5]])
    with pytest.raises(UserError, match=f"no usable pair in {path}: kept 0 of 2 pairs; dropped 2: 1 identical_sides"):
        run(path)
    with pytest.raises(UserError, match="kept 0 of 0 pairs"):
        run(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match="on_bad_row must be one of auto, fail, drop"):
        run(path, on_bad_row="ignore")


def test_any_number_of_processes_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ROWS_PER_BLOCK", 8)
    rows = [row(f"question {i}", chosen=f"yes {i}" if i % 7 else "", rejected="no") for i in range(100)]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    alone = run(path, num_proc=1)
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(tmp_path / "cache"))
    together = run(path, num_proc=2)
    assert together.report == alone.report and together.report.kept == 85
    assert together.digest == alone.digest
    assert list(together.dataset) == list(alone.dataset)
    assert [item["place"] for item in together.dataset][:2] == [f"{path}:2", f"{path}:3"]


def test_processes_report_the_first_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ROWS_PER_BLOCK", 4)
    path = write_jsonl(tmp_path / "f.jsonl", [*ROWS * 4, b"{", *ROWS, b"["])
    with pytest.raises(RowError, match=f"^{path}:21: broken JSON"):
        run(path, num_proc=2)


def test_writers_that_race_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    opened = cache.open_entry
    monkeypatch.setattr(cache, "open_entry", lambda path: opened(path) if path.exists() else None)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(path), range(8)))
    assert len({result.digest for result in results}) == 1
    assert [entry.name.startswith(".") for entry in cache.entry_path("x").parent.iterdir()] == [False]


def test_two_processes_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS * 30)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys; from minimind_dpo.data.tokenized import load_tokenizer, tokenize_files;"
        "print(tokenize_files(sys.argv[1], load_tokenizer(sys.argv[2]), max_length=99,"
        " completion_mask='final_turn', on_bad_row='auto').digest)"
    )
    command = [sys.executable, "-c", code, path, str(tmp_path / "tokenizer")]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [job.communicate(timeout=120)[0].strip() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert len(printed[0]) == 64 and printed[0] == printed[1]


DAMAGE: dict[str, Any] = {
    "cut": lambda entry: (entry / "pairs.arrow").write_bytes((entry / "pairs.arrow").read_bytes()[:-100]),
    "zeroed": lambda entry: (entry / "pairs.arrow").write_bytes(bytes((entry / "pairs.arrow").stat().st_size)),
    "no table": lambda entry: (entry / "pairs.arrow").unlink(),
    "no meta": lambda entry: (entry / "meta.json").unlink(),
    "a directory": lambda entry: ((entry / "meta.json").unlink(), (entry / "meta.json").mkdir()),
    "a file": lambda entry: (entry.rename(entry.with_name("moved")), entry.write_text("")),
    **{
        f"meta {text[:12]}": lambda entry, text=text: (entry / "meta.json").write_text(text)
        for text in ('{"dig', "[]", "{}", "3", "null", '{"checksum": 1, "value": []}', "[" * 100_000)
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_written_anew(
    tmp_path: Path, calls: list[str], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    digest = run(path).digest
    (entry,) = cache.entry_path("x").parent.iterdir()
    DAMAGE[damage](entry)
    assert run(path).digest == digest and len(calls) == 10
    assert [record.getMessage().count("is damaged") for record in caplog.records] == [1]
    assert run(path).digest == digest and len(calls) == 10


def test_an_entry_under_another_ones_name_is_not_taken(
    tmp_path: Path, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((ROWS[:2], ROWS[2:]))]
    digests = [run(path).digest for path in paths]
    one, other = cache.entry_path("x").parent.iterdir()
    swap = one.with_name("swap")
    for name, new in ((one, swap), (other, one), (swap, other)):
        name.rename(new)
    assert [run(path).digest for path in paths] == digests and len(calls) == 2 * len(ROWS)
    assert [record.getMessage().count("is damaged") for record in caplog.records] == [1, 1]
    assert [run(path).digest for path in paths] == digests and len(calls) == 2 * len(ROWS)


def test_a_file_that_gives_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", []), str(tmp_path / "c.json")]
    Path(paths[2]).write_text("[]")
    for _ in range(2):
        assert len(run(paths)) == 5
        assert caplog.records.pop().getMessage() == f"no pair comes from {paths[1]}, {paths[2]}"


def test_a_packed_name_is_other_content(tmp_path: Path) -> None:
    plain = Path(write_jsonl(tmp_path / "f.jsonl", ROWS))
    run(str(plain))
    packed = plain.rename(tmp_path / "f.jsonl.gz")
    with pytest.raises(UserError, match="f.jsonl.gz: damaged or cut gzip file"):
        run(str(packed))


def test_a_flipped_bit_is_noticed(tmp_path: Path, calls: list[str]) -> None:
    """Wherever in the table or the meta data: the pairs, and their digest, are those of before."""
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    first = run(path)
    pairs, rng = list(first.dataset), random.Random(0)
    (entry,) = cache.entry_path("x").parent.iterdir()
    for number in range(30):
        file = entry / rng.choice(["pairs.arrow", "meta.json"])
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        again = run(path)
        assert list(again.dataset) == pairs and (again.digest, again.report) == (first.digest, first.report), number
    assert len(calls) > 5 * 20


def test_what_others_made_is_read_or_passed_by(tmp_path: Path, calls: list[str], monkeypatch: Any) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    digest = run(path).digest
    (entry,) = cache.entry_path("x").parent.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert [file.stat().st_mode & 0o777 & umask for file in (entry, *entry.iterdir())] == [0, 0, 0]
    assert (entry / "pairs.arrow").stat().st_mode & 0o444 == 0o444 & ~umask
    access = os.access
    monkeypatch.setattr(os, "access", lambda name, mode: Path(name).parent != entry and access(name, mode))
    for _ in range(2):
        assert run(path).digest == digest and len(calls) == 10
    assert len(list(entry.parent.iterdir())) == 2


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc"])
def test_a_place_that_takes_no_cache_is_named(tmp_path: Path, monkeypatch: Any, place: str) -> None:
    (tmp_path / "x").touch()
    root = {"a file": tmp_path / "x", "below a file": tmp_path / "x" / "y"}.get(place, Path(place))
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(root))
    with pytest.raises(UserError, match=f"^MINIMIND_DPO_CACHE: cannot write to {root}"):
        run(write_jsonl(tmp_path / "f.jsonl", ROWS))


def test_a_full_disk_is_no_mistake_and_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        TrainingError, match=f"cannot write to {cache.entry_path('')}.*No space left.*MINIMIND_DPO_CACHE"
    ):
        run(write_jsonl(tmp_path / "f.jsonl", ROWS))
    assert list(cache.entry_path("x").parent.iterdir()) == []


def test_old_leftovers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    root = cache.entry_path("x").parent
    for name, age in (("old", 90_000), ("new", 60)):
        (root / f".{name}.partial").mkdir(parents=True)
        os.utime(root / f".{name}.partial", (time.time() - age,) * 2)
    run(write_jsonl(tmp_path / "f.jsonl", ROWS))
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == [".new.partial"]


MEMORY = """
import resource, sys, tokenizers
from minimind_dpo.data.tokenized import load_tokenizer, tokenize_files
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
options = dict(max_length=256, completion_mask="final_turn", on_bad_row="auto", num_proc=1)
tokenizer = load_tokenizer(sys.argv[1])
tokenize_files(sys.argv[2], tokenizer, **options)
before = peak()
assert len(tokenize_files(sys.argv[3], tokenizer, **options)) == 1500
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory in Linux's unit")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """A file of 60 MB needs hardly more memory than one of 10 MB."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    # The unknown column makes rows large without much to tokenize.
    line = json.dumps(row("question", chosen="yes", rejected="no", note="x" * 40_000))
    small, large = (write_jsonl(tmp_path / f"{n}.jsonl", [line] * n) for n in (256, 1500))
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "tokenizer"), small, large]
    grown = subprocess.run(code, capture_output=True, text=True, timeout=120, check=True).stdout
    assert Path(large).stat().st_size > 60e6
    assert int(grown) < 25
