"""What only shows when rows are compared: copies, contradictions, leaks. Rows are compared by 8-byte digests.

That two of N different rows have the same digest has a probability of about N^2 / 2^65: 3 in 10^8 for 10^6 rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Repeat = tuple[int, str, int]  # index of a row, reason, index of the row that it repeats, contradicts or leaks into


def find_repeats(rows: np.ndarray) -> Iterator[Repeat]:
    """Rows whose pair has occurred before (`duplicate_pair`), or has occurred the other way round.

    Args:
        rows: [N] `ROW`s in file order.

    Yields:
        In file order; each later row, with the first of those that it copies or contradicts.
    """
    groups, group = np.unique(_pair_keys(rows), return_inverse=True)
    direction = (rows["chosen_key"] > rows["rejected_key"]).astype(np.int64)
    index = np.arange(len(rows))
    first = np.full((2, len(groups)), len(rows))  # of each group the first row in either direction
    np.minimum.at(first, (direction, group), index)
    copied, reversed_ = first[direction, group], first[1 - direction, group]
    for row in np.flatnonzero((copied < index) | (reversed_ < index)).tolist():
        if copied[row] < row:
            yield row, "duplicate_pair", int(copied[row])
        if reversed_[row] < row:
            yield row, "contradictory_pair", int(reversed_[row])


def find_leaks(rows: np.ndarray, evaluation: np.ndarray) -> Iterator[Repeat]:
    """Rows that are in the evaluation data too, in either direction, or whose prompt is there and is a long one.

    Args:
        rows: [N] `ROW`s of the training data.
        evaluation: [M] `ROW`s of the evaluation data; the third number of a `Repeat` is an index of these.

    Yields:
        In file order.
    """
    pairs = _lookup(_pair_keys(evaluation), _pair_keys(rows))
    prompts = _lookup(evaluation["prompt_key"], rows["prompt_key"])
    prompts[rows["prompt_key"] == 0] = -1
    leaked = np.where(pairs >= 0, pairs, prompts)
    for row in np.flatnonzero(leaked >= 0).tolist():
        yield row, "leak_into_eval", int(leaked[row])


def _pair_keys(rows: np.ndarray) -> np.ndarray:
    """[N] 8 bytes for each pair, the same whichever side is chosen."""
    low, high = (side(rows["chosen_key"], rows["rejected_key"]) for side in (np.minimum, np.maximum))
    return low * np.uint64(0x9E3779B97F4A7C15) + high


def _lookup(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted key first stands in `keys`, or -1."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    return np.where(keys[order[at]] == wanted, order[at], -1)
