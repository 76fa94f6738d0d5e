"""Pairs' values as figures: means with intervals, over all pairs, by group and by difference of length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minimind_dpo.errors import UserError
from minimind_dpo.evaluation.intervals import intervals
from minimind_dpo.evaluation.pairs import PairValues

_MOST_GROUPS = 100
_MARGINS = "rewards/margins"
# by how many times as many counted tokens the chosen answer has as the rejected one: name, and the range's ends
_LENGTHS = (
    ("chosen less than half as long", 0.0, 0.5),
    ("chosen shorter", 0.5, 1.0),
    ("as long", 1.0, 1.0),
    ("chosen longer", 1.0, 2.0),
    ("chosen more than twice as long", 2.0, np.inf),
)


def figures(values: PairValues, groups: Sequence[str] | None, seed: int) -> dict[str, Any]:
    """All figures of N pairs.

    Args:
        values: of the pairs.
        groups: [N] names of the group that each pair belongs to.
        seed: of the intervals.

    Returns:
        `pairs`, the mean of each metric under its name, `interval` (their 95 % intervals), `length_correlation`
        (Pearson's, of margins and differences of length in counted tokens; None where there is none), `by` and
        `by_length` (the same for each group).

    Raises:
        UserError: the groups are too many to be read.
    """
    by = np.asarray([] if groups is None else groups)
    names = sorted(set(by.tolist()))
    if len(names) > _MOST_GROUPS:
        raise UserError(
            f"--by: {len(names)} different values are no groups; name a column with {_MOST_GROUPS} or fewer"
        )
    return {
        **_summary(values, seed),
        "length_correlation": _length_correlation(values),
        "by": {name: _summary(values.at(by == name), seed) for name in names},
        "by_length": _by_length(values, seed),
    }


def _summary(values: PairValues, seed: int) -> dict[str, Any]:
    table = np.stack(list(values.metrics.values()), axis=1)
    means = table.mean(axis=0)
    bounds = intervals(table, seed)
    return {
        "pairs": len(values),
        **{name: float(mean) for name, mean in zip(values.metrics, means, strict=True)},
        "interval": {name: [float(low), float(high)] for name, (low, high) in zip(values.metrics, bounds, strict=True)},
    }


def _by_length(values: PairValues, seed: int) -> dict[str, Any]:
    ratio = values.chosen_tokens / values.rejected_tokens
    found = {}
    for name, low, high in _LENGTHS:
        if low == high:
            members = ratio == low
        elif high <= 1:
            members = (low <= ratio) & (ratio < high)
        else:
            members = (low < ratio) & (ratio <= high)
        if members.any():
            found[name] = _summary(values.at(members), seed)
    return found


def _length_correlation(values: PairValues) -> float | None:
    if _MARGINS not in values.metrics:
        return None
    margins = values.metrics[_MARGINS] - values.metrics[_MARGINS].mean()
    longer = (values.chosen_tokens - values.rejected_tokens).astype(np.float64)
    longer -= longer.mean()
    scale = float(np.sqrt((margins * margins).sum() * (longer * longer).sum()))
    return float((margins * longer).sum()) / scale if scale > 0 else None
