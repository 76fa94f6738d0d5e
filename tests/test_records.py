from __future__ import annotations

import gzip
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_data import row, say, write_jsonl

from minimind_dpo.data import records, rows
from minimind_dpo.data.records import PreferencePair, RowError, parse_line, parse_row
from minimind_dpo.data.sources import count_rows, find_files, read_rows
from minimind_dpo.errors import UserError


def test_implicit_prompt() -> None:
    pair = parse_row(row("a", "b", "c", chosen="yes", rejected="no"), "f.jsonl:7")
    assert pair.chosen == say("a", "b", "c", "yes")
    assert pair.rejected == say("a", "b", "c", "no")
    assert (pair.prompt_messages, pair.place, pair.weight, pair.margin, pair.id, pair.plain) == (
        3, "f.jsonl:7", 1.0, None, None, False)  # fmt: skip


def test_explicit_prompt_equals_implicit() -> None:
    explicit = {"prompt": say("a", "b", "c"), "chosen": say("assistant: yes"), "rejected": say("assistant: no")}
    assert parse_row(explicit, "x") == parse_row(row("a", "b", "c", chosen="yes", rejected="no"), "x")


def test_plain_text_is_a_user_and_an_assistant_message() -> None:
    pair = parse_row({"prompt": "a", "chosen": "yes", "rejected": "no"}, "x")
    assert pair == PreferencePair(say("a", "yes"), say("a", "no"), 1, "x", plain=True)


def test_message_prefix_leaves_each_side_its_last_message() -> None:
    assert parse_row(row("a", chosen="same", rejected="same"), "x").prompt_messages == 1
    longer = {"chosen": say("a", "b"), "rejected": say("a", "b", "c", "d")}
    assert parse_row(longer, "x").prompt_messages == 1
    differs = {"chosen": say("a", "b", "c", "d"), "rejected": say("a", "B", "c", "d")}
    assert parse_row(differs, "x").prompt_messages == 1


def test_absent_fields_of_arrow_rows_are_stripped() -> None:
    empty = {"tool_calls": None, "reasoning_content": None}
    given_row = row("a") | {"tools": None, "weight": None, "prompt": None}
    given_row["chosen"] = [message | empty for message in given_row["chosen"]]
    assert parse_row(given_row, "x") == parse_row(row("a"), "x")


def test_tools_and_calls_as_json_text() -> None:
    call, tool = {"function": {"name": "f", "arguments": {}}}, {"type": "function", "function": {"name": "f"}}
    talk = say("system: s", "q", "assistant: ", "tool: 3", "assistant: three")
    talk[0]["tools"], talk[2]["tool_calls"], talk[4]["tool_calls"] = json.dumps([tool]), json.dumps([call]), ""
    pair = parse_row({"chosen": talk, "rejected": [*talk[:-1], *say("assistant: four")]}, "x")
    assert pair.tools == [tool]
    assert pair.chosen[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert pair.chosen[4] == {"role": "assistant", "content": "three"} and "tools" not in pair.chosen[0]
    for tools in ([tool], json.dumps([tool])):
        assert parse_row(row("q", tools=tools), "x").tools == [tool]
    bare = {"chosen": [*say("q"), {"role": "assistant", "tool_calls": [call]}], "rejected": say("q", "no")}
    assert parse_row(bare, "x").chosen[1] == {"role": "assistant", "content": None, "tool_calls": [call]}


MESSAGE = say("q", "a")


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"deeper": value}
    return value


def calling(calls: Any) -> list[dict[str, Any]]:
    return [MESSAGE[0], {"role": "assistant", "content": "", "tool_calls": calls}]


def parts(*content: Any) -> list[dict[str, Any]]:
    made = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": made}, MESSAGE[1]]


BAD_ROWS: list[tuple[Any, str, str]] = [
    (3, "wrong_type", "a row must be an object"),
    ({"chosen": MESSAGE}, "wrong_keys", "found the keys chosen; accepted rows"),
    ({"conversations": []}, "wrong_keys", "found the keys conversations; accepted rows"),
    ({"chosen": "a", "rejected": "b"}, "wrong_keys", "need a prompt"),
    ({"chosen": "a", "rejected": MESSAGE}, "wrong_type", "a text and a list"),
    ({"prompt": 5, "chosen": MESSAGE, "rejected": MESSAGE}, "wrong_type", "prompt must be a text or a list"),
    ({"chosen": [], "rejected": MESSAGE}, "empty_list", "chosen is an empty list"),
    ({"prompt": [], "chosen": MESSAGE, "rejected": MESSAGE}, "empty_list", "prompt is an empty list"),
    ({"chosen": MESSAGE, "rejected": MESSAGE[:1]}, "wrong_role", "rejected must end with an assistant message"),
    ({"chosen": MESSAGE, "rejected": ["q", "a"]}, "wrong_type", r"rejected\[0\] must be"),
    ({"chosen": [{"content": "q"}], "rejected": MESSAGE}, "wrong_keys", r"chosen\[0\] has no role"),
    (
        {"chosen": [{"role": "narrator", "content": "q"}], "rejected": MESSAGE},
        "wrong_role",
        "role 'narrator'; roles are",
    ),
    ({"chosen": [{"role": "user"}], "rejected": MESSAGE}, "wrong_type", r"chosen\[0\] must be a text, not nothing"),
    (
        {"chosen": [{"role": "user", "content": [{}]}], "rejected": MESSAGE},
        "wrong_keys",
        r"chosen\[0\].content\[0\] must be",
    ),
    (row("q", weight=-1), "wrong_weight", "weight must be a finite number, at least 0, not -1"),
    (row("q", weight="1"), "wrong_weight", "weight must be"),
    (row("q", weight=True), "wrong_weight", "weight must be"),
    (row("q", margin=float("nan")), "wrong_margin", "margin must be a finite number, not nan"),
    (row("q", weight=10**400), "wrong_weight", "weight must be"),
    (row("q", margin=-(10**400)), "wrong_margin", "margin must be"),
    (row("q", id="\ud800"), "not_utf8", "id holds half"),
    (row("q", tools="[" * 200_000), "broken_json", "tools is not JSON: nested too deep"),
    (row("q", tools='[{"name": 1, "name": 2}]'), "broken_json", "the key 'name' stands twice"),
    (row("q", tools='[{"name": "\\ud800"}]'), "not_utf8", "tools holds half a surrogate pair"),
    (row("q", tools=[nested(200)]), "broken_json", "tools: nested more than 100 levels deep"),
    (row("q", tools=[{"name": "\udfff"}]), "not_utf8", "tools holds half"),
    ({"chosen": calling("[" * 200_000), "rejected": MESSAGE}, "broken_json", "tool_calls is not JSON: nested too"),
    ({"chosen": calling([nested(150)]), "rejected": MESSAGE}, "broken_json", r"chosen\[1\].tool_calls: nested more"),
    ({"chosen": calling([{"arguments": {"\ud800": 1}}]), "rejected": MESSAGE}, "not_utf8", "tool_calls holds half"),
    (row("q", images=["a.png"]), "not_text", "images: only text"),
    (row("q", image="a.png"), "not_text", "image: only text"),
    (row("q", videos=["a.mp4"]), "not_text", "videos: only text"),
    (row("q", audio={"path": "a.wav"}), "not_text", "audio: only text"),
    ({"chosen": parts("q", {"type": "image"}), "rejected": MESSAGE}, "not_text", "is of the type 'image'"),
    (
        {"chosen": parts("q", {"type": "image_url", "image_url": {"url": "x"}}), "rejected": MESSAGE},
        "not_text",
        "image",
    ),
    ({"chosen": [MESSAGE[0] | {"images": ["x"]}, MESSAGE[1]], "rejected": MESSAGE}, "not_text", "images: only text"),
    (row("q", image_path="a.png"), "not_text", "image_path: only text"),
    (row("q", image_url="http://a"), "not_text", "image_url: only text"),
    (row("q", Audio_Files=["a.wav"]), "not_text", "Audio_Files: only text"),
    (row("q", system="a", system_prompt="b"), "wrong_keys", "system and system_prompt differ"),
    (row("q", weight=1e39), "wrong_weight", "weight must be a number that fp32 can hold"),
    (row("q", margin=-3.5e38), "wrong_margin", "margin must be a number that fp32 can hold"),
    (row("q", id=1.5), "wrong_type", "id must be"),
    (row("q", tools=[1]), "wrong_type", "tools must be"),
    (row("q", tools="{"), "broken_json", "tools is not JSON"),
]


@pytest.mark.parametrize("bad, reason, message", BAD_ROWS)
def test_bad_rows_name_place_and_reason(bad: Any, reason: str, message: str) -> None:
    with pytest.raises(RowError, match=f"^f.jsonl:17: .*{message}") as caught:
        parse_row(bad, "f.jsonl:17")
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"chosen": ', "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"chosen": NaN}', "broken_json"),
        (b'{"chosen": "a", "chosen": "b"}', "broken_json"),
        (b'{"chosen": [{"role": "user", "content": "q", "content": "r"}]}', "broken_json"),
        (b'{"id": "\\ud800"}', "not_utf8"),
        (b'{"chosen": "\\udc00\\ud83d"}', "not_utf8"),
        (b'{"id": ' + b"9" * 5000 + b"}", "broken_json"),
        (b'{"a": 1} {"b": 2}', "broken_json"),
        (b'{"chosen": "\xff"}', "not_utf8"),
        ('{"chosen": 1}'.encode("utf-16"), "not_utf8"),
    ],
)
def test_broken_lines(line: bytes, reason: str) -> None:
    with pytest.raises(RowError, match="^f:2: ") as caught:
        parse_line(line, "f:2")
    assert caught.value.reason == reason


def test_unknown_columns_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    records._noticed_columns.clear()
    with caplog.at_level(logging.WARNING, "minimind_dpo"):
        for _ in range(3):
            parse_row(row("q", score=1, source="web"), "f:1")
    assert [record.getMessage() for record in caplog.records] == [
        "ignoring unknown columns: score, source (first seen at f:1)"
    ]


ROWS = [row(f"question {i}", chosen=f"yes {i} 你好", rejected=f"no\n{i}") for i in range(600)]


def pairs(source: Any) -> list[PreferencePair]:
    return [parse_line(payload, file.place(row)) for file in find_files(source) for row, payload in read_rows(file)]


def places(source: Any) -> list[str]:
    return [pair.place for pair in pairs(source)]


def questions(source: Any) -> list[str]:
    return [pair.chosen[0]["content"] for pair in pairs(source)]


EXPECTED = [f"question {i}" for i in range(600)]


def test_jsonl_with_bom_and_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps(item) for item in ROWS[:3]]
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\n  \n{lines[1]}\n{lines[2]}".encode())
    assert places(str(path)) == [f"{path}:1", f"{path}:4", f"{path}:5"]
    assert questions(str(path)) == EXPECTED[:3]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("read", [7, 1 << 18])
def test_json_array_is_streamed(tmp_path: Path, indent: int | None, read: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "_READ_CHARACTERS", read)
    monkeypatch.setattr(rows._more, "__defaults__", (read,))
    path = tmp_path / "f.json"
    text = json.dumps(ROWS[:40], indent=indent, ensure_ascii=False)
    path.write_text("\ufeff \n" + text + "\n", encoding="utf-8")
    assert questions(str(path)) == EXPECTED[:40]
    lines = ("\n" + text).split("\n")
    starts = [i for i, line in enumerate(lines, 1) if line == "  {"] if indent else [2] * 40
    assert places(str(path)) == [f"{path}:{line}" for line in starts]


def test_json_file_of_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.json", ROWS[:5])
    assert questions(path) == EXPECTED[:5]


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1}', r"f.json:1: the file ends before its closing \]"),
        ('[\n{"a": 1},\n{"b": "}]', "f.json:3: broken JSON: the row that begins here is not closed"),
        ('[{"a": 1}]\n[{"b": 2}, {"c": 3}]', r"f.json:2: found '\[' after the closing \]"),
        ('[{"a": 1}]\n\n{"b": 2}', r"f.json:3: found '\{' after the closing \]"),
        ('[{"a": 1}] and so on', "f.json:1: found 'a' after the closing"),
        ('[{"a": 1}]' + " " * (1 << 19) + "x", "f.json:1: found 'x' after the closing"),
        ("[]]", "f.json:1: found ']' after the closing"),
        ('[{"a": 1} {"b": 2}]', r"f.json:1: found '\{' where one of ',\]' must stand"),
        ('[{"a": 1}\n,]', r"f.json:2: found '\]'"),
        ("[\n1, 2]", "f.json:2: found '1'"),
    ],
)
def test_broken_arrays(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_rows(find_files(str(path))[0]))


def test_a_broken_row_of_an_array_is_a_bad_row_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    deep = "[" * 200_000 + "]" * 200_000
    path.write_text('[{"a": 1, "a": 2},\n{"b": "x" "y"},\n{"c": ' + deep + '},\n{"d": "}]\\""}\n]')
    (file,) = find_files(str(path))
    found = list(read_rows(file))
    assert [(line, payload[:5]) for line, payload in found] == [
        (1, b'{"a":'), (2, b'{"b":'), (3, b'{"c":'), (4, b'{"d":')
    ]  # fmt: skip
    for line, payload in found[:3]:
        with pytest.raises(RowError, match=f"f.json:{line}: broken JSON"):
            parse_line(payload, file.place(line))


def test_array_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(UserError, match="f.json: not UTF-8"):
        list(read_rows(find_files(str(tmp_path / "f.json"))[0]))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert questions(str(path)) == EXPECTED
    assert places(str(path))[:2] == [f"{path}:row 1", f"{path}:row 2"]
    assert count_rows(find_files(str(path))[0]) == 600
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="bad.parquet: can't be read as parquet"):
        places(str(tmp_path / "bad.parquet"))


def test_directory_saved_by_datasets(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS[:5])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "other"))
    for name in ("one", "split"):
        assert questions(str(tmp_path / name)) == EXPECTED[:5]
        assert places(str(tmp_path / name))[0] == f"{tmp_path / name}:row 1"
    with pytest.raises(UserError, match="no split 'train', only test"):
        places(str(tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a directory saved by datasets"):
        places(str(tmp_path / "empty"))


def test_a_saved_picture_is_refused_unopened(tmp_path: Path) -> None:
    columns = {"prompt": ["q", "r"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    pictures = [{"bytes": b"no picture", "path": None}, None]
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"image": datasets.Image()})
    datasets.Dataset.from_dict(columns | {"image": pictures}, features=features).save_to_disk(str(tmp_path / "d"))
    (file,) = find_files(str(tmp_path / "d"))
    (_, first), (_, second) = read_rows(file)
    with pytest.raises(RowError, match="x: image: only text"):
        parse_line(first, "x")
    assert parse_line(second, "x").chosen == say("r", "b")
    (tmp_path / "d" / "state.json").write_text("[]")
    with pytest.raises(UserError, match="d: can't be read as a saved data set"):
        find_files(str(tmp_path / "d"))


def test_lists_and_globs_keep_their_order(tmp_path: Path) -> None:
    for name, item in zip("bac", ROWS, strict=False):
        write_jsonl(tmp_path / f"{name}.jsonl", [item])
    assert questions(str(tmp_path / "*.jsonl")) == [EXPECTED[1], EXPECTED[0], EXPECTED[2]]
    assert questions([str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].jsonl")]) == [EXPECTED[i] for i in (2, 1, 0)]


def test_splits_and_folders(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict(train=data, test_prefs=data.select([1])).save_to_disk(str(tmp_path / "split"))
    assert questions(f"{tmp_path}/split:test_prefs") == EXPECTED[1:2]
    assert places(f"{tmp_path}/split:test_prefs") == [f"{tmp_path}/split:test_prefs:row 1"]
    with pytest.raises(UserError, match="no split 'dev', only train, test_prefs"):
        places(f"{tmp_path}/split:dev")
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    for number in (1, 0):
        table = pa.Table.from_pylist(ROWS[number : number + 1])
        pq.write_table(table, folder / "data" / f"train-0000{number}-of-00002.parquet")
    assert questions(str(folder)) == EXPECTED[:2]
    pq.write_table(pa.Table.from_pylist(ROWS[5:6]), folder / "data" / "test-00000.parquet")
    with pytest.raises(UserError, match="folder: holds the splits test, train; name one"):
        places(str(folder))
    assert questions(f"{folder}:train") == EXPECTED[:2]
    assert questions(f"{folder}:test") == EXPECTED[5:6]
    write_jsonl(folder / "data" / "train.jsonl", ROWS[:2])
    with pytest.raises(UserError, match="folder: holds files of several kinds"):
        places(f"{folder}:train")


@pytest.mark.parametrize(
    "names, message",
    [
        (["default/test/0000.jsonl", "default/train/0000.jsonl"], "holds the splits test, train"),
        (["heldout.jsonl", "train.jsonl"], "holds the splits heldout, train"),
        (["dpo_test.jsonl", "dpo_train.jsonl"], "holds the splits test, train"),
        (["dpo-Evaluation.jsonl", "trainset.jsonl"], "holds the splits evaluation, train"),
        (["more.jsonl", "train.jsonl"], "holds the split train, and more.jsonl, which names none"),
    ],
)
def test_splits_in_any_name(tmp_path: Path, names: list[str], message: str) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [ROWS[number]])
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path))
    assert questions(f"{tmp_path}:train") == [EXPECTED[1]]
    assert questions(str(tmp_path / names[0])) == [EXPECTED[0]]


def test_words_that_name_no_split(tmp_path: Path) -> None:
    for number, name in enumerate(["contest", "latest", "strain", "vale"]):
        write_jsonl(tmp_path / f"{name}.jsonl", [ROWS[number]])
    assert questions(str(tmp_path)) == EXPECTED[:4]


def test_what_lies_deeper_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(["train.jsonl", "more/train2.jsonl", ".cache/train.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [ROWS[number]])
    for source in (str(tmp_path), f"{tmp_path}:train"):
        assert questions(source) == EXPECTED[:1]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "not the 1 in folders of it (first: more/train2.jsonl)" in told


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.json.gz"])
def test_packed_files(tmp_path: Path, name: str) -> None:
    text = "\n".join(map(json.dumps, ROWS)) if "jsonl" in name else json.dumps(ROWS)
    packed = gzip.compress(text.encode())
    path = tmp_path / name
    path.write_bytes(packed)
    assert questions(str(path)) == EXPECTED
    assert places(str(path))[1] == f"{path}:{2 if 'jsonl' in name else 1}"
    for damaged in (packed[:-200], packed[:200] + b"\0" * 50 + packed[250:], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: damaged or cut gzip file"):
            places(str(path))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('\ufeffprompt,chosen,rejected,weight\n"why,\nso?",yes,no,0.5\na,b,c,\na,b\n', encoding="utf-8")
    (file,) = find_files(str(path))
    rows = [(file.place(row), payload) for row, payload in read_rows(file)]
    first, second = (parse_line(payload, place) for place, payload in rows[:2])
    assert (first.chosen, first.weight, first.place) == (say("why,\nso?", "yes"), 0.5, f"{path}:row 1")
    assert (second.chosen, second.weight) == (say("a", "b"), 1.0)
    with pytest.raises(RowError, match="f.csv:row 3: 2 fields under 4 names"):
        parse_line(rows[2][1], rows[2][0])


def test_fields_that_no_name_or_two_names_have(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("prompt,chosen,rejected,,\nq,yes,no,,\nwhy, so,yes,no,,\nr,yes,no,,\n")
    (file,) = find_files(str(path))
    payloads = dict(read_rows(file))
    assert parse_line(payloads[1], "x").chosen == say("q", "yes") and parse_line(payloads[3], "x").plain
    with pytest.raises(RowError, match="f.csv:row 2: 6 fields under 5 names"):
        parse_line(payloads[2], "x")
    path.write_text("prompt,chosen,rejected,chosen\nq,yes,no,maybe\n")
    with pytest.raises(UserError, match="f.csv: has several columns 'chosen'"):
        places(str(path))
    table = pa.table([["q"], ["yes"], ["no"], ["maybe"]], names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "f.parquet")
    with pytest.raises(UserError, match="f.parquet: has several columns 'chosen'"):
        places(str(tmp_path / "f.parquet"))


def test_parquet_of_json_text(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    given = row("q", tools=[tool])
    path = tmp_path / "f.parquet"
    pq.write_table(pa.Table.from_pylist([{key: json.dumps(value) for key, value in given.items()}]), path)
    assert pairs(str(path)) == [parse_row(given, f"{path}:row 1")]
    other = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"b": {"enum": [1]}}}}}
    unlike = [given, row("r", tools=[other])]
    pq.write_table(pa.Table.from_pylist(unlike), path)
    assert pairs(str(path)) == [parse_row(item, f"{path}:row {i}") for i, item in enumerate(unlike, 1)]


def test_parts_of_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **given: str) -> Any:
        asked.append((path, given))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("a/b:train_prefs", "a/b@v1.0", "a/b/tiny", "a/b/tiny@refs/pr/1:test"):
        assert places(name) == [f"{name}:row 1"]
    assert asked == [
        ("a/b", {"split": "train_prefs"}),
        ("a/b", {"split": "train", "revision": "v1.0"}),
        ("a/b", {"split": "train", "name": "tiny"}),
        ("a/b", {"split": "test", "name": "tiny", "revision": "refs/pr/1"}),
    ]


def test_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        if name != "owner/pairs":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list(ROWS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert places("owner/pairs") == ["owner/pairs:row 1", "owner/pairs:row 2"]
    with pytest.raises(UserError, match="owner/absent: no such file .* as a hub data set .* offline"):
        places("owner/absent")
    assert asked == [("owner/pairs", "train"), ("owner/absent", "train")]


@pytest.mark.parametrize(
    "source, message",
    [
        ("absent.jsonl", "absent.jsonl: no such file or directory"),
        ("data/absent.jsonl", "no such file or directory"),
        ("./owner/name", "no such file or directory"),
        ("tests/absent", "no such file or directory"),
        ("absent-*.jsonl", "no file matches this pattern"),
        ([], "no data given"),
        (__file__, r"unknown kind of file '\.py'"),
    ],
)
def test_sources_that_are_not_there(source: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UserError, match=message):
        find_files(source)


def test_pair_is_a_value() -> None:
    assert parse_row(row("a"), "x") == parse_row(row("a"), "x")
    assert isinstance(pickle.loads(pickle.dumps(parse_row(row("a"), "x"))), PreferencePair)


@pytest.mark.parametrize("prompt", ["why?", [{"role": "user", "content": "why?"}]])
@pytest.mark.parametrize("repeated", [True, False])
def test_prompt_as_text_or_repeated_in_both_conversations(prompt: object, repeated: bool) -> None:
    """UltraFeedback's form: the prompt stands in its own column and again at the start of both conversations."""
    question = {"role": "user", "content": "why?"}
    row = {side: [question] * repeated + [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = parse_row({"prompt": prompt} | row, "f.jsonl:1")
    assert pair.chosen == [question, {"role": "assistant", "content": "chosen"}]
    assert pair.rejected == [question, {"role": "assistant", "content": "rejected"}]
    assert pair.prompt_messages == 1
