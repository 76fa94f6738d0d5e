"""Prompts that a model is asked to answer: of held-out pairs, or of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimind_dpo.data.json_text import load_json, without_nulls
from minimind_dpo.data.messages import Message
from minimind_dpo.data.raw import kept_pairs
from minimind_dpo.data.records import parse_line
from minimind_dpo.data.rows import BOM
from minimind_dpo.data.sources import Source, find_files, read_rows
from minimind_dpo.data.spans import TemplateError, chat_template
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.errors import UserError

_TEXT = ".txt"


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        text: what its last message says, for people.
        ids: all of it as the model sees it, the answer's header at the end.
    """

    text: str
    ids: list[int]


def read_prompts(
    told: str, sets: Sequence[tuple[Sequence[Source], TokenizedData]], tokenizer: Any, columns: Sequence[str], date: str
) -> list[Prompt]:
    """The prompts that `generate_prompts` names.

    Args:
        told: a file, or how many of the held-out pairs of each set, from the first on.
        sets: held-out pairs, and what they were made of.
        tokenizer: of the model.
        columns: as the data was read with.
        date: what a chat template takes for today.

    Raises:
        UserError: there is no such file, or a row of it has no prompt.
    """
    if told.isdigit():
        pairs = [pair for source, data in sets for pair in kept_pairs(source, data, columns, int(told))]
        return [_encoded(_before_answer(pair), pair.tools, pair.prefill, tokenizer, date) for pair in pairs]
    path = Path(told).expanduser()
    if path.suffix == _TEXT and path.is_file():
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        asked = [([_user(line)], None, "") for line in lines if line]
    else:
        asked = [_asked(payload, file.place(row)) for file in find_files(told) for row, payload in read_rows(file)]
    if not asked:
        raise UserError(f"generate_prompts: {told} holds no prompt")
    return [_encoded(messages, tools, prefill, tokenizer, date) for messages, tools, prefill in asked]


def _asked(payload: Any, place: str) -> tuple[list[Message], Any, str]:
    """Messages, tools, and the answer's beginning, of a row of prompts or of preferences."""
    row = payload if isinstance(payload, dict) else load_json(payload.removeprefix(BOM).decode("utf-8"), place)
    row = without_nulls(row) if isinstance(row, dict) else {}
    if "chosen" in row or "rejected" in row:
        pair = parse_line(payload, place)
        return _before_answer(pair), pair.tools, pair.prefill
    prompt = row.get("prompt", row.get("messages"))
    messages = [_user(prompt)] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise UserError(f"{place}: no prompt: a row has prompt or messages, a text or a list of {{role, content}}")
    return messages, None, ""


def _before_answer(pair: Any) -> list[Message]:
    """What comes before the first answer in which the two sides differ."""
    roles = [message["role"] for message in pair.chosen]
    return pair.chosen[: roles.index("assistant", pair.prompt_messages)]


def _encoded(messages: list[Message], tools: Any, prefill: str, tokenizer: Any, date: str) -> Prompt:
    said = str(messages[-1]["content"]) if messages else ""
    text = "".join(str(message["content"]) for message in messages)
    if tokenizer.chat_template:
        try:
            text = chat_template(tokenizer, date).render(messages, tools, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"generate_prompts: the chat template refuses {said!r}: {error}") from None
    return Prompt(said, tokenizer(text + prefill, add_special_tokens=False)["input_ids"])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
