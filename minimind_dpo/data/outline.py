"""What a chat template writes around the messages of a conversation of one shape, learnt once and checked each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain


@dataclass(frozen=True, slots=True)
class Outline:
    """A rendered conversation without its words.

    Attributes:
        literals: the template's text before each of the N messages' words, and after the last: N + 1 strings.
        trims: for each message whether the template strips its words.
        turns: for each assistant message how many characters of its turn come before and after its words.
    """

    literals: tuple[str, ...]
    trims: tuple[bool, ...]
    turns: dict[int, tuple[int, int]]

    def fill(self, contents: Sequence[str]) -> list[str]:
        """The text of these messages in 2 N + 1 parts: literal, words, literal, ..., words, literal."""
        words = (said.strip() if trim else said for said, trim in zip(contents, self.trims, strict=True))
        return [self.literals[0], *chain.from_iterable(zip(words, self.literals[1:], strict=True))]

    def spans(self, text: str, contents: Sequence[str], indices: Sequence[int]) -> list[tuple[int, int]] | None:
        """Start and end of the turns `indices` in `text`; None if it is not this outline filled with `contents`."""
        parts = self.fill(contents)
        if "".join(parts) != text:
            return None
        ends = list(accumulate(map(len, parts)))
        return [(ends[2 * i] - self.turns[i][0], ends[2 * i + 1] + self.turns[i][1]) for i in indices]


def stand_ins(count: int) -> list[str]:
    """Words to stand for those of each message: all different, and none part of another."""
    return [f"WORDS{index}WORDS" for index in range(count)]


def learn(text: str, padded: str, count: int, turns: dict[int, tuple[int, int]]) -> Outline | None:
    """The outline behind two renderings of one shape; None if the template doesn't write every message's words once.

    Args:
        text: the conversation with `stand_ins` for words.
        padded: the same with a space before and after all words.
        count: messages.
        turns: start and end in `text` of each assistant message's turn.
    """
    literals, places, position, words = [], [], 0, stand_ins(count)
    for mark in words:
        found = text.find(mark, position)
        if found < 0 or text.count(mark) != 1:
            return None
        literals.append(text[position:found])
        position = found + len(mark)
        places.append((found, position))
    around = {index: (places[index][0] - start, end - places[index][1]) for index, (start, end) in turns.items()}
    trims = tuple(f" {mark} " not in padded for mark in words)
    outline = Outline((*literals, text[position:]), trims, around)
    return outline if "".join(outline.fill([f" {mark} " for mark in words])) == padded else None
