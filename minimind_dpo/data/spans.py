"""Where the assistant's turns lie in a rendered conversation, found from the chat template's own structure.

Looking for marker text such as `<|im_start|>assistant` would also find markers that a user typed. Here a turn is
found by rendering the conversation once more with that turn's words replaced by a mark: whatever stands before the
mark and after it is the template's and the other turns', whatever they say. Where a turn *begins* is where
generation would have begun: after what the template writes between the previous turn's words and the answer.

A message's words are all that it says: its content, its thoughts, the names and arguments of its calls.
"""

from __future__ import annotations

import json
import os
import re
from functools import cached_property, lru_cache
from typing import Any

import jinja2

from minimind_dpo.config import TEMPLATE_DATE
from minimind_dpo.data.messages import Message
from minimind_dpo.data.template import SafeTemplate
from minimind_dpo.errors import UserError

# A generation prompt may end with an (empty) thinking block; what is thought belongs to the answer.
_THINKING = re.compile(r"[<\[]\|?\w*think", re.IGNORECASE)
_REASONING = ("reasoning_content", "reasoning", "thinking")  # the names under which transformers passes it on
_RENDER_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError
)  # fmt: skip


class TemplateError(Exception):
    """The chat template refuses a conversation (a wrong order of roles, say)."""


class SpanError(Exception):
    """The chat template renders a turn in a way that hides where it begins or ends."""


class ChatTemplate:
    """A tokenizer's chat template: renders conversations and finds the assistant's turns in them."""

    def __init__(self, tokenizer: Any, date: str = TEMPLATE_DATE) -> None:
        self.tokenizer = tokenizer
        self._date = date
        self._compiled: dict[str, SafeTemplate] = {}
        self._leads: dict[tuple[Any, ...], tuple[str, int]] = {}
        self._terminator: str | None = None

    def render(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text, the next answer's header at its end if `add_generation_prompt`.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        # What `apply_chat_template` does, but for the template's clock and bounds.
        source = self.tokenizer.get_chat_template(tools=tools)
        if source not in self._compiled:
            self._compiled[source] = SafeTemplate(source, self._date)
        try:
            return self._compiled[source].render(
                messages=[_as_templates_read(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except UserError:
            raise
        except _RENDER_ERRORS as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from None

    @cached_property
    def arguments(self) -> type | None:
        """What the template wants as arguments of a call: an object (`dict`), JSON text (`str`), or either (None)."""
        given = {"city": "MARK"}
        as_object, as_text = (self._render_call(arguments) for arguments in (given, json.dumps(given)))
        takes_text = '"city"' in as_text
        takes_object = "MARK" in as_object and "'city'" not in as_object
        return None if takes_text == takes_object else str if takes_text else dict

    def _render_call(self, arguments: Any) -> str:
        """A conversation with a call, as text; empty where the template refuses it."""
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages: list[Message] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3", "name": "f", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "answer"},
        ]
        try:
            return self.render(messages)
        except TemplateError:
            return ""

    def assistant_span(self, text: str, messages: list[Message], tools: Any, index: int) -> tuple[int, int]:
        """Start and end of turn `index` in `text`, the rendered conversation; the end includes the end marker.

        Raises:
            SpanError: the template doesn't keep what is before and after the turn.
            TemplateError: the template refuses the conversation.
        """
        mark = _unused("A", text)
        probe = self.render(_marked(messages, {index: mark}), tools)
        first, last = probe.find(mark), probe.rfind(mark) + len(mark)
        if first < 0:
            raise SpanError(f"the template leaves out the words of message {index}")
        start = first - self._lead(messages, tools, index, probe[:first], text)
        closing = last + self._calls_length(messages, tools, index, text)
        if not probe.startswith(self.terminator, closing):
            raise SpanError(f"message {index} doesn't end with the template's end marker {self.terminator!r}")
        end = len(text) - (len(probe) - closing - len(self.terminator))
        closed = end - len(self.terminator)
        if start > closed or text[:start] != probe[:start] or text[closed:] != probe[closing:]:
            raise SpanError(f"the template renders what surrounds message {index} differently, depending on its words")
        return start, end

    @property
    def terminator(self) -> str:
        """What the template writes after every answer, e.g. `<|im_end|>\\n`."""
        if self._terminator is None:
            words = ["question", "MARK0", "question", "MARK1"]
            roles = ["user", "assistant", "user", "assistant"]
            text = self.render([{"role": r, "content": c} for r, c in zip(roles, words, strict=True)])
            after = [text.partition(words[1])[2], text.partition(words[3])[2]]
            self._terminator = os.path.commonprefix(after)
        return self._terminator

    def _calls_length(self, messages: list[Message], tools: Any, index: int, text: str) -> int:
        """How many characters the template writes between the last mark of a turn with tool calls and its end."""
        if "tool_calls" not in messages[index]:
            return 0
        # The end marker must come before the next message's words: a later turn has one too.
        here, there = _unused("A", text), _unused("B", text)
        full = self.render(_marked(messages, {index: here, index + 1: there}), tools)
        return max(full.rpartition(here)[2].partition(there)[0].find(self.terminator), 0)

    def _lead(self, messages: list[Message], tools: Any, index: int, before: str, text: str) -> int:
        """How many characters of turn `index` stand before its words (a thinking block, a space, a call's syntax).

        Conversations of the same shape share the answer, so it is taken from a stand-in of that shape, once. The
        shape isn't all that templates look at, so the stand-in must fit; else the conversation itself is measured.
        """
        simple = not any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if simple:
            shape = tuple((m["role"], any(m.get(name) for name in _REASONING)) for m in messages)
            key = (shape, bool(tools), index)
            if key not in self._leads:
                stand_in = [
                    {"role": role, "content": f"words{i}"} | ({"reasoning_content": f"thoughts{i}"} if thinks else {})
                    for i, (role, thinks) in enumerate(shape)
                ]
                self._leads[key] = self._measure_lead(stand_in, tools, index, text)
            between, lead = self._leads[key]
            if before.endswith(between):
                return lead
        between, lead = self._measure_lead(messages, tools, index, text)
        if not before.endswith(between[len(between) - lead :]):
            raise SpanError(f"the template's text before message {index} depends on the words around it")
        return lead

    def _measure_lead(self, messages: list[Message], tools: Any, index: int, text: str) -> tuple[str, int]:
        """The text between the previous turn's words and those of turn `index`, and how much of it is the turn's."""
        here, there = _unused("A", text), _unused("B", text)
        full = self.render(_marked(messages, {index: here, index - 1: there}), tools)
        before, found, _ = full.partition(here)
        if not found:
            raise SpanError(f"the template leaves out the words of message {index}")
        if index == 0:
            header = self._header()
            if header not in before:
                raise SpanError("the template doesn't announce an assistant message that comes first")
            return before, len(before) - before.rfind(header) - len(header)
        if there not in before:
            raise SpanError(f"the template leaves out the words of message {index - 1}")
        between = before.rpartition(there)[2]
        asked = self.render(_marked(messages[:index], {index - 1: there}), tools, add_generation_prompt=True)
        opening = os.path.commonprefix([asked.rpartition(there)[2], between])
        thinking = _THINKING.search(opening)
        return between, len(between) - (thinking.start() if thinking else len(opening))

    def _header(self) -> str:
        """What announces an assistant message, e.g. `<|im_start|>assistant\\n`."""
        question = [{"role": "user", "content": "question"}]
        asked, unasked = self.render(question, add_generation_prompt=True), self.render(question)
        header = asked[len(unasked) :] if asked.startswith(unasked) else ""
        thinking = _THINKING.search(header)
        return header[: thinking.start()] if thinking else header


@lru_cache(maxsize=8)
def _chat_template(tokenizer: Any, source: str, date: str) -> ChatTemplate:
    return ChatTemplate(tokenizer, date)


def chat_template(tokenizer: Any, date: str = TEMPLATE_DATE) -> ChatTemplate:
    """The tokenizer's chat template, kept with what was learnt about it; `date` (`YYYY-MM-DD`) is today's in it."""
    return _chat_template(tokenizer, str(tokenizer.chat_template), date)


def _as_templates_read(message: Message) -> Message:
    """As transformers passes a message on: without absent fields, thoughts under each name that templates know."""
    message = {name: value for name, value in message.items() if value is not None}
    thoughts = next((message[name] for name in _REASONING if name in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _marked(messages: list[Message], marks: dict[int, str]) -> list[Message]:
    """The messages, with every word of some of them replaced by a mark; which fields they have stays the same."""
    return [_mark(message, marks[i]) if i in marks else message for i, message in enumerate(messages)]


def _mark(message: Message, mark: str) -> Message:
    marked = dict(message)
    if message["content"] or "tool_calls" not in message:
        marked["content"] = mark
    marked |= {name: mark for name in _REASONING if message.get(name)}
    if "tool_calls" in message:
        marked["tool_calls"] = [_mark_call(call, mark) for call in message["tool_calls"]]
    return marked


def _mark_call(call: Any, mark: str) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _mark_call(call["function"], mark)}
    empty = "{}" if isinstance(call.get("arguments"), str) else {}  # some templates take text, some objects
    return call | {"name": mark, "arguments": empty}


def _unused(letter: str, text: str) -> str:
    """A mark that stands nowhere in the text: letters and digits only, so that no template trims or escapes it."""
    number = 0
    while (mark := f"MARK{letter}{number}MARK") in text:
        number += 1
    return mark
