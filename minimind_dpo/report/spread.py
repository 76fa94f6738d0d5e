"""How values are spread over pairs: counts in bins that any two moments of a run share, and what length has to do with
it.

Pure functions on numpy arrays: training writes what they give into `record/`, the page draws it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

_MOST_BINS = 64
_FINEST = -10  # bins of rewards are never narrower than 2 ** -10
_GROUPS = 5
QUANTILES = (5, 25, 50, 75, 95)


def histogram(values: np.ndarray, finest: int = _FINEST) -> dict[str, Any]:
    """Counts of finite values in bins whose edges are multiples of a power of two, at most about 64 of them.

    Histograms of different moments are brought to the wider bins of the two by adding neighbours, exactly.

    Args:
        values: [N].
        finest: bins are 2 ** finest wide at least; 0 for whole numbers.

    Returns:
        `power`: bins are 2 ** power wide; `first`: the lowest bin begins at first * 2 ** power; `counts`.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return {"power": finest, "first": 0, "counts": []}
    low, high = float(values.min()), float(values.max())
    power = max(finest, math.ceil(math.log2(max(high - low, 1e-9) / _MOST_BINS)))
    places = np.floor(values / 2.0**power).astype(np.int64)
    first = int(places.min())
    return {"power": power, "first": first, "counts": np.bincount(places - first).tolist()}


def widen(bins: dict[str, Any], power: int) -> dict[str, Any]:
    """The same counts in bins 2 ** power wide, which are no narrower."""
    ratio = 2 ** (power - bins["power"])
    first = bins["first"] // ratio
    counts = [0] * ((bins["first"] + max(len(bins["counts"]), 1) - 1) // ratio - first + 1)
    for place, count in enumerate(bins["counts"]):
        counts[(bins["first"] + place) // ratio - first] += count
    return {"power": power, "first": first, "counts": counts}


def describe_rewards(chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """What `rewards.jsonl` tells of an evaluation.

    Args:
        chosen, rejected: [N] rewards.
        lengths: [N] counted tokens of the chosen side less those of the rejected one.

    Returns:
        `chosen` and `rejected`: histograms of rewards; `margins`: their quantiles at 5, 25, 50, 75 and 95 %;
        `length_correlation` of margin and difference of lengths (None where either does not vary); `by_length`.
    """
    margins = chosen - rejected
    return {
        "pairs": len(margins),
        "chosen": histogram(chosen),
        "rejected": histogram(rejected),
        "margins": [float(value) for value in np.percentile(margins, QUANTILES)],
        "length_correlation": correlation(lengths, margins),
        "by_length": by_length(lengths, margins),
    }


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's, None where a value is not finite or one of the two does not vary."""
    spread = float(first.std()) * float(second.std())
    if not (math.isfinite(spread) and spread > 0):
        return None
    return float(((first - first.mean()) * (second - second.mean())).mean() / spread)


def by_length(lengths: np.ndarray, margins: np.ndarray) -> list[dict[str, Any]]:
    """Up to five groups of pairs by their difference of lengths; pairs of one difference stay together.

    Each has `from` and `to` (differences, both within), `pairs`, `margin` (mean) and `accuracy` (share of margins > 0).
    """
    order = np.sort(lengths)
    edges = sorted({order[len(order) * part // _GROUPS] for part in range(1, _GROUPS)} | {-math.inf, math.inf})
    groups = []
    for low, high in pairwise(edges):
        inside = (lengths >= low) & (lengths < high)
        if inside.any():
            groups.append(
                {
                    "from": int(lengths[inside].min()),
                    "to": int(lengths[inside].max()),
                    "pairs": int(inside.sum()),
                    "margin": float(margins[inside].mean()),
                    "accuracy": float((margins[inside] > 0).mean()),
                }
            )
    return groups
