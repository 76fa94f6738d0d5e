"""Texts as token ids, and a mask of the tokens that begin in given spans of a text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]  # a range of characters, its end excluded


def encode_texts(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]], inside: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Ids [T] and mask [T] of each text; the ids are the tokenizer's own for the whole text, no special tokens added.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: [N] texts.
        spans: for each text the spans in it that count, disjoint and sorted.
        inside: whether the first spans begin inside what was said, see `mask_tokens`.

    Raises:
        UnicodeEncodeError, TypeError: a text holds half a surrogate pair.
    """
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,  # no warning of a text that is longer than the model's context: `max_length` cuts it later
    )
    masks = (mask_tokens(*side, inside) for side in zip(batch["offset_mapping"], spans, strict=True))
    return list(zip(batch["input_ids"], masks, strict=True))


def mask_tokens(offsets: Sequence[Span], spans: Sequence[Span], inside: bool = False) -> list[int]:
    """1 for each token whose first character lies in a span, else 0; nothing predicts the first token, so it has 0.

    Args:
        offsets: the tokens' characters, [T] pairs of start and end in text order.
        spans: disjoint character ranges, sorted.
        inside: the first span begins inside what was said, where a token may lie on both sides of its start: one that
            reaches into the span counts, for it says how the span begins. (A header's last token never counts.)
    """

    def begin(index: int) -> int:
        first, last = offsets[index]
        if first != last:
            return first
        # Some tokenizers report a token of spaces as empty, standing behind them: it begins where the last one ended.
        ends = (end for start, end in map(offsets.__getitem__, range(index - 1, -1, -1)) if start != end)
        return min(first, next(ends, 0))

    mask = [0] * len(offsets)
    tokens, low = range(len(offsets)), 0
    for start, end in spans:
        low = bisect_left(tokens, start, lo=low, key=begin)
        high = bisect_left(tokens, end, lo=low, key=begin)
        if inside and start == spans[0][0] and low > 0 and offsets[low - 1][1] > start:
            low -= 1
        mask[low:high] = [1] * (high - low)
        low = high
    mask[:1] = [0] * len(mask[:1])
    return mask
