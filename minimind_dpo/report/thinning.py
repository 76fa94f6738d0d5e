"""Long curves made short: a page draws as many points as a screen has columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimind_dpo.report.reading import Curve

MOST = 500  # points of a curve


def thin(curve: Curve, most: int = MOST) -> dict[str, list[float]]:
    """A curve's points, all of them, or means of as many stretches with the lowest and highest value of each.

    Every stretch has as many points as any other, give or take one, so no spike is lost and a mean is that of all.

    Returns:
        `x` and `y`; where stretches were taken, x is their middle step, and `low` and `high` are beside it.
    """
    steps, values = np.frombuffer(curve.steps), np.frombuffer(curve.values)
    if len(steps) <= most:
        return {"x": _short(steps), "y": _short(values)}
    begins = np.linspace(0, len(steps), most, endpoint=False).astype(np.int64)
    counts = np.diff(begins, append=len(steps))
    return {
        "x": _short(steps[begins + counts // 2]),
        "y": _short(np.add.reduceat(values, begins) / counts),
        "low": _short(np.minimum.reduceat(values, begins)),
        "high": _short(np.maximum.reduceat(values, begins)),
    }


def picked(items: list[Any], most: int) -> list[Any]:
    """At most so many of a list, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, most).astype(np.int64)]


def _short(values: np.ndarray) -> list[float]:
    """With five figures that count: more than a screen shows, and half of the bytes. Steps are whole numbers."""
    return [
        int(value) if value == int(value) and abs(value) < 1e9 else float(f"{value:.5g}") for value in values.tolist()
    ]
