"""Attention over packed pairs on the CPU: matrix products of blocks that stay in a core's cache.

A flash kernel multiplies a head at a time and computes the scores and their softmax again in the backward pass, which
on a CPU costs more than what it leaves out. Here the query heads that share keys are rows of one product, hidden scores
are computed inside a block only, and the softmax is kept while it is small.

In half precision the forward pass is that of fp32, and what it keeps is rounded, as are the products of the backward
pass: scores rounded to bf16 would make the softmax four times as wrong as SDPA's, since torch has no product of bf16
matrices on the CPU that gives fp32.

oneDNN makes the products of bf16, and under `matmul: onednn` those of fp32 that are large enough to gain by it. It
builds a kernel for each shape that it meets, which takes as long as seven of these products; so what it multiplies is
filled up to few shapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.models.fast.attention_blocks import QueryBlock, banded_mask, pair_branches, visible_states
from minimind_dpo.models.fast.products import ONEDNN, TORCH, batched_product

BLOCK = 128  # queries at a time; fewer make products too small, more compute too many hidden scores
KEPT_KEYS = 384  # the softmax of queries that see more keys is computed again: it would outgrow the other activations
FILLED = 64  # rows and keys of a block are a multiple of it where oneDNN multiplies them
# Multiplications of a head's fp32 product from which on oneDNN makes it: one call takes it some 40 microseconds longer
# than torch.bmm, which is half of what it gains on this many where it is twice as fast, as on a Zen 5.
LARGE = 1 << 23


class CpuPairAttention(torch.autograd.Function):
    """The attention of `models/fast/attention.py` as one node for all pairs, with one gradient each for the whole row.

    Left to autograd, every slice of a segment would get a gradient as long as the whole row, zeros but for the slice,
    and these would be added up: 5 % of a step of eight pairs.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[PairSegment, ...],
        scaling: float | None,
        window: int | None,
        wanted: Sequence[int] | None = None,
        library: str = TORCH,
    ) -> Tensor:
        """Outputs [1, T, heads, head_dim]; arguments of `pair_attention`.

        Args:
            wanted: ascending positions whose outputs are used (None: all). What lies before a branch's first one is
                left out and becomes 0, in the gradient too.
            library: for products of fp32.
        """
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        kept: list[Tensor | None] = []
        told = segments, scaling, window, wanted, library
        output = attend(query, key, value, kept if any(ctx.needs_input_grad) else None, *told)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.told = told
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        return *attend_back(grad_output, query, key, value, kept, *ctx.told), *[None] * 5


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: list[Tensor | None] | None,
    segments: Sequence[PairSegment],
    scaling: float,
    window: int | None,
    wanted: Sequence[int] | None,
    library: str = TORCH,
) -> Tensor:
    """Outputs [1, T, heads, head_dim] of `CpuPairAttention`; each block's softmax, or None, is added to `kept`."""
    group = query.shape[1] // key.shape[1]
    spare = FILLED if library == ONEDNN else 0
    queries = _rows(query.float(), group, spare).mul_(scaling)
    keys, values = _spared(key.float(), spare), _spared(value.float(), spare)
    make = queries.new_empty if wanted is None else queries.new_zeros
    output = make(len(queries), query.shape[2] * group, value.shape[3])
    for block in query_blocks(segments, wanted):
        rows, by = slice(block.start * group, block.end * group), _by(library, block, queries, group)
        weights = _weights(queries, keys, block, group, window, by)
        _, wide, fill = _widened(block, group, by)
        outputs = batched_product(_filled(weights, fill), visible_states(values, wide), by)
        output[:, rows] = outputs[:, : weights.shape[1]]
        if kept is not None:
            kept.append(weights.to(query.dtype) if keeps_weights(block) else None)
    return _positions(output.to(query.dtype), group)


def attend_back(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor | None],
    segments: Sequence[PairSegment],
    scaling: float,
    window: int | None,
    wanted: Sequence[int] | None,
    library: str = TORCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of `attend`'s outputs and what it kept."""
    group = query.shape[1] // key.shape[1]
    half = query.dtype != torch.float32
    spare = FILLED if half or library == ONEDNN else 0
    scaled = _rows(query.float(), group, spare).mul_(scaling)
    grads = _rows(grad_output.transpose(1, 2), group, spare)
    queries = _rows(query, group, spare) if half else scaled  # scaled ones would be rounded once more
    make = query.new_empty if wanted is None else query.new_zeros
    grad_queries = make(len(scaled), query.shape[2] * group, query.shape[3])
    grad_key, grad_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
    keys, values = _spared(key, spare), _spared(value, spare)
    for block, weights in zip(query_blocks(segments, wanted), kept, strict=True):
        rows, by = slice(block.start * group, block.end * group), _by(library, block, scaled, group)
        if weights is None:
            weights = _weights(scaled, keys, block, group, window, by)
        own, wide, fill = _widened(block, group, ONEDNN if half else by)
        # what is filled up meets the neighbours' rows and keys, with weights of zero
        weights = _filled(weights.to(query.dtype), fill)
        grad, seen = grads[:, own], visible_states(keys, wide)
        grad_weights = batched_product(grad, visible_states(values, wide).mT, by)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_queries[:, rows] = batched_product(grad_scores, seen, by)[:, : rows.stop - rows.start]
        _add(grad_key[0], block, batched_product(grad_scores.mT, queries[:, own], by))
        _add(grad_value[0], block, batched_product(weights.mT, grad, by))
    if half:
        grad_key.mul_(scaling)
    grad_query = _positions(grad_queries.mul_(scaling), group).transpose(1, 2)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def query_blocks(segments: Sequence[PairSegment], wanted: Sequence[int] | None = None) -> Iterator[QueryBlock]:
    """Branches cut into blocks of at most `BLOCK` queries, each branch from its first wanted query on (None: all)."""
    for branch in pair_branches(segments):
        first = branch.start
        if wanted is not None:
            index = bisect_left(wanted, branch.start)
            if index == len(wanted) or wanted[index] >= branch.end:
                continue
            first = wanted[index]
        count = -(-(branch.end - first) // BLOCK)
        size = -(-(branch.end - first) // count)
        for start in range(first, branch.end, size):
            yield QueryBlock(branch.prefix, branch.first, start, min(start + size, branch.end))


def keeps_weights(block: QueryBlock) -> bool:
    """Whether a block's softmax is kept for the backward pass."""
    return block.keys <= KEPT_KEYS


def _by(library: str, block: QueryBlock, queries: Tensor, group: int) -> str:
    """The library for a block's products of fp32."""
    large = (block.end - block.start) * group * block.keys * queries.shape[2] >= LARGE
    return library if large else TORCH


def _widened(block: QueryBlock, group: int, by: str) -> tuple[slice, QueryBlock, tuple[int, int]]:
    """For products by oneDNN a block's rows with those that fill it up, the block with such keys, and how many of both.

    For products by torch the block as it is.
    """
    first, end = block.start * group, block.end * group
    rows, keys = (-(end - first) % FILLED, -block.keys % FILLED) if by == ONEDNN else (0, 0)
    return slice(first, end + rows), block._replace(end=block.end + keys), (rows, keys)


def _filled(weights: Tensor, fill: tuple[int, int]) -> Tensor:
    """[key heads, rows, K] with so many rows and keys of zeros more."""
    return F.pad(weights, (0, fill[1], 0, fill[0])) if any(fill) else weights


def _spared(states: Tensor, spare: int) -> Tensor:
    """[1, key heads, T, D] as [key heads, T, D], with so many spare positions of zeros at its end."""
    return F.pad(states[0], (0, 0, 0, spare)) if spare else states[0]


def _rows(states: Tensor, group: int, spare: int = 0) -> Tensor:
    """A copy of [1, heads, T, D] as [key heads, T x group, D]: a position's heads that share keys follow each other.

    With so many spare rows of zeros at its end.
    """
    rows = states[0].unflatten(0, (-1, group)).transpose(1, 2)
    if not spare:
        return rows.clone(memory_format=torch.contiguous_format).flatten(1, 2)
    output = states.new_zeros(rows.shape[0], rows.shape[1] * group + spare, rows.shape[3])
    output[:, :-spare].unflatten(1, (-1, group)).copy_(rows)
    return output


def _positions(rows: Tensor, group: int) -> Tensor:
    """A copy of [key heads, T x group, D] as [1, T, heads, D]."""
    states = rows.unflatten(1, (-1, group)).transpose(0, 1)
    return states.clone(memory_format=torch.contiguous_format).flatten(1, 2)[None]


def _weights(queries: Tensor, keys: Tensor, block: QueryBlock, group: int, window: int | None, by: str) -> Tensor:
    """softmax(Q K^T + mask) [key heads, rows, K] of a block, from the scaled queries and the keys of the whole row."""
    count = block.end - block.start
    rows, wide, _ = _widened(block, group, by)
    whole = batched_product(queries[:, rows], visible_states(keys, wide).float().mT, by)
    scores = whole[:, : count * group, : block.keys]
    if window is None or window >= block.keys:  # every query sees all that lies before its block
        hidden = _upper_triangle(count)
    else:
        hidden = banded_mask(count, block.keys, window, scores.dtype, scores.device)
    scores.unflatten(1, (count, -1))[..., -hidden.shape[1] :] += hidden[:, None]
    return scores.softmax(dim=-1)


@lru_cache(maxsize=BLOCK)
def _upper_triangle(size: int) -> Tensor:
    return banded_mask(size, size, None, torch.float32, torch.device("cpu"))


def _add(total: Tensor, block: QueryBlock, grad: Tensor) -> None:
    """Add a block's gradient [key heads, K or more, D] to the row's."""
    if block.shared:
        total[:, block.prefix] += grad[:, : block.shared]
    total[:, block.own] += grad[:, block.shared : block.keys]
