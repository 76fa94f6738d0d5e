"""What a number that somebody sets may be."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple


class Bounds(NamedTuple):
    """What a number may be: `says` ends the sentence "must be ..."; `holds` is true of an allowed number."""

    says: str
    holds: Callable[[float], bool]


POSITIVE = Bounds("positive", lambda number: 0 < number < inf)
NOT_NEGATIVE = Bounds("0 or more", lambda number: 0 <= number < inf)
SHARE = Bounds("in [0, 1]", lambda number: 0 <= number <= 1)
DROPOUT = Bounds("in [0, 1)", lambda number: 0 <= number < 1)
STEPS = Bounds("positive, or -1", lambda number: number == -1 or 0 < number < inf)
MINORITY = Bounds("in [0, 0.5)", lambda number: 0 <= number < 0.5)
FINITE = Bounds("a finite number", lambda number: -inf < number < inf)
