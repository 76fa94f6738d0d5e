"""A prompt and two answers as two whole conversations, whatever of the prompt the answers repeat."""

from __future__ import annotations

from typing import Any

from minimind_dpo.data.json_text import fail, type_name
from minimind_dpo.data.messages import Message, read_messages

_SIDES = ("chosen", "rejected")


def join_row(row: dict[str, Any], place: str) -> tuple[list[Message], list[Message], str]:
    """Both conversations of a plain row, and the words that the prompt put into the answer's mouth.

    Args:
        row: with `chosen` and `rejected`, perhaps `prompt` and `system`; each answer and the prompt a text or a list.
        place: of the row, for errors.

    Returns:
        chosen, rejected: messages, the last one the assistant's.
        prefill: how the last message of both begins if the prompt ended in the assistant's turn, else empty.

    Raises:
        RowError: it can't be told which conversations are meant.
    """
    chosen, rejected = _answers(row, place)
    before = _prompt(row, place)
    if isinstance(row.get("prompt"), str) and not row["prompt"].strip() and chosen[0]["role"] != "assistant":
        before = []  # a table's empty value beside whole conversations
    system = row.get("system", "")
    if not isinstance(system, str):
        fail("wrong_type", place, f"system must be a text, not {type_name(system)}")
    prefill = ""
    if before:
        chosen, rejected = _without_beginning(before[-1], [chosen, rejected])
        chosen, asked = _join(before, chosen, "chosen", place)
        rejected, also_asked = _join(before, rejected, "rejected", place)
        if asked != also_asked:
            fail("prompt_differs", place, "chosen and rejected repeat the prompt differently; give it once, in prompt")
        prefill = _prefill(before, chosen[len(asked)])
    if system.strip():
        message = {"role": "system", "content": system}
        chosen, rejected = (_with_system(side, message, place) for side in (chosen, rejected))
    for name, side in zip(_SIDES, (chosen, rejected), strict=True):
        if side[-1]["role"] != "assistant":
            role = side[-1]["role"]
            fail("wrong_role", place, f"{name} must end with an assistant message, its last message is from '{role}'")
    return chosen, rejected, prefill


def _answers(row: dict[str, Any], place: str) -> list[list[Message]]:
    sides = [row[name] for name in _SIDES]
    if all(isinstance(side, str) for side in sides):
        if "prompt" not in row:
            fail("wrong_keys", place, f"plain-text answers need a prompt; found {', '.join(row)}")
        return [[{"role": "assistant", "content": side}] for side in sides]
    if not all(isinstance(side, list) for side in sides):
        kinds = " and ".join(type_name(side) for side in sides)
        fail("wrong_type", place, f"chosen and rejected must both be texts or both be messages, not {kinds}")
    return [read_messages(side, name, place) for side, name in zip(sides, _SIDES, strict=True)]


def _prompt(row: dict[str, Any], place: str) -> list[Message]:
    prompt = row.get("prompt")
    if prompt is None:
        return []
    if isinstance(prompt, dict):
        prompt = [prompt]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        fail("wrong_type", place, f"prompt must be a text or a list of messages, not {type_name(prompt)}")
    return read_messages(prompt, "prompt", place)


def _join(before: list[Message], side: list[Message], name: str, place: str) -> tuple[list[Message], list[Message]]:
    """The whole conversation of a side, and what of it the prompt says (but for the beginning of an answer)."""
    system, asked = _split_system(before)
    side_system, told = _split_system(side)
    whole, length = told, 0
    if asked and told:
        whole, length = _repeated(asked, told) or _continued(asked, told, side_system, name, place)
        length -= asked[-1]["role"] == "assistant"
    elif asked:
        fail("wrong_role", place, f"{name} has a system message and no answer")
    for message in (side_system, system):
        whole = _with_system(whole, message, place) if message else whole
    return whole, whole[: length + (whole[0]["role"] == "system")]


def _without_beginning(last: Message, sides: list[list[Message]]) -> list[list[Message]]:
    """Both answers without the words with which the prompt begins them, where both begin with them once more.

    A single word may well be said twice.
    """
    begun = _words(last).lstrip()
    if last["role"] != "assistant" or "tool_calls" in last or len(begun.split()) < 2:
        return sides
    words = [_words(side[0]).lstrip() if side[0]["role"] == "assistant" else "" for side in sides]
    if not all(text.startswith(begun) and text != begun for text in words):
        return sides
    return [[side[0] | {"content": text[len(begun) :]}, *side[1:]] for side, text in zip(sides, words, strict=True)]


def _repeated(asked: list[Message], told: list[Message]) -> tuple[list[Message], int] | None:
    """A conversation that repeats what was asked, and how long that is in it; None where it doesn't.

    It may repeat all of it or its last turns only, or have turns before it.
    """
    for missing in range(len(asked)):
        if asked[missing]["role"] != "assistant" and _begins(told, asked[missing:]):
            return [*asked[:missing], *told], len(asked)
    for start in range(len(told) - 1, 0, -1):
        if told[start]["role"] == "user" and _begins(told[start:], asked):
            return told, start + len(asked)
    return None


def _begins(told: list[Message], asked: list[Message]) -> bool:
    """Whether a conversation that goes on begins with what was asked, spaces around words aside."""
    *first, last = [_bare(message) for message in asked]
    same = [_bare(message) for message in told[: len(asked)]]
    if last["role"] != "assistant" or "tool_calls" in last:
        return same == [*first, last] and len(told) > len(asked)
    return (
        len(same) == len(asked)
        and same[:-1] == first
        and same[-1]["role"] == "assistant"
        and same[-1]["content"].startswith(last["content"])
    )


def _continued(
    asked: list[Message], told: list[Message], system: Message | None, name: str, place: str
) -> tuple[list[Message], int]:
    """What was asked and then the answer; of an answer begun in the prompt one message."""
    last, first = asked[-1], told[0]
    if system or (first["role"] == "user" and (last["role"] != "assistant" or _bare(first) in map(_bare, asked))):
        fail(
            "prompt_differs",
            place,
            f"{name} is a whole conversation, and prompt says something else than it does; give the prompt once, in "
            "prompt or in both conversations",
        )
    if last["role"] != "assistant" or first["role"] != "assistant":
        return [*asked, *told], len(asked)
    if "tool_calls" in last:
        fail("wrong_role", place, f"prompt ends with a tool call; {name} must begin with the tool's result")
    return [*asked[:-1], first | {"content": _words(last) + _words(first)}, *told[1:]], len(asked)


def _prefill(before: list[Message], answer: Message) -> str:
    """The words with which the prompt begins the answer, if it does."""
    begun = _words(before[-1]) if before[-1]["role"] == "assistant" else ""
    return begun if answer["role"] == "assistant" and _words(answer) != begun else ""


def _split_system(messages: list[Message]) -> tuple[Message | None, list[Message]]:
    return (messages[0], messages[1:]) if messages[0]["role"] == "system" else (None, messages)


def _with_system(messages: list[Message], system: Message, place: str) -> list[Message]:
    first = messages[0]
    if first["role"] != "system":
        return [system, *messages]
    words = {said.strip() for said in (_words(first), _words(system)) if said.strip()}
    if len(words) > 1:
        fail("prompt_differs", place, "the row gives two different system messages; keep one of them")
    return [system | first | {"content": _words(first) or _words(system)}, *messages[1:]]


def _bare(message: Message) -> Message:
    return message | {"content": _words(message).strip()}


def _words(message: Message) -> str:
    return message["content"] or ""
