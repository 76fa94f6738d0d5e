"""Messages of a conversation in every spelling that tools write, as one: `{"role": ..., "content": text, ...}`."""

from __future__ import annotations

import json
import re
from typing import Any

from minimind_dpo.data.json_text import check_plain, fail, load_json, type_name, value_in

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's, LLaMA-Factory's and ms-swift's names
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_PARTS = ("text", "reasoning", "tool_call", "image", "image_url", "video", "video_url", "audio", "input_audio")
_CALLS = ("function_call", "tool_call")
# `image`, `videos`, `audio_path`, `image_urls`, ...; not `image_prompt` or `has_image`
_MEDIA = re.compile(
    r"(image|picture|photo|img|video|audio)s?(_?(path|url|uri|file|filename|file_name|name|bytes|base64|b64|data|id)s?)?",
    re.IGNORECASE,
)


def read_messages(messages: Any, name: str, place: str) -> list[Message]:
    """The messages of a list, checked.

    Args:
        messages: a list of message objects.
        name: of the column, for errors.
        place: of the row, for errors.

    Raises:
        RowError: the list is empty, or something in it is no message of text.
    """
    if not messages:
        fail("empty_list", place, f"{name} is an empty list; it needs at least one message")
    return [_message(message, f"{name}[{index}]", place) for index, message in enumerate(messages)]


def refuse_media(values: dict[str, Any], name: str, place: str) -> None:
    """Refuse pictures, films and sound: what was said of them can't be learnt from the words alone.

    Raises:
        RowError: a column or key of `values` holds one.
    """
    for key, value in values.items():
        if _MEDIA.fullmatch(str(key)) and (any(value) if isinstance(value, list) else value):
            fail("not_text", place, f"{name}{key}: only text is trained on; take such rows out (on_bad_row: drop does)")


def with_arguments(message: Message, wanted: type | None, place: str) -> Message:
    """A message whose calls have their arguments as the chat template wants them.

    Args:
        message: a checked message.
        wanted: `dict`, `str` for JSON text, or None where the template takes both as they are.
        place: of the row, for errors.

    Raises:
        RowError: a text is not the JSON of an object, where the template wants one.
    """
    if wanted is None or "tool_calls" not in message:
        return message
    return message | {"tool_calls": [_fit_call(call, wanted, place) for call in message["tool_calls"]]}


def _fit_call(call: dict[str, Any], wanted: type, place: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _fit_call(call["function"], wanted, place)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and wanted is dict:
        arguments = load_json(arguments, place, "the arguments of a tool call") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            fail("wrong_type", place, f"the arguments of a tool call must be an object, not {type_name(arguments)}")
        check_plain(arguments, place, "the arguments of a tool call")
        return call | {"arguments": arguments}
    if isinstance(arguments, dict) and wanted is str:
        return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def looks_like_message(value: Any) -> bool:
    """Whether a value is meant as a message object."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def looks_like_parts(value: Any) -> bool:
    """Whether a value is a content of parts: `[{"type": "text", "text": ...}]`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and part.get("type") in _PARTS and len(part) > 1 for part in value)
    )


def words_of_parts(parts: list[Any], name: str, place: str) -> str:
    """The text of a content of parts.

    Raises:
        RowError: a part is not text.
    """
    message: Message = {"content": parts}
    _join_parts(message, name, place)
    if message.keys() != {"content"}:
        fail("wrong_type", place, f"{name} has thoughts or calls and no role; write it as a message")
    return message["content"]


def _message(message: Any, name: str, place: str) -> Message:
    if not isinstance(message, dict):
        fail("wrong_type", place, f'{name} must be {{"role": ..., "content": ...}}, not {type_name(message)}')
    # Arrow gives every message of a column the same keys, absent ones as None.
    message = {key: value for key, value in message.items() if value is not None}
    _rename(message, name, place)
    refuse_media(message, f"{name}.", place)
    if "role" not in message:
        fail("wrong_keys", place, f"{name} has no role (its keys: {', '.join(map(str, message)) or 'none'})")
    said = message["role"]
    role = OTHER_ROLES.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        fail("wrong_role", place, f"{name} has the role {said!r}; roles are {', '.join((*ROLES, *OTHER_ROLES))}")
    message["role"] = role
    if isinstance(message.get("content"), str) and looks_like_parts(parts := value_in(message["content"])):
        message["content"] = parts
    if isinstance(message.get("content"), list):
        _join_parts(message, name, place)
    if said in _CALLS:
        _call_from_content(message, name, place)
    _read_calls(message, name, place)
    content = message.setdefault("content", None)
    if not isinstance(content, str) and not (content is None and "tool_calls" in message):
        fail(
            "wrong_type",
            place,
            f"the content of {name} must be a text, not {type_name(content)} (absent only beside tool_calls)",
        )
    for key, value in message.items():
        if not isinstance(value, str):
            check_plain([value], place, f"{name}.{key}")
    return message


def _rename(message: Message, name: str, place: str) -> None:
    """ShareGPT's `from` and `value` as `role` and `content`."""
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and ours in message:
            fail("wrong_keys", place, f"{name} has both {ours} and {theirs}; keep one of them")
        if theirs in message:
            message[ours] = message.pop(theirs)


def _join_parts(message: Message, name: str, place: str) -> None:
    """A content of parts as one text; thoughts and calls among them (LLaMA-Factory) go where templates look."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, part in enumerate(message.pop("content")):
        where = f"{name}.content[{index}]"
        if not isinstance(part, dict):
            fail("wrong_type", place, f'{where} must be {{"type": "text", "text": ...}}, not {type_name(part)}')
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.pop("type", "text")
        if kind not in ("text", "reasoning", "tool_call"):
            fail("not_text", place, f"{where} is of the type {kind!r}; only text is trained on")
        values = list(part.values())
        if part.keys() not in ({"text"}, {"value"}) or not isinstance(values[0], str | dict):
            fail("wrong_keys", place, f'{where} must be {{"type": "text", "text": ...}}')
        if kind == "tool_call":
            calls.append(_call(values[0], where, place))
        elif not isinstance(values[0], str):
            fail("wrong_type", place, f"the text of {where} must be a text, not {type_name(values[0])}")
        else:
            (texts if kind == "text" else thoughts).append(values[0])
    message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls


def _call_from_content(message: Message, name: str, place: str) -> None:
    """A message of the role `function_call` says in its content which function it calls, as JSON."""
    content = message.get("content")
    value = load_json(content, place, f"the content of {name}") if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    message["content"] = ""
    message["tool_calls"] = [_call(call, f"the content of {name}", place) for call in calls]


def _call(call: Any, name: str, place: str) -> dict[str, Any]:
    call = load_json(call, place, name) if isinstance(call, str) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        fail("wrong_type", place, f'{name} must be {{"name": ..., "arguments": ...}}')
    return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def _read_calls(message: Message, name: str, place: str) -> None:
    calls = message.get("tool_calls")
    if not calls:
        message.pop("tool_calls", None)
        return
    if isinstance(calls, str):  # MiniMind's generation 3 writes them as JSON text
        calls = load_json(calls, place, f"{name}.tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        fail("wrong_type", place, f"{name}.tool_calls must hold a JSON list of objects, not {type_name(calls)}")
    message["tool_calls"] = calls
    if not calls:
        del message["tool_calls"]
