"""The forms of rows that other tools write, each as the plain one: `prompt`, `chosen`, `rejected` and optional columns.

A row says its two answers in one way (`ANSWERS`) and its prompt in at most one (`PROMPTS`); every combination is read.
A row in which two ways stand side by side is an error: which one is meant can be said with `columns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from minimind_dpo.data.encoded import messages_of_text
from minimind_dpo.data.json_text import fail, type_name
from minimind_dpo.data.messages import Message

Row = dict[str, Any]

OPTIONAL = ("system", "tools", "weight", "margin", "id")
FORMS = (
    'accepted rows: {"chosen": [messages], "rejected": [messages]}, '
    '{"prompt": [messages], "chosen": [messages], "rejected": [messages]}, '
    '{"prompt": text, "chosen": text, "rejected": text} or another form of docs/data.md; '
    "columns of other names: --columns prompt=NAME,chosen=NAME,rejected=NAME"
)
_ASSISTANT = ("assistant", "gpt", "bot", "function_call", "tool_call")
_TURN = ("user", "assistant")
_SPEAKER = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
_SPEAKER_OF_LINES = re.compile(r"(?:\A\s*|\r?\n)(Human|Assistant):")


def plain_row(row: Row, place: str) -> tuple[Row, set[str]]:
    """A row of any form as one with `chosen`, `rejected`, perhaps `prompt`, and its optional columns.

    `prompt`, `chosen` and `rejected` are each a text or a list of message objects, which are not checked yet.

    Returns:
        The plain row, and the columns of `row` that it was made of.

    Raises:
        RowError: the row is of none of the forms, or of several.
    """
    row = {name: _decoded(name, value, place) for name, value in row.items()}
    answers = [names for names in ANSWERS if _present(row, names)]
    if len(answers) != 1:
        what = "found the keys" if not answers else f"its answers stand in {_listed(answers)}, which is meant? found"
        fail("wrong_keys", place, f"{what} {', '.join(map(str, row)) or 'none'}; {FORMS}")
    plain = ANSWERS[answers[0]](row, place)
    used = {*answers[0], *OPTIONAL}
    prompts = [names for names in PROMPTS if any(_gives_prompt(row, name) for name in names)]
    if len(prompts) > 1 and not row.get("prompt", True):
        prompts.remove(("prompt",))
        used.add("prompt")
    if len(prompts) > 1:
        fail("wrong_keys", place, f"its prompt stands in {_listed(prompts)}; say which: --columns prompt=NAME")
    for names in prompts:
        plain["prompt"] = PROMPTS[names](row, place)
        used.update(names)
    if not prompts and "messages" in row and "messages" not in used and _lacks_prompt(plain):
        plain["prompt"] = row["messages"]
        used.add("messages")
    if "history" in row and isinstance(plain.get("prompt"), str):
        plain["prompt"] = _with_history(row["history"], plain["prompt"], place)
        used.add("history")
    return _spoken(plain) | {name: row[name] for name in OPTIONAL if name in row}, used


def rename_columns(row: Row, columns: dict[str, str], place: str) -> Row:
    """The row with columns under our names: `columns` says, for each of ours, which of the row's is meant.

    Raises:
        RowError: the row has no such column, and ours is not an optional one.
    """
    absent = [theirs for ours, theirs in columns.items() if theirs not in row and ours not in OPTIONAL]
    if absent:
        fail("wrong_keys", place, f"columns: no column {', '.join(absent)}, only {', '.join(map(str, row))}")
    # What is said with `columns` is meant: other columns that would name the same are not asked.
    replaced = {*columns, *columns.values()}
    if "prompt" in columns:
        replaced |= {name for way in PROMPTS for name in way}
    if columns.keys() & {"chosen", "rejected"}:
        replaced |= {name for way in ANSWERS for name in way} - {"chosen", "rejected", "messages"}
    return {name: value for name, value in row.items() if name not in replaced} | {
        ours: row[theirs] for ours, theirs in columns.items() if theirs in row
    }


def transcript(text: str, speaker: re.Pattern[str] = _SPEAKER) -> list[Message] | None:
    """The messages of hh-rlhf's transcripts (`\\n\\nHuman: ... \\n\\nAssistant: ...`); None of any other text."""
    pieces = speaker.split(text)
    if len(pieces) < 3 or pieces[0] or pieces[1] != "Human":
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _given(row: Row, place: str) -> Row:
    return {side: [row[side]] if isinstance(row[side], dict) else row[side] for side in ("chosen", "rejected")}


def _llama_factory_v1(row: Row, place: str) -> Row:
    return {"chosen": row["chosen_messages"], "rejected": row["rejected_messages"]}


def _swift_response(row: Row, place: str) -> Row:
    """ms-swift: the chosen conversation, and what was rejected in the place of its last message."""
    chosen, rejected = row["messages"], row["rejected_response"]
    _check_conversation(chosen, place)
    if not isinstance(rejected, str | dict):
        fail("wrong_type", place, f"rejected_response must be one text or message, not {type_name(rejected)}")
    answer = rejected if isinstance(rejected, dict) else {"role": "assistant", "content": rejected}
    return {"chosen": chosen, "rejected": [*chosen[:-1], answer]}


def _swift_messages(row: Row, place: str) -> Row:
    """ms-swift: two conversations; of the rejected one the answer alone may be given."""
    chosen, rejected = row["messages"], row["rejected_messages"]
    rejected = [rejected] if isinstance(rejected, dict) else rejected
    _check_conversation(chosen, place)
    _check_conversation(rejected, place)
    if _is_answer(rejected) and not _is_answer(chosen):
        asked = max((i for i, message in enumerate(chosen) if not _is_answer([message])), default=-1)
        rejected = [*chosen[: asked + 1], *rejected]
    return {"chosen": chosen, "rejected": rejected}


def _swift_query(row: Row, place: str) -> Row:
    return {"chosen": row["response"], "rejected": row["rejected_response"]}


def _alpaca_output(row: Row, place: str) -> Row:
    output = row["output"]
    if len(output) != 2:
        fail("wrong_type", place, f"output must hold two answers, the preferred one first, not {len(output)}")
    return {"chosen": output[0], "rejected": output[1]}


def _instruction(row: Row, place: str) -> Any:
    """Alpaca's instruction and input, one below the other as LLaMA-Factory joins them."""
    parts = [row[name] for name in ("instruction", "input") if row.get(name)]
    if len(parts) < 2:
        return parts[0] if parts else ""
    if not all(isinstance(part, str) for part in parts):
        fail("wrong_type", place, "instruction and input must both be texts")
    return "\n".join(parts)


def _column(name: str) -> Callable[[Row, str], Any]:
    return lambda row, place: row[name]


ANSWERS: dict[tuple[str, ...], Callable[[Row, str], Row]] = {
    ("chosen", "rejected"): _given,
    ("chosen_messages", "rejected_messages"): _llama_factory_v1,
    ("messages", "rejected_response"): _swift_response,
    ("messages", "rejected_messages"): _swift_messages,
    ("response", "rejected_response"): _swift_query,
    ("output",): _alpaca_output,
}
PROMPTS: dict[tuple[str, ...], Callable[[Row, str], Any]] = {
    ("prompt",): _column("prompt"),
    ("conversations",): _column("conversations"),
    ("instruction", "input"): _instruction,
    ("question",): _column("question"),
    ("query",): _column("query"),
}
COLUMNS = frozenset({*OPTIONAL, *(name for way in (*ANSWERS, *PROMPTS) for name in way), "history"})
_OF_WORDS = ("instruction", "question", "query", "response")  # these are seldom more than words
_OF_MESSAGES = COLUMNS - {*OPTIONAL, *_OF_WORDS, "input", "history"}


def _present(row: Row, names: tuple[str, ...]) -> bool:
    # A single `output` is what other data sets call the one answer that they have.
    return all(name in row for name in names) and (names != ("output",) or isinstance(row["output"], list))


def _gives_prompt(row: Row, name: str) -> bool:
    # Tables fill columns that a row does not use with empty values.
    return name in row and (name == "prompt" or bool(row[name]))


def _listed(ways: list[tuple[str, ...]]) -> str:
    return " and in ".join(" + ".join(way) for way in ways)


def _decoded(name: str, value: Any, place: str) -> Any:
    """Message lists that a table keeps as text."""
    if not isinstance(value, str) or name not in (*_OF_MESSAGES, *_OF_WORDS):
        return value
    return messages_of_text(value, name, place, strict=name in _OF_WORDS)


def _check_conversation(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        fail("wrong_type", place, "messages and rejected_messages must be lists of messages")


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _is_answer(messages: Any) -> bool:
    """Whether messages begin with the assistant's: an answer alone, without what was asked."""
    return isinstance(messages, list) and bool(messages) and _role(messages[0]) in _ASSISTANT


def _lacks_prompt(plain: Row) -> bool:
    """Whether the answers are alone; UltraFeedback, for one, has whole conversations and one of them in `messages`."""
    return all(isinstance(plain[side], str) or _is_answer(plain[side]) for side in ("chosen", "rejected"))


def _with_history(history: Any, prompt: str, place: str) -> list[Message]:
    turns: list[Any] = history if isinstance(history, list) else [None]
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(w, str) for w in turn) for turn in turns):
        fail("wrong_type", place, "history must be a list of [question, answer]")
    told = [{"role": role, "content": words} for turn in turns for role, words in zip(_TURN, turn, strict=True)]
    return [*told, {"role": "user", "content": prompt}]


def _spoken(plain: Row) -> Row:
    """hh-rlhf's transcripts as conversations; texts of another kind stay."""
    if not all(isinstance(plain[side], str) for side in ("chosen", "rejected")):
        return plain
    prompt = plain.get("prompt", "")
    asked, sides = _transcripts(plain, prompt, _SPEAKER)
    whole = all(map(is_whole, sides.values()))
    if not whole and all(map(is_whole, (lines := _transcripts(plain, prompt, _SPEAKER_OF_LINES))[1].values())):
        (asked, sides), whole = lines, True
    opened = asked is not None and asked[-1] == {"role": "assistant", "content": ""}
    if all(sides.values()) and (asked or whole or "prompt" not in plain):
        plain |= sides
    elif opened:
        plain |= {side: plain[side].strip() for side in sides}
    else:
        return plain
    return plain | {"prompt": asked[:-1] if opened else asked} if asked else plain


def _transcripts(plain: Row, prompt: Any, speaker: re.Pattern[str]) -> tuple[list[Message] | None, dict[str, Any]]:
    asked = transcript(prompt, speaker) if isinstance(prompt, str) else None
    return asked, {side: transcript(plain[side], speaker) for side in ("chosen", "rejected")}


def is_whole(told: list[Message] | None) -> bool:
    """Whether a transcript is a conversation with an answer at its end: no words of another kind are."""
    return told is not None and len(told) > 1 and told[-1]["role"] == "assistant" and bool(told[-1]["content"])
