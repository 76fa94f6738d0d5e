"""One row checked by itself: what is wrong with it, and the few numbers that comparing it with others takes."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from minimind_dpo.data.chat import WHOLE, TokenizedPair, shared_prefix_length
from minimind_dpo.data.checking.rules import (
    double_bos,
    early_parting,
    empty_prompt,
    missing_end_token,
    prompt_difference,
    repeated_prompt,
)
from minimind_dpo.data.drops import DroppedRow, encode_whole, find_drop
from minimind_dpo.data.processes import RowBlock, Settings
from minimind_dpo.data.records import Message, PreferencePair, RowError, parse_line
from minimind_dpo.data.said import asked, is_long, said

# Of a pair that has a signal at some `max_length`: where it was read; tokens of the prompt, of both answers and of both
# whole sides; the least `max_length` that keeps it; digests of both conversations, and of a prompt that is long
# enough to be recognised (else 0). 60 bytes.
ROW = np.dtype(
    [("file", "<i4"), ("row", "<i8")]
    + [(name, "<i4") for name in ("prompt", "chosen", "rejected", "chosen_side", "rejected_side", "needs")]
    + [(name, "<u8") for name in ("chosen_key", "rejected_key", "prompt_key")]
)
_encode = json.JSONEncoder(sort_keys=True, default=str).encode  # a pair's columns can hold anything that Arrow can

Finding = tuple[int, str, str]  # index of the row in its block, reason, detail


@dataclass(frozen=True, slots=True)
class CheckedBlock:
    """What was found in a block of rows, and a `ROW` of each pair that has a signal."""

    findings: list[Finding]
    rows: np.ndarray


def check_block(block: RowBlock, tokenizer: Any, settings: Settings) -> CheckedBlock:
    """Check each row of a block by itself.

    Raises:
        UserError: no row at all can be tokenized with this tokenizer or these settings.
    """
    findings: list[Finding] = []
    records = []
    for index, (file, row, place, payload) in enumerate(block):
        found, record = _check_row(payload, place, tokenizer, settings)
        findings += [(index, reason, detail.removeprefix(f"{place}: ")) for reason, detail in found]
        if record is not None:
            records.append((file, row, *record))
    return CheckedBlock(findings, np.array(records, dtype=ROW))


def _check_row(
    payload: Any, place: str, tokenizer: Any, settings: Settings
) -> tuple[list[tuple[str, str]], tuple[Any, ...] | None]:
    """The findings of a row, and its numbers as `ROW` has them, without its place."""
    try:
        pair = parse_line(payload, place, dict(settings.columns))
        whole = encode_whole(pair, tokenizer, settings.completion_mask, settings.template_date)
    except RowError as error:
        return [("malformed_row", str(error))], None
    drop = whole if isinstance(whole, DroppedRow) else find_drop(pair, whole, settings.max_length)
    found = [(drop.reason, drop.message)] if drop else []
    if isinstance(whole, DroppedRow) or (drop and find_drop(pair, whole, WHOLE)):
        return found, None
    longest = max(len(whole.chosen_input_ids), len(whole.rejected_input_ids))
    if longest > settings.max_length:
        found.append(("truncated", f"{longest} tokens for max_length {settings.max_length}"))
    if drop is None:
        rules = {
            "prompt_differs": prompt_difference(pair),
            "repeats_prompt": repeated_prompt(pair),
            "empty_prompt": empty_prompt(pair, tokenizer),
            "parts_early": early_parting(pair),
            "double_bos": double_bos(pair, whole, tokenizer),
            "missing_end_token": missing_end_token(whole, tokenizer),
        }
        found += [(reason, detail) for reason, detail in rules.items() if detail]
    return found, (*_lengths(whole), *_keys(pair))


def _lengths(whole: TokenizedPair) -> tuple[int, ...]:
    """Tokens of prompt, answers and sides, and the least `max_length` at which `find_drop` lets the pair pass."""
    chosen, rejected = (np.asarray(array("i", ids)) for ids in (whole.chosen_input_ids, whole.rejected_input_ids))
    masks = whole.chosen_completion_mask, whole.rejected_completion_mask
    # The answer is the last run of counted tokens; the first token of a side never counts.
    starts = [bytes(mask).rindex(b"\0\1") + 1 for mask in masks]
    same = shared_prefix_length(chosen, rejected)
    same += bool(chosen[same] == rejected[same])  # one side may be the beginning of the other
    needs = 1 + max(same, *(mask.index(1) for mask in masks))
    return starts[0], len(chosen) - starts[0], len(rejected) - starts[1], len(chosen), len(rejected), needs


def _keys(pair: PreferencePair) -> tuple[int, int, int]:
    shared, prompt = pair.prompt_messages, asked(pair)
    head = _encode([pair.tools, list(map(_as_written, pair.chosen[:shared]))])
    chosen, rejected = (
        _digest(head + _encode(list(map(_as_written, side[shared:])))) for side in (pair.chosen, pair.rejected)
    )
    long = is_long("".join(words for role, words in prompt if role != "system"))
    return chosen, rejected, _digest(_encode(prompt)) if long else 0


def _as_written(message: Message) -> Message:
    """A message with all its fields; white space is taken to be the same everywhere."""
    return message | {"content": said(message)[1]}


def _digest(text: str) -> int:
    """8 bytes that name a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
