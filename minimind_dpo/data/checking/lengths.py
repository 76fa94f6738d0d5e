"""How long pairs are, and what each of several `max_length` would cut."""

from __future__ import annotations

from typing import Any

import numpy as np

_USUAL = (128, 256, 512, 768, 1024, 2048)
_LARGEST = 1 << 20


def describe_lengths(rows: np.ndarray, max_length: int) -> dict[str, Any]:
    """The `lengths` of the report: tokens of prompt and answers, and a table over `max_length`.

    Args:
        rows: [N] `ROW`s.
        max_length: of the run, always in the table.
    """
    parts = {name: _spread(rows[name]) for name in ("prompt", "chosen", "rejected")}
    longer = np.maximum(rows["chosen_side"], rows["rejected_side"])
    table = [_cut_at(length, longer, rows["needs"]) for length in _lengths(longer, max_length)]
    return parts | {"longer_side": _spread(longer), "table": table}


def length_bias(rows: np.ndarray) -> float | None:
    """The share of pairs whose chosen side is longer; None of no pairs."""
    return float((rows["chosen_side"] > rows["rejected_side"]).mean()) if len(rows) else None


def _lengths(longer: np.ndarray, max_length: int) -> list[int]:
    """Those that are usual, doubled further until nothing is cut, and the run's own."""
    longest, lengths = int(longer.max(initial=0)), [*_USUAL]
    while lengths[-1] < min(longest, _LARGEST):
        lengths.append(2 * lengths[-1])
    return sorted({*lengths, max_length})


def _spread(tokens: np.ndarray) -> dict[str, Any]:
    if not len(tokens):
        return {"median": None, "p95": None, "longest": None}
    p95 = np.percentile(tokens, 95, method="higher")
    return {"median": float(np.median(tokens)), "p95": int(p95), "longest": int(tokens.max())}


def _cut_at(length: int, longer: np.ndarray, needs: np.ndarray) -> dict[str, Any]:
    """Shares of pairs: with a side that is cut, and of these left out since nothing is left to learn from."""
    pairs = max(len(longer), 1)
    truncated, dropped = int((longer > length).sum()), int((needs > length).sum())
    return {"max_length": length, "truncated": truncated / pairs, "dropped": dropped / pairs}
