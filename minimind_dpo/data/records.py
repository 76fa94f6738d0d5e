"""One row of preference data, validated: a `PreferencePair`, or an error that names its file and line."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from minimind_dpo.errors import UserError

logger = logging.getLogger("minimind_dpo")

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_NO_PROMPT: list[Any] = []
COLUMNS = frozenset({"prompt", "chosen", "rejected", "tools", "weight", "margin", "id"})
FORMS = (
    'accepted rows: {"chosen": [messages], "rejected": [messages]}, '
    '{"prompt": [messages], "chosen": [messages], "rejected": [messages]} or '
    '{"prompt": text, "chosen": text, "rejected": text}'
)
_noticed_columns: set[frozenset[str]] = set()


class RowError(UserError):
    """A row that can't be used; `reason` is a short name under which such rows are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, str(self))


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two conversations, of which the first is preferred.

    `chosen` and `rejected` are full conversations, prompt and answer together; each ends with an assistant
    message. `prompt_messages` counts the messages that both share at their start; each side keeps at least its
    last message for itself. `plain` marks a row of three texts; each side is then a user and an assistant message.
    `weight` scales the pair's loss, `margin` is what the row says about the distance between the two answers,
    `place` is where the row was read (`file.jsonl:17`).
    """

    chosen: list[Message]
    rejected: list[Message]
    prompt_messages: int
    place: str
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    margin: float | None = None
    id: str | None = None
    plain: bool = False


def parse_line(payload: bytes | dict[str, Any], place: str) -> PreferencePair:
    """A pair from one undecoded JSON line, or from a row that is a dict already.

    Raises:
        RowError: the row is not UTF-8, not JSON, or not a row of preferences; the message starts with `place`.
    """
    if not isinstance(payload, bytes):
        return parse_row(payload, place)
    try:
        row = json.loads(payload.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(
            "not_utf8", f"{place}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise RowError(
            "broken_json",
            f"{place}: broken JSON: {error.msg} (column {error.colno}); every line must be one whole JSON object",
        ) from None
    except (ValueError, RecursionError) as error:
        raise RowError("broken_json", f"{place}: broken JSON: {error}") from None
    return parse_row(row, place)


def parse_row(row: dict[str, Any], place: str) -> PreferencePair:
    """A pair from a row of any accepted form, checked. Columns that are `None` count as absent.

    Raises:
        RowError: wrong keys, types, roles or values; the message starts with `place` and says what to do.
    """
    if not isinstance(row, dict):
        _fail("wrong_type", place, f"a row must be an object, this one is {_type_name(row)}; {FORMS}")
    row = {key: value for key, value in row.items() if value is not None}
    if not {"chosen", "rejected"} <= row.keys():
        _fail("wrong_keys", place, f"found the keys {', '.join(map(str, row)) or 'none'}; {FORMS}")
    _notice_unknown_columns(row, place)
    sides = [row["chosen"], row["rejected"]]
    plain = all(isinstance(side, str) for side in sides)
    if plain:
        chosen, rejected = _plain_sides(row, place)
    elif all(isinstance(side, list) for side in sides):
        chosen, rejected = _conversations(row, place)
    else:
        kinds = " and ".join(_type_name(side) for side in sides)
        _fail("wrong_type", place, f"chosen and rejected must both be texts or both be lists of messages, not {kinds}")
    tools = _tools(row, chosen, place)
    for message in chosen + rejected:
        message.pop("tools", None)
    return PreferencePair(
        chosen=chosen,
        rejected=rejected,
        prompt_messages=shared_messages(chosen, rejected),
        place=place,
        tools=tools,
        weight=_number(row, "weight", place, lowest=0.0, default=1.0),
        margin=_number(row, "margin", place),
        id=_identifier(row, place),
        plain=plain,
    )


def shared_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations share at their start; each keeps at least its last one for itself."""
    limit = min(len(chosen), len(rejected)) - 1
    for index in range(limit):
        if chosen[index] != rejected[index]:
            return index
    return limit


def _plain_sides(row: dict[str, Any], place: str) -> tuple[list[Message], list[Message]]:
    if "prompt" not in row:
        _fail("wrong_keys", place, f"plain-text answers need a prompt; found {', '.join(row)}; {FORMS}")
    if not isinstance(row["prompt"], str):
        _fail("wrong_type", place, f"prompt must be a text like chosen and rejected, not {_type_name(row['prompt'])}")
    prompt = {"role": "user", "content": row["prompt"]}
    chosen, rejected = ([dict(prompt), {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected"))
    return chosen, rejected


def _conversations(row: dict[str, Any], place: str) -> tuple[list[Message], list[Message]]:
    prompt = row.get("prompt", _NO_PROMPT)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        _fail("wrong_type", place, f"prompt must be a text or a list of messages, not {_type_name(prompt)}")
    before = [] if prompt is _NO_PROMPT else _messages(prompt, "prompt", place)
    chosen, rejected = (_messages(row[side], side, place) for side in ("chosen", "rejected"))
    # UltraFeedback's rows, for one, repeat the prompt in both conversations
    if not all(side[: len(before)] == before for side in (chosen, rejected)):
        chosen, rejected = before + chosen, before + rejected
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            role = side[-1]["role"]
            _fail("wrong_role", place, f"{name} must end with an assistant message, its last message is from '{role}'")
    return chosen, rejected


def _messages(messages: Any, name: str, place: str) -> list[Message]:
    if not messages:
        _fail("empty_list", place, f"{name} is an empty list; it needs at least one message")
    return [_message(message, f"{name}[{index}]", place) for index, message in enumerate(messages)]


def _message(message: Any, name: str, place: str) -> Message:
    if not isinstance(message, dict):
        _fail("wrong_type", place, f'{name} must be {{"role": ..., "content": ...}}, not {_type_name(message)}')
    # Arrow gives every message of a column the same keys, absent ones as None.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message:
        _fail("wrong_keys", place, f"{name} has no role (its keys: {', '.join(map(str, message)) or 'none'})")
    if message["role"] not in ROLES:
        _fail("wrong_role", place, f"{name} has the role {message['role']!r}; roles are {', '.join(ROLES)}")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif isinstance(message["tool_calls"], str):  # MiniMind's generation 3 writes them as JSON text
        message["tool_calls"] = _json_list(message["tool_calls"], f"{name}.tool_calls", place)
    content = message.setdefault("content", None)
    if not isinstance(content, str) and not (content is None and "tool_calls" in message):
        _fail(
            "wrong_type",
            place,
            f"the content of {name} must be a text, not {_type_name(content)} (absent only beside tool_calls)",
        )
    return message


def _tools(row: dict[str, Any], conversation: list[Message], place: str) -> list[dict[str, Any]] | None:
    """The row's tools, or those that MiniMind's generation 3 writes into the system message."""
    tools = row.get("tools") or (conversation[0].get("tools") if conversation[0]["role"] == "system" else None)
    if not tools:
        return None
    if isinstance(tools, str):
        tools = _json_list(tools, "tools", place)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        _fail("wrong_type", place, "tools must be a list of JSON objects, or one as JSON text")
    return tools or None


def _json_list(text: str, name: str, place: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        _fail("broken_json", place, f"{name} is not JSON: {error}")
    if not isinstance(value, list):
        _fail("wrong_type", place, f"{name} must hold a JSON list, not {_type_name(value)}")
    return value


def _number(row: dict[str, Any], key: str, place: str, lowest: float = -math.inf, default: Any = None) -> Any:
    value = row.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < lowest:
        wanted = "a finite number" if lowest == -math.inf else f"a finite number, at least {lowest:g}"
        _fail(f"wrong_{key}", place, f"{key} must be {wanted}, not {value!r}")
    return float(value)


def _identifier(row: dict[str, Any], place: str) -> str | None:
    value = row.get("id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        _fail("wrong_type", place, f"id must be a text or a whole number, not {_type_name(value)}")
    return None if value is None else str(value)


def _notice_unknown_columns(row: dict[str, Any], place: str) -> None:
    unknown = frozenset(map(str, row)) - COLUMNS
    if unknown and unknown not in _noticed_columns:
        _noticed_columns.add(unknown)
        logger.warning("ignoring unknown columns: %s (first seen at %s)", ", ".join(sorted(unknown)), place)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def _fail(reason: str, place: str, message: str) -> NoReturn:
    raise RowError(reason, f"{place}: {message}")
