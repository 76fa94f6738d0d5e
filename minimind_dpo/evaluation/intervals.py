"""How far a mean over pairs can be trusted: bootstrap intervals."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95
_DRAWN_AT_ONCE = 1 << 22  # indices


def intervals(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """95 % intervals of the means of [N, K] values over N pairs, [K, 2]: low and high.

    Percentiles of means of resampled pairs (Efron 1979), at levels a little further out, as Student's t asks for
    (the expanded percentile interval; Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3):
    without it intervals of few pairs are too narrow. Pairs are taken to be independent of each other.

    Args:
        values: fp64.
        seed: of the resampling; the same values and seed give the same intervals, whatever the machine's cores.
        resamples: how many.
    """
    count = len(values)
    if count < 2:
        return np.repeat(values.mean(axis=0)[:, None], 2, axis=1)
    rng = np.random.default_rng(seed)
    means = []
    for begin in range(0, resamples, rows := max(1, _DRAWN_AT_ONCE // count)):
        drawn = min(rows, resamples - begin)
        pairs = rng.integers(0, count, size=(drawn, count)) + count * np.arange(drawn)[:, None]
        weights = np.bincount(pairs.ravel(), minlength=drawn * count).reshape(drawn, count) / count
        means.append(np.einsum("rn,nk->rk", weights, values))  # no BLAS: its sums depend on the number of threads
    tail = expanded_tail(count)
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T


def expanded_tail(count: int) -> float:
    """The share of resampled means to be left out at each end, for N pairs."""
    degrees = count - 1
    return NormalDist().cdf(-sqrt(count / degrees) * _student(NormalDist().inv_cdf((1 + COVERAGE) / 2), degrees))


def _student(normal: float, degrees: int) -> float:
    """Student's quantile of the same level as a normal one: Abramowitz and Stegun 26.7.5."""
    first = (normal**3 + normal) / 4
    second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    third = (3 * normal**7 + 19 * normal**5 + 17 * normal**3 - 15 * normal) / 384
    return normal + first / degrees + second / degrees**2 + third / degrees**3
