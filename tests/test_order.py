"""The order of pairs: a pure function, complete, balanced, the same for every factorisation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_dpo.data.order import MicroBatch, PairOrder, split_step, total_steps


def test_file_order_without_shuffle() -> None:
    order = PairOrder(num_pairs=5, global_batch=2, seed=0, shuffle=False)
    assert [order.step_pairs(step).tolist() for step in range(1, 5)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert [order.epoch_of(step) for step in range(1, 5)] == [0, 0, 0, 1]
    assert [order.pairs_seen(step) for step in range(5)] == [0, 2, 4, 5, 7]


def test_split_by_hand() -> None:
    """Longest first: 9 | 7 | 6 | 5, then 4 joins 5 and 2 joins 6; loads 9 9 8 7, a slot's together."""
    pairs, tokens = np.arange(10, 16), np.array([5, 9, 2, 7, 4, 6])
    first = split_step(pairs, tokens, world_size=2, rank=0, micro_batch_size=2)
    second = split_step(pairs, tokens, world_size=2, rank=1, micro_batch_size=2)
    assert first == [MicroBatch([11], [1]), MicroBatch([13], [3])]
    assert second == [MicroBatch([10, 14], [0, 4]), MicroBatch([12, 15], [2, 5])]


def test_a_rank_without_pairs_runs_the_shortest() -> None:
    """Five pairs, six micro-batches of one: the last slot runs backwards, so that no rank always has the most."""
    pairs, tokens = np.arange(5), np.array([3, 1, 4, 1, 5])
    first = split_step(pairs, tokens, world_size=2, rank=0, micro_batch_size=1)
    second = split_step(pairs, tokens, world_size=2, rank=1, micro_batch_size=1)
    assert first == [MicroBatch([4], [4]), MicroBatch([1], [1]), MicroBatch([3], [3])]
    assert second == [MicroBatch([2], [2]), MicroBatch([0], [0]), MicroBatch([1], [1], counted=False)]


def test_one_micro_batch_keeps_the_order() -> None:
    pairs, tokens = np.array([7, 2, 5]), np.array([1, 3, 2])
    assert split_step(pairs, tokens, world_size=1, rank=0, micro_batch_size=4) == [MicroBatch([7, 2, 5], [0, 1, 2])]


def test_a_step_is_divided_until_no_micro_batch_has_too_many_tokens() -> None:
    """33 tokens at most 12 at a time: two micro-batches have 17 and 16, three have 9 + 2, 7 + 4 and 6 + 5."""
    pairs, tokens = np.arange(10, 16), np.array([5, 9, 2, 7, 4, 6])
    assert split_step(pairs, tokens, world_size=1, rank=0, micro_batch_size=6, max_tokens=12) == [
        MicroBatch([11, 12], [1, 2]),
        MicroBatch([13, 14], [3, 4]),
        MicroBatch([10, 15], [0, 5]),
    ]
    alone = split_step(pairs, tokens, world_size=1, rank=0, micro_batch_size=6, max_tokens=3)
    assert sorted(batch.pairs for batch in alone) == [[pair] for pair in pairs]  # a pair can't be divided


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=24), most=st.integers(1, 600), world=st.integers(1, 3)
)
def test_tokens_a_micro_batch_are_bounded(lengths: list[int], most: int, world: int) -> None:
    tokens = np.array(lengths)
    ranks = [
        split_step(np.arange(len(tokens)), tokens, world_size=world, rank=rank, micro_batch_size=8, max_tokens=most)
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for own in ranks for batch in own]
    assert all(len(batch.pairs) == 1 or tokens[batch.pairs].sum() <= most for batch in batches)
    assert sorted(pair for batch in batches if batch.counted for pair in batch.pairs) == list(range(len(tokens)))


@given(lengths=st.lists(st.integers(1, 2000), min_size=16, max_size=16))
def test_ranks_have_like_amounts_of_tokens(lengths: list[int]) -> None:
    """No rank has more than the mean and one longest pair (what the greedy rule guarantees, room permitting)."""
    tokens = np.array(lengths)
    loads = [
        sum(
            int(tokens[pair])
            for batch in split_step(np.arange(16), tokens, world_size=4, rank=rank, micro_batch_size=16)
            for pair in batch.pairs
        )
        for rank in range(4)
    ]
    assert sum(loads) == tokens.sum() and max(loads) <= tokens.sum() / 4 + tokens.max()


@given(
    num_pairs=st.integers(1, 60),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_epoch_counts_every_pair_once(
    num_pairs: int, micro: int, accumulation: int, world: int, seed: int, shuffle: bool
) -> None:
    order = PairOrder(num_pairs, micro * accumulation * world, seed, shuffle)
    for epoch in range(2):
        seen: list[int] = []
        for within in range(1, order.steps_per_epoch + 1):
            pairs = order.step_pairs(epoch * order.steps_per_epoch + within)
            tokens = 1 + pairs * 7 % 50
            ranks = [
                split_step(pairs, tokens, world_size=world, rank=rank, micro_batch_size=micro) for rank in range(world)
            ]
            assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) <= accumulation
            counted = [pair for batches in ranks for batch in batches if batch.counted for pair in batch.pairs]
            assert sorted(counted) == sorted(pairs.tolist())
            assert all(0 < len(batch.pairs) <= micro for batches in ranks for batch in batches)
            seen += counted
        assert sorted(seen) == list(range(num_pairs))


def test_shuffle_depends_on_seed_and_epoch_only() -> None:
    def epoch(seed: int, number: int, global_batch: int) -> list[int]:
        order = PairOrder(50, global_batch, seed, shuffle=True)
        first = number * order.steps_per_epoch + 1
        return np.concatenate([order.step_pairs(first + s) for s in range(order.steps_per_epoch)]).tolist()

    assert epoch(1, 0, 8) == epoch(1, 0, 5)
    assert epoch(1, 0, 8) != epoch(1, 1, 8) and epoch(1, 0, 8) != epoch(2, 0, 8)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1.0, -1, 3), (2.0, -1, 6), (0.5, -1, 2), (0.01, -1, 1), (9.0, 4, 4)]
)
def test_total_steps(epochs: float, max_steps: int, expected: int) -> None:
    assert total_steps(21, 8, epochs, max_steps) == expected
