"""One row of preference data, validated: a `PreferencePair`, or an error that names its file and line."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from minimind_dpo.data.conversations import join_row
from minimind_dpo.data.forms import FORMS, plain_row, rename_columns
from minimind_dpo.data.json_text import RowError, check_plain, check_text, fail, load_json, type_name, without_nulls
from minimind_dpo.data.messages import ROLES, Message, refuse_media
from minimind_dpo.data.rows import Payload

__all__ = ["ROLES", "Message", "PreferencePair", "RowError", "parse_line", "parse_row", "shared_messages"]

logger = logging.getLogger("minimind_dpo")

_LARGEST = 3.4028234663852886e38  # the largest finite number in fp32, in which losses are computed
_noticed_columns: set[frozenset[str]] = set()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two conversations, of which the first is preferred.

    `chosen` and `rejected` are full conversations, prompt and answer together; each ends with an assistant
    message. `prompt_messages` counts the messages that both share at their start; each side keeps at least its
    last message for itself. `plain` marks a row of three texts; each side is then a user and an assistant message.
    `prefill` is how a prompt that ends in the assistant's turn begins the answers, which go on from there.
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
    prefill: str = ""


def parse_line(payload: Payload, place: str, columns: Mapping[str, str] | None = None) -> PreferencePair:
    """A pair from one undecoded JSON line, or from a row of a table, whose absent values are `None`.

    Args:
        payload: the line or row, or why there is none.
        place: where it was read, for errors.
        columns: for each of our columns the row's own name of it, where that is another.

    Raises:
        RowError: the row is not UTF-8, not JSON, or not a row of preferences; the message starts with `place`.
    """
    if isinstance(payload, RowError):
        raise payload
    if not isinstance(payload, bytes):
        return parse_row(without_nulls(payload), place, columns)
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("not_utf8", place, f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
    return parse_row(load_json(text, place), place, columns)


def parse_row(row: dict[str, Any], place: str, columns: Mapping[str, str] | None = None) -> PreferencePair:
    """A pair from a row of any accepted form, checked. Columns that are `None` count as absent.

    Raises:
        RowError: wrong keys, types, roles or values; the message starts with `place` and says what to do.
    """
    if not isinstance(row, dict):
        fail("wrong_type", place, f"a row must be an object, this one is {type_name(row)}; {FORMS}")
    if columns:
        _notice_absent_columns(columns, row, place)
        row = rename_columns(row, dict(columns), place)
    row = {key: value for key, value in row.items() if value is not None}
    refuse_media(row, "", place)
    row = _with_one_system(row, place)
    plain, used = plain_row(row, place)
    _notice_unknown_columns(row.keys() - used, place)
    chosen, rejected, prefill = join_row(plain, place)
    tools = _tools(plain, chosen, place)
    for message in chosen + rejected:
        message.pop("tools", None)
    texts = all(isinstance(plain.get(name), str) for name in ("prompt", "chosen", "rejected"))
    return PreferencePair(
        chosen=chosen,
        rejected=rejected,
        prompt_messages=shared_messages(chosen, rejected),
        place=place,
        tools=tools,
        weight=_number(plain, "weight", place, lowest=0.0, default=1.0),
        margin=_number(plain, "margin", place),
        id=_identifier(plain, place),
        plain=texts and len(chosen) == 2,
        prefill=prefill,
    )


def shared_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations share at their start; each keeps at least its last one for itself."""
    limit = min(len(chosen), len(rejected)) - 1
    for index in range(limit):
        if chosen[index] != rejected[index]:
            return index
    return limit


def _with_one_system(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The row with its `system_prompt`, as others call it, in `system`."""
    if "system_prompt" not in row:
        return row
    given = [row[name] for name in ("system", "system_prompt") if row.get(name)]
    if len(given) > 1 and given[0] != given[1]:
        fail("wrong_keys", place, "system and system_prompt differ; say which: --columns system=NAME")
    return {name: value for name, value in row.items() if name != "system_prompt"} | {"system": (given or [""])[0]}


def _tools(row: dict[str, Any], conversation: list[Message], place: str) -> list[dict[str, Any]] | None:
    """The row's tools, or those that MiniMind's generation 3 writes into the system message."""
    tools = row.get("tools") or (conversation[0].get("tools") if conversation[0]["role"] == "system" else None)
    if isinstance(tools, str):
        tools = load_json(tools, place, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        fail("wrong_type", place, "tools must be a list of JSON objects, or one as JSON text")
    tools = [load_json(tool, place, "tools") if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        fail("wrong_type", place, "tools must be a list of JSON objects, or one as JSON text")
    check_plain(tools, place, "tools")
    return [_with_parameters(tool, place) for tool in tools]


def _with_parameters(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """A tool whose parameters are a schema: tables often keep them as JSON text."""
    if isinstance(tool.get("function"), dict):
        return tool | {"function": _with_parameters(tool["function"], place)}
    if not isinstance(tool.get("parameters"), str):
        return tool
    return tool | {"parameters": load_json(tool["parameters"], place, "the parameters of a tool")}


def _number(row: dict[str, Any], key: str, place: str, lowest: float = -math.inf, default: Any = None) -> Any:
    value = row.get(key, default)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or number < lowest or abs(number) > _LARGEST:
        wanted = "a finite number" if lowest == -math.inf else f"a finite number, at least {lowest:g}"
        wanted = "a number that fp32 can hold" if _LARGEST < abs(number) < math.inf else wanted
        fail(f"wrong_{key}", place, f"{key} must be {wanted}, not {short(value)}")
    return number


def _identifier(row: dict[str, Any], place: str) -> str | None:
    value = row.get("id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        fail("wrong_type", place, f"id must be a text or a whole number, not {type_name(value)}")
    if value is None:
        return None
    check_text(str(value), place, "id")
    return str(value)


def _notice_absent_columns(columns: Mapping[str, str], row: dict[str, Any], place: str) -> None:
    absent = frozenset(f"{name} (columns)" for name in columns.values() if name not in row)
    if absent and absent not in _noticed_columns:
        _noticed_columns.add(absent)
        logger.warning("no column %s at %s", ", ".join(sorted(absent)), place)


def _notice_unknown_columns(columns: set[str], place: str) -> None:
    unknown = frozenset(map(str, columns))
    if unknown and unknown not in _noticed_columns:
        _noticed_columns.add(unknown)
        logger.warning("ignoring unknown columns: %s (first seen at %s)", ", ".join(sorted(unknown)), place)
