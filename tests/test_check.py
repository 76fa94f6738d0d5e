"""`data check`: every kind of fault is found where it was planted, and nothing else is."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import FAMILIES, row, say, tiny_tokenizer, write_jsonl

import minimind_dpo.demo
from minimind_dpo.cli import main as cli
from minimind_dpo.data import processes
from minimind_dpo.data.checking.findings import PLACES, REASONS
from minimind_dpo.data.checking.repeats import find_leaks, find_repeats
from minimind_dpo.data.checking.report import as_json
from minimind_dpo.data.checking.rows import ROW, check_block
from minimind_dpo.data.checking.survey import Source, Survey
from minimind_dpo.data.drops import DroppedRow, tokenize_pair
from minimind_dpo.data.processes import Settings
from minimind_dpo.data.records import parse_row
from minimind_dpo.data.sources import DataFile
from minimind_dpo.data.tokenized import tokenize_files

LENGTH = 256
SHORT = ["Hi", "Thanks!", "How are you?", "Tell me a joke"]
WORDS = "the quick brown fox asks a question and the user answers hello there thank you".split()
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HIDING = (  # leaves out what has no words, such as a call
    "{% for m in messages if m.content %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clean_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as hh-rlhf has them: some turns, short prompts that come again, one prompt with several answers."""
    rng = random.Random(seed)

    def words(least: int = 3) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 12)))

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        turns = [f"{words(5)} {seed}-{len(rows)}-{turn}?" for turn in range(rng.choice([1, 1, 3, 5]))]
        if rng.random() < 0.2:
            turns = [rng.choice(SHORT)]
        best, middle, worst = (f"{words()} {seed}-{len(rows)}-{name}" for name in "abc")
        rows.append(row(*turns, chosen=best, rejected=worst))
        if rng.random() < 0.1:  # three answers in order: each pair of them, and a refusal that is everywhere
            rows.append(row(*turns, chosen=best, rejected=middle))
            rows.append(row(*turns, chosen=middle, rejected=worst))
            rows.append(row(*turns, chosen=best, rejected="no thank you"))
    return rows[:count]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def check(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with `--json`; exit code and object."""

    def run(*data: str, **flags: Any) -> tuple[int, Any]:
        given = {"tokenizer": tokenizer, "max_length": LENGTH, "completion_mask": "all_assistant"} | flags
        words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
        code = cli(["data", "check", "--data", *data, *words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def found(report: Any) -> dict[str, tuple[int, list[str]]]:
    return {finding["reason"]: (finding["count"], finding["places"]) for finding in report["findings"]}


def spaced(item: dict[str, Any]) -> dict[str, Any]:
    """A row with other white space between the words of its answers."""
    return {
        side: [*item[side][:-1], item[side][-1] | {"content": item[side][-1]["content"].replace(" ", " \n", 1)}]
        for side in ("chosen", "rejected")
    }


def plant(rows: list[Any]) -> dict[str, list[int]]:
    """Replaces rows by faulty ones; the lines (from 1) of each reason."""
    long = "question " * LENGTH
    faults: dict[str, list[Any]] = {
        "malformed_row": [b"{broken", b'{"chosen": "\xff"}', {"chosen": [], "rejected": []}, {"prompt": "q"}, b"[1]",
                          {"chosen": say("q", "a"), "rejected": say("q")}, row("q", weight=-1)],
        "identical_sides": [row("q1", chosen="x", rejected="x"), row(long, chosen="x", rejected="x")],
        "identical_after_truncation": [row("a", "b", long)],
        "empty_answer": [row("q2", chosen=" \n"), {"prompt": "q3", "chosen": "x", "rejected": ""},
                         row("q4", chosen="<think>\n\n</think>\n\n"), row("q5", rejected="\u200b\ufeff")],
        "empty_prompt": [{"prompt": " ", "chosen": "x", "rejected": "y"}],
        "repeats_prompt": [
            {"prompt": "what is the quick brown fox?", "chosen": "what is  the quick brown fox? A fox",
             "rejected": "what is the quick brown fox? a dog"},
            {"prompt": "q6", "chosen": "\n\nHuman: q6\n\nAssistant: x", "rejected": "y"},
            {"prompt": say("q7", "Well"), "chosen": "Well, so", "rejected": "Well, no"},
        ],
        "no_completion_token": [row(long), row(f"x {long}")],
        "prompt_differs": [
            {"chosen": say("the quick fox", "a"), "rejected": say("the quick fox ", "b")},
            {"chosen": say("system: be kind", "q", "a"), "rejected": say("q", "b")},
            {"chosen": say("q", "a", "go on", "b"), "rejected": say("q", "a", "go on!", "c")},
            {"chosen": say("q", "a", "go on", "b"), "rejected": say("q", "a")},
        ],
        "double_bos": [row("<|im_start|>user\nhello", chosen="d1"), row("q", chosen="<|im_start|>assistant\nd2")],
        "duplicate_pair": [rows[0], rows[1] | {"id": 7, "weight": 2.0}, rows[0], spaced(rows[4])],
        "contradictory_pair": [{"chosen": rows[at]["rejected"], "rejected": rows[at]["chosen"]} for at in (2, 3)],
    }  # fmt: skip
    lines = iter(random.Random(3).sample(range(20, len(rows)), sum(map(len, faults.values()))))
    planted = {}
    for reason, faulty in faults.items():
        taken = [next(lines) for _ in faulty]
        planted[reason] = sorted(line + 1 for line in taken)
        for line, item in zip(taken, faulty, strict=True):
            rows[line] = item
    planted["truncated"] = sorted(planted["no_completion_token"] + planted["identical_after_truncation"])
    return planted


def test_every_planted_fault_is_found_where_it_is_and_nothing_else(tmp_path: Path, check: Any) -> None:
    rows: list[Any] = clean_rows(300)
    planted = plant(rows)
    path, ledger = write_jsonl(tmp_path / "f.jsonl", rows), tmp_path / "found" / "ledger.jsonl"
    code, report = check(path, ledger=ledger)
    assert code == 1 and list(report) == ["rows", "kept", "findings", "lengths", "length_bias"]
    expected = {reason: (len(at), [f"{path}:{line}" for line in at][:PLACES]) for reason, at in planted.items()}
    assert found(report) == expected
    assert [finding["severity"] for finding in report["findings"]] == [
        REASONS[reason].severity for reason in REASONS if reason in planted
    ]
    written = [json.loads(line) for line in ledger.read_text("utf-8").splitlines()]
    assert sorted((line["reason"], line["place"]) for line in written) == sorted(
        (reason, f"{path}:{line}") for reason, at in planted.items() for line in at
    )
    assert all(list(line) == ["place", "reason", "severity", "detail"] and line["detail"] for line in written)
    # training leaves out the same rows for the same reasons
    trained = tokenize_files(
        path, tiny_tokenizer(), max_length=LENGTH, completion_mask="all_assistant", on_bad_row="drop"
    ).report
    assert (report["rows"], report["kept"]) == (trained.rows, trained.kept) == (300, 284)
    left_out = {"identical_sides", "identical_after_truncation", "empty_answer", "no_completion_token"}
    assert {reason: len(planted[reason]) for reason in left_out} == {r: trained.dropped[r] for r in left_out}
    assert sum(trained.dropped.values()) == sum(len(planted[reason]) for reason in (*left_out, "malformed_row"))


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_rows_are_clean(family: str, tmp_path: Path, check: Any) -> None:
    tiny_tokenizer(family).save_pretrained(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "f.jsonl", clean_rows(100))
    other = write_jsonl(tmp_path / "g.jsonl", clean_rows(100, seed=1))
    code, report = check(path, tokenizer=tmp_path / "tokenizer", eval_data=other, max_length=2048)
    assert (code, report["kept"], report["findings"], report["eval"]["findings"]) == (0, 100, [], [])


def test_the_demos_data_are_clean(check: Any) -> None:
    assets = Path(minimind_dpo.demo.__path__[0]) / "assets"
    code, report = check(
        str(assets / "train.jsonl"), eval_data=assets / "heldout.jsonl", tokenizer=assets / "tokenizer"
    )
    assert (code, report["rows"], report["kept"], report["eval"]["kept"]) == (0, 640, 640, 160)
    assert report["findings"] == report["eval"]["findings"] == []


def test_trajectories_are_no_fault(tmp_path: Path, check: Any) -> None:
    rows = [
        {"chosen": say("q", "a", "go on", "b"), "rejected": say("q", "c", "no, that's wrong", "d")},
        {"chosen": say("q", "a", "go on", "b"), "rejected": say("q", "c")},
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    code, report = check(path)
    assert (code, found(report)) == (0, {"parts_early": (2, [f"{path}:1", f"{path}:2"])})
    assert report["findings"][0]["severity"] == "info"


def save_tokenizer(path: Path, template: str, family: str = "minimind2") -> Path:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def test_a_template_without_end_tokens(tmp_path: Path, check: Any) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", clean_rows(21))
    code, report = check(path, tokenizer=save_tokenizer(tmp_path / "a", NO_END))
    places = [f"{path}:{line}" for line in range(1, PLACES + 1)]
    assert (code, report["kept"], found(report)) == (1, 21, {"missing_end_token": (21, places)})
    # the end token as letters is none, and one that only the earlier turns have ends no answer
    for end in ("{{ '</end>' }}", "{% if not loop.last %}<|im_end|>{% endif %}"):
        template = NO_END.replace("\n{% endfor", f"{end}\n{{% endfor")
        _, report = check(path, tokenizer=save_tokenizer(tmp_path / "b", template))
        assert found(report)["missing_end_token"][0] == 21


def test_a_template_that_begins_twice(tmp_path: Path, check: Any) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", clean_rows(21))
    template = "{{ bos_token }}" * 2 + NO_END.replace("\n{% endfor", "{{ eos_token }}\n{% endfor")
    code, report = check(path, tokenizer=save_tokenizer(tmp_path / "a", template, "mistral_v0.2"))
    assert (code, list(found(report)), found(report)["double_bos"][0]) == (1, ["double_bos"], 21)


def test_a_template_that_hides_turns(tmp_path: Path, check: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    hidden = {"chosen": [*say("q"), call], "rejected": say("q", "a")}
    path = write_jsonl(tmp_path / "f.jsonl", [*clean_rows(20), hidden])
    code, report = check(path, tokenizer=save_tokenizer(tmp_path / "a", HIDING))
    assert (code, report["kept"], found(report)) == (0, 20, {"template_hides_turns": (1, [f"{path}:21"])})


def test_a_templates_day_is_that_of_training(tmp_path: Path, check: Any) -> None:
    """A day that ends no answer with an end token would be found."""
    template = NO_END.replace("\n{% endfor", "{% if strftime_now('%Y') == '2031' %}<|im_end|>{% endif %}\n{% endfor")
    path, dated = write_jsonl(tmp_path / "f.jsonl", clean_rows(3)), save_tokenizer(tmp_path / "a", template)
    assert list(found(check(path, tokenizer=dated)[1])) == ["missing_end_token"]
    assert found(check(path, tokenizer=dated, template_date="2031-03-05")[1]) == {}


def test_plain_texts_without_a_template(tmp_path: Path, check: Any) -> None:
    tiny_tokenizer(None).save_pretrained(tmp_path / "a")
    rows = [{"prompt": f"<|im_start|>a question {i}", "chosen": "a", "rejected": "b"} for i in range(5)]
    path = write_jsonl(tmp_path / "f.jsonl", [*rows, rows[0] | {"chosen": "<|im_start|>x"}])
    code, report = check(path, tokenizer=tmp_path / "a")
    assert (code, report["kept"], found(report)) == (1, 6, {"double_bos": (1, [f"{path}:6"])})


def test_leaks(tmp_path: Path, check: Any) -> None:
    train, held = clean_rows(60), clean_rows(30, seed=1)
    held[3] = train[10] | {"id": 1}
    held[4] = {"chosen": train[20]["rejected"], "rejected": train[20]["chosen"]}
    train[30] = row("a question that is long enough", "a", "and   goes on", chosen="x", rejected="y")
    held[5] = row("a question that is long enough ", "a", "and goes on", chosen="other", rejected="answers")
    train[31], held[6] = row("你好，今天天气怎么样呢？", chosen="x"), row("你好，今天天气怎么样呢？", chosen="y")
    train[32], held[7] = row("Hi", chosen="a"), row("Hi", chosen="b")
    train[33], held[8] = row("system: be kind", "a question with a system", chosen="x"), row("a question with a system")
    path, other = write_jsonl(tmp_path / "f.jsonl", train), write_jsonl(tmp_path / "g.jsonl", held)
    ledger = tmp_path / "ledger.jsonl"
    code, report = check(path, eval_data=other, ledger=ledger)
    assert code == 1
    same_prompt = [at for at in range(60) if train[at]["chosen"][:-1] == train[10]["chosen"][:-1] and at != 10]
    assert not same_prompt, "the row's prompt is meant to be its own"
    assert found(report) == {"leak_into_eval": (5, [f"{path}:{line}" for line in (11, 21, 31, 32, 34)])}
    details = [json.loads(line)["detail"] for line in ledger.read_text("utf-8").splitlines()]
    assert details == [f"in the evaluation data, too: {other}:{line}" for line in (4, 5, 6, 7, 9)]


def test_sources_are_told_apart(tmp_path: Path, check: Any) -> None:
    rows = clean_rows(40)
    first = write_jsonl(tmp_path / "a.jsonl", [*rows[:20], b"{"])
    pq.write_table(pa.Table.from_pylist([*rows[20:], rows[0]]), tmp_path / "b.parquet")
    second = str(tmp_path / "b.parquet")
    code, report = check(first, second)
    assert (code, report["rows"], report["kept"]) == (1, 42, 41)
    assert found(report) == {"malformed_row": (1, [f"{first}:21"]), "duplicate_pair": (1, [f"{second}:row 21"])}
    one, two = report["sources"]
    assert (one["source"], one["rows"], one["kept"], list(found(one))) == (first, 21, 20, ["malformed_row"])
    assert (two["source"], two["rows"], two["kept"], list(found(two))) == (second, 21, 21, ["duplicate_pair"])
    assert one["lengths"]["longer_side"] != two["lengths"]["longer_side"]


def test_a_damaged_file_is_a_finding(tmp_path: Path, check: Any) -> None:
    path = tmp_path / "f.json"
    path.write_text("[\n" + ",\n".join(json.dumps(item) for item in clean_rows(3)) + ",\n{\n")
    code, report = check(str(path))
    assert (code, report["rows"], report["kept"]) == (1, 4, 3)
    assert found(report) == {"malformed_row": (1, [f"{path}:5"])}


def test_details_are_short(tmp_path: Path, check: Any) -> None:
    refused = [{"key\n" * 999: 1}, {"k" * 999: 1}]
    path = write_jsonl(tmp_path / "f.jsonl", [*clean_rows(3), *refused])
    check(path, ledger=tmp_path / "l.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [len(line["detail"]) for line in lines] == [300, 300]
    assert all(line["detail"].startswith("found the keys k") and "\n" not in line["detail"] for line in lines)


def test_a_file_that_cannot_be_read_is_no_finding(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Any) -> Any:
        raise PermissionError(13, "Permission denied", file.name)

    monkeypatch.setattr("minimind_dpo.data.checking.survey.read_rows", refused)
    path = write_jsonl(tmp_path / "f.jsonl", clean_rows(2))
    assert cli(["data", "check", "--data", path, "--tokenizer", tokenizer]) == 2
    assert f"{path}: can't be read: [Errno 13] Permission denied" in capsys.readouterr().err


def test_nothing_is_kept(tmp_path: Path, check: Any) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [row("q", chosen="x", rejected="x")])
    code, report = check(path)
    assert code == 1 and found(report)["no_usable_pair"] == (1, [path]) and report["length_bias"] is None
    assert check(write_jsonl(tmp_path / "g.jsonl", []))[0] == 1


def test_lengths_and_bias(tmp_path: Path, check: Any) -> None:
    rows = [row("q", chosen="a " * count, rejected="a " * 9 + "b") for count in (2, 5, 20, 300)]
    _, report = check(write_jsonl(tmp_path / "f.jsonl", rows))
    assert report["length_bias"] == 0.5
    lengths = report["lengths"]
    assert [cut["max_length"] for cut in lengths["table"]] == [128, 256, 512, 768, 1024, 2048]
    tokens = tiny_tokenizer()
    longest = len(tokens.apply_chat_template(rows[3]["chosen"], tokenize=True, return_dict=False))
    prompt = len(tokens.apply_chat_template(say("q"), tokenize=True, return_dict=False, add_generation_prompt=True))
    assert lengths["longer_side"]["longest"] == longest and lengths["prompt"]["longest"] == prompt
    assert lengths["chosen"]["longest"] == longest - prompt
    assert lengths["table"][0] == {"max_length": 128, "truncated": 0.25, "dropped": 0.0}


@pytest.mark.parametrize("mask", ["all_assistant", "final_turn"])
def test_the_table_says_what_training_would_leave_out(mask: str) -> None:
    rows = [*clean_rows(60), {"chosen": say("q", "a b c"), "rejected": say("q", "a b c", "d", "e")}]
    tokenizer = tiny_tokenizer()
    block = [(0, at, f"f:{at}", item) for at, item in enumerate(rows)]
    needs = check_block(block, tokenizer, Settings(4096, mask, "drop")).rows["needs"]
    assert len(needs) == len(rows)
    for length in (8, 20, 30, 40, 55, 70):
        kept = [
            not isinstance(
                tokenize_pair(parse_row(item, "f:1"), tokenizer, max_length=length, completion_mask=mask), DroppedRow
            )
            for item in rows
        ]
        assert (needs <= length).tolist() == kept


def test_any_number_of_processes_gives_the_same(tmp_path: Path, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ROWS_PER_BLOCK", 8)
    rows: list[Any] = clean_rows(200)
    plant(rows)
    path, held = write_jsonl(tmp_path / "f.jsonl", rows), write_jsonl(tmp_path / "g.jsonl", rows[:20])
    ledgers = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    alone = check(path, eval_data=held, num_proc=1, ledger=ledgers[0])
    assert check(path, eval_data=held, num_proc=2, ledger=ledgers[1]) == alone
    assert ledgers[0].read_bytes() == ledgers[1].read_bytes()


def table(sides: Any, prompts: Any = 0) -> np.ndarray:
    keys = np.asarray(sides, dtype=np.uint64).reshape(-1, 2)
    rows = np.zeros(len(keys), ROW)
    rows["chosen_key"], rows["rejected_key"] = keys.T
    rows["prompt_key"] = prompts
    return rows


def test_repeats_are_those_of_looking_at_every_earlier_row() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sides = [rng.sample(range(4), 2) for _ in range(rng.randint(0, 15))]
        expected = []
        for at, (chosen, rejected) in enumerate(sides):
            for reason, wanted in (("duplicate_pair", [chosen, rejected]), ("contradictory_pair", [rejected, chosen])):
                if wanted in sides[:at]:
                    expected.append((at, reason, sides.index(wanted)))
        assert list(find_repeats(table(sides))) == expected


def test_leaks_are_those_of_looking_at_every_row() -> None:
    train = table([[1, 2], [3, 4], [5, 6], [7, 8], [1, 5]], [0, 9, 0, 11, 0])
    held = table([[2, 1], [21, 22], [1, 4], [1, 6]], [0, 9, 0, 0])
    assert list(find_leaks(train, held)) == [(0, "leak_into_eval", 0), (1, "leak_into_eval", 1)]
    assert list(find_leaks(train, table([]))) == list(find_leaks(table([]), held)) == []


def test_a_million_rows_are_compared_in_little_memory() -> None:
    """60 MB are held of 10^6 rows; a copy of those kept and their comparison take up to 160 MB more."""
    count = 1_000_000
    rows = table(np.arange(2 * count, dtype=np.uint64))
    rows[-1] = rows[0]
    assert rows.nbytes == 60 * count
    source = Source("f.jsonl", rows=count)
    found = Survey([source], [DataFile("f.jsonl", "jsonl")], np.zeros(1, int), LENGTH, pairs=rows)
    tracemalloc.start()
    assert list(find_repeats(found.kept())) == [(count - 1, "duplicate_pair", 0)]
    assert list(find_leaks(found.kept(), found.kept()[:9])) == [
        *((at, "leak_into_eval", at) for at in range(9)),
        (count - 1, "leak_into_eval", 0),
    ]
    assert as_json(found)["kept"] == count
    assert tracemalloc.get_traced_memory()[1] < 160e6
    tracemalloc.stop()


def test_the_page(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clean_rows(50)
    path = write_jsonl(tmp_path / "f.jsonl", [*rows, b"{", rows[0], b"{"])
    assert cli(["data", "check", "--data", path, "--tokenizer", tokenizer]) == 1
    page = capsys.readouterr().out
    assert page.startswith(f"{path}: 51 of 53 rows are kept by training\n\nerror    malformed_row")
    assert f"2    3.77%  {path}:51, {path}:53\n         broken JSON" in page
    assert (
        f"warning  duplicate_pair                      1    1.89%  {path}:52\n         the same as {path}:1\n" in page
    )
    assert "\n1024 * " in page and page.endswith("\nNOT FIT: malformed_row must be mended first.\n")
    assert cli(["data", "check", "--data", write_jsonl(tmp_path / "g.jsonl", rows), "--tokenizer", tokenizer]) == 0
    assert capsys.readouterr().out.endswith("\nFIT: nothing was found that training should not see.\n")


def test_the_page_of_several_sources(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_jsonl(
        tmp_path / "f.jsonl", [row("q", chosen="a longer answer"), row("p", chosen="a", rejected="b c d")]
    )
    two = write_jsonl(tmp_path / "g.jsonl", [b"{"])
    assert cli(["data", "check", "--data", one, two, "--tokenizer", tokenizer, "--eval_data", one]) == 1
    page = capsys.readouterr().out
    assert f"{one}: 2 of 2 kept; 2 leak_into_eval; tokens a side: median" in page and "chosen longer in 50.0%\n" in page
    assert f"\n{two}: 0 of 1 kept; 1 malformed_row\n" in page
    assert f"Evaluation data\n\n{one}: 2 of 2 rows are kept by training; nothing is wrong with them\n" in page
    assert page.endswith("\nNOT FIT: malformed_row, leak_into_eval must be mended first.\n")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--max_length", "1"], "max_length must be at least 2"),
        (["--ledger", "."], "a directory; --ledger names the file"),
        (["--ledger", "/dev/null/x"], "--ledger: cannot write to /dev/null"),
        (["--completion_mask", "none"], "invalid choice"),
        (["--eval_data", "absent.jsonl"], "absent.jsonl: no such file"),
    ],
)
def test_wrong_usage(
    flags: list[str], message: str, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "check", "--data", write_jsonl(tmp_path / "f.jsonl", clean_rows(2)), "--tokenizer", tokenizer]
    try:
        assert cli([*argv, *flags]) == 2
    except SystemExit as stopped:  # argparse's own way
        assert stopped.code == 2
    assert message in capsys.readouterr().err
