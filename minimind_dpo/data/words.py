"""Plain ASCII text as tokens, with every distinct word encoded by the tokenizer once.

Byte-level BPE first takes out added tokens, then splits what is left into words by GPT-2's pattern, and encodes each
word by itself. In ASCII the pattern's classes are a handful of characters and beyond doubt, so text can be split here
and a word looked up; what a word's tokens are, the tokenizer says. Any other text, and any other kind of tokenizer, is
left to the tokenizer as a whole.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from itertools import accumulate, chain
from typing import Any

# GPT-2's pattern with \p{L}, \p{N} and \s written out for ASCII (Python's own \s has four control characters more), and
# letters first: no other part matches where they do.
_WORD = re.compile(r" ?[A-Za-z]+|'(?:s|t|re|ve|m|ll|d)| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+")
_MOST_CHARACTERS = 4_000_000  # in the table of words, so that memory doesn't grow with the data


class WordEncoder:
    """Encodes ASCII texts word by word."""

    def __init__(self, backend: Any, cuts: list[str], others: list[str]) -> None:
        """`cuts` are the added tokens that may stand in a text, `others` those that are left to the tokenizer."""
        self._backend = backend
        self._cuts = re.compile(f"({'|'.join(map(re.escape, cuts))})")
        self._others = re.compile("|".join(map(re.escape, others))) if others else None
        self._known: dict[str, list[int]] = {}
        self._characters = 0

    def encode(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]] | None:
        """Ids, and 1 for each token that begins in a span; None if the tokenizer itself must look."""
        if not text.isascii() or (self._others and self._others.search(text)):
            return None
        words: list[str] = []
        for index, part in enumerate(self._cuts.split(text)):
            if index % 2:
                words.append(part)
            else:
                words += _WORD.findall(part)
        try:
            tokens = [self._known[word] for word in words]
        except KeyError:
            self._learn(dict.fromkeys(words))
            tokens = [self._known[word] for word in words]
        mask = _mask(words, tokens, spans) if spans else [0] * sum(map(len, tokens))
        return None if mask is None else (list(chain.from_iterable(tokens)), mask)

    def _learn(self, words: dict[str, None]) -> None:
        if self._characters > _MOST_CHARACTERS:
            self._known, self._characters = {}, 0
        new = [word for word in words if word not in self._known]
        for word, encoding in zip(new, self._backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self._known[word] = encoding.ids
            self._characters += len(word)


def splits_like_gpt2(backend: Any) -> bool:
    """Whether a tokenizer of independent parts is byte-level BPE with nothing before GPT-2's pattern."""
    if backend.normalizer is not None or backend.pre_tokenizer is None or type(backend.model).__name__ != "BPE":
        return False
    part = json.loads(backend.pre_tokenizer.__getstate__())
    return part["type"] == "ByteLevel" and part.get("use_regex") is True and part["add_prefix_space"] is False


def _mask(words: list[str], tokens: list[list[int]], spans: list[tuple[int, int]]) -> list[int] | None:
    """1 for the tokens of the words in the spans; None where a span begins or ends inside of a word."""
    starts = [0, *accumulate(map(len, words))]
    counts = [0, *accumulate(map(len, tokens))]
    mask = [0] * counts[-1]
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        if starts[first] != start or starts[last] != end:
            return None
        mask[counts[first] : counts[last]] = [1] * (counts[last] - counts[first])
    return mask
