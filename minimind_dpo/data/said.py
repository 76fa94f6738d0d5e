"""What was said, whatever way it is written: so that one prompt is one prompt to the split, and to `data check`."""

from __future__ import annotations

import re
import unicodedata

from minimind_dpo.data.records import Message, PreferencePair

# Characters without width: soft hyphen, zero-width space and joiners, word joiner, byte order mark.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_NO_THOUGHTS = re.compile(r"<think>\s*</think>")
_LONG = 24  # characters, wide ones count double; "How are you?" may well stand in two data sets
_WIDE = "\u2e80"  # from here on a character is taken to be as wide as two


def plain_words(text: str) -> str:
    """A text with single spaces for all white space, none around it, composed characters (NFC), nothing unseen."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_UNSEEN))
    return " ".join(text.split())


def said(message: Message) -> tuple[str, str]:
    """Who said what; a message's other fields are no part of it."""
    return message["role"], plain_words(str(message.get("content") or ""))


def asked(pair: PreferencePair) -> list[tuple[str, str]]:
    """What is asked: the messages that both sides share, but for the system's where there are others."""
    shared = pair.chosen[: pair.prompt_messages] or pair.chosen[:-1]
    told = list(map(said, shared))
    return [(role, words) for role, words in told if role not in ("system", "developer")] or told


def is_long(words: str) -> bool:
    """Whether a text is long enough to be recognised as the same one."""
    return len(words) >= _LONG or sum(1 + (character >= _WIDE) for character in words) >= _LONG


def is_empty(message: Message) -> bool:
    """Whether a message has neither words, nor thoughts, nor a tool call; an empty block of thoughts is none."""
    spoken = ("content", "reasoning_content", "reasoning", "thinking")
    texts = (_NO_THOUGHTS.sub("", str(message.get(name) or "")) for name in spoken)
    return not message.get("tool_calls") and not any(map(plain_words, texts))
