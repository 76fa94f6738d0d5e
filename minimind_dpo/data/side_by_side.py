"""A pair in a terminal: chosen on the left, rejected on the right, what both share above what is their own."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from minimind_dpo.data.chat import TokenizedPair, shared_prefix_length

COUNTED, SHARED = "green", "dim"
_FRAME = 5  # columns of the terminal that are beside and between the two sides
_BROKEN = "\ufffd"  # what half a character is decoded to


def side_by_side(pair: TokenizedPair, tokenizer: Any, width: int) -> Table:
    """Both sides in columns of the same width; counted tokens green, the shared prefix dim.

    Args:
        pair: cut off where the model sees no more of it.
        tokenizer: its tokenizer.
        width: columns of the terminal.
    """
    shared = shared_prefix_length(pair.chosen_input_ids, pair.rejected_input_ids)
    at = _whole_characters(pair.chosen_input_ids, shared, tokenizer)
    sides = [
        ("chosen", pair.chosen_input_ids, pair.chosen_completion_mask),
        ("rejected", pair.rejected_input_ids, pair.rejected_completion_mask),
    ]
    table = Table(box=box.SIMPLE, pad_edge=False, title=pair.place, title_justify="left")
    for name, ids, mask in sides:
        header = f"{name}: {len(ids)} tokens, {sum(mask)} count"
        table.add_column(header, width=max((width - _FRAME) // 2, 1), overflow="fold")
    table.add_row(*(_paint(ids[:at], mask[:at], tokenizer, SHARED) for _, ids, mask in sides))
    table.add_row(*[Text(f"▲ {shared} shared tokens", style=SHARED)] * 2)
    table.add_row(*(_paint(ids[at:], mask[at:], tokenizer) for _, ids, mask in sides))
    return table


def _paint(ids: Sequence[int], mask: Sequence[int], tokenizer: Any, style: str = "") -> Text:
    text = Text()
    for counts, run in groupby(zip(mask, ids, strict=True), key=lambda item: item[0]):
        words = tokenizer.decode(
            [token for _, token in run], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text.append(_visible(words), style=f"{style} {COUNTED if counts else ''}".strip())
    return text


def _whole_characters(ids: Sequence[int], length: int, tokenizer: Any) -> int:
    """The most tokens, of the first `length`, that end with a character: two sides may part in the midst of one."""
    for at in range(length, max(length - 4, 0), -1):
        if not tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False).endswith(_BROKEN):
            return at
    return length


def _visible(text: str) -> str:
    """What a terminal would obey instead of showing it, shown; a new line is one, and has a mark, since it counts."""
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character < " ":
        return chr(0x2400 + ord(character))
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character != "\u200d"  # the joiner of emoji
    return f"<{ord(character):04X}>" if hidden else character
