"""Attention over packed pairs on the CPU: matrix products of blocks that stay in a core's cache.

A flash kernel multiplies a head at a time and computes the scores and their softmax again in the backward pass, which
on a CPU costs more than what it leaves out. Here the query heads that share keys are rows of one product, hidden scores
are computed inside a block only, and the softmax is kept while it is small.

In half precision the forward pass is that of fp32, and what it keeps is rounded, as are the products of the backward
pass: scores rounded to bf16 would make the softmax four times as wrong as SDPA's, since torch has no product of bf16
matrices on the CPU that gives fp32. oneDNN, which makes bf16 products, builds a kernel for each shape that it meets,
which takes as long as seven of these products; so blocks are filled up with zeros to few shapes there.
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

BLOCK = 128  # queries at a time; fewer make products too small, more compute too many hidden scores
KEPT_KEYS = 384  # the softmax of queries that see more keys is computed again: it would outgrow the other activations
FILLED = 64  # in half precision rows and keys of a block are a multiple of it


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
    ) -> Tensor:
        """Outputs [1, T, heads, head_dim]; arguments of `pair_attention`.

        Args:
            wanted: ascending positions whose outputs are used (None: all). What lies before a branch's first one is
                left out and becomes 0, in the gradient too.
        """
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        kept: list[Tensor | None] = []
        output = attend(
            query, key, value, segments, scaling, window, wanted, kept if any(ctx.needs_input_grad) else None
        )
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.scaling, ctx.window, ctx.wanted = segments, scaling, window, wanted
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of query, key and value."""
        query, key, value, *kept = ctx.saved_tensors
        told = ctx.segments, ctx.scaling, ctx.window, ctx.wanted
        return *attend_back(grad_output, query, key, value, kept, *told), None, None, None, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[PairSegment],
    scaling: float,
    window: int | None,
    wanted: Sequence[int] | None,
    kept: list[Tensor | None] | None,
) -> Tensor:
    """Outputs [1, T, heads, head_dim] of `CpuPairAttention`; each block's softmax, or None, is added to `kept`."""
    group = query.shape[1] // key.shape[1]
    queries, keys, values = _rows(query.float(), group).mul_(scaling), key.float(), value.float()
    output = (queries.new_empty if wanted is None else queries.new_zeros)(*queries.shape[:2], value.shape[3])
    for block in query_blocks(segments, wanted):
        rows = slice(block.start * group, block.end * group)
        weights = _weights(queries[:, rows], visible_states(keys, block)[0], block, window)
        output[:, rows] = _product(weights, visible_states(values, block)[0])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of `attend`'s outputs and what it kept."""
    group = query.shape[1] // key.shape[1]
    half = query.dtype != torch.float32
    spare = FILLED if half else 0
    scaled = _rows(query.float(), group).mul_(scaling)
    grads = _rows(grad_output.transpose(1, 2), group, spare)
    queries = _rows(query, group, spare) if half else scaled  # scaled ones would be rounded once more
    grad_queries = (torch.empty_like if wanted is None else torch.zeros_like)(scaled, dtype=query.dtype)
    grad_key, grad_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
    keys, values = (F.pad(states, (0, 0, 0, spare))[0] if half else states[0] for states in (key, value))
    for block, weights in zip(query_blocks(segments, wanted), kept, strict=True):
        rows = slice(block.start * group, block.end * group)
        if weights is None:
            weights = _weights(scaled[:, rows], visible_states(key, block)[0].float(), block, window)
        weights = _filled(weights.to(query.dtype)) if half else weights
        # what is filled up meets the neighbours' rows and keys, with weights of zero
        wide = block._replace(end=block.end + weights.shape[2] - block.keys)
        own = slice(rows.start, rows.start + weights.shape[1])
        grad, seen = grads[:, own], visible_states(keys, wide)
        grad_weights = _product(grad, visible_states(values, wide).mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_queries[:, rows] = _product(grad_scores, seen)[:, : rows.stop - rows.start]
        _add(grad_key[0], block, _product(grad_scores.mT, queries[:, own]))
        _add(grad_value[0], block, _product(weights.mT, grad))
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


def _filled(weights: Tensor) -> Tensor:
    """[key heads, rows, K] filled up with zeros to multiples of `FILLED`."""
    _, rows, keys = weights.shape
    return F.pad(weights, (0, -keys % FILLED, 0, -rows % FILLED))


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


def _weights(queries: Tensor, keys: Tensor, block: QueryBlock, window: int | None) -> Tensor:
    """softmax(Q K^T + mask) [key heads, rows, K] of scaled queries."""
    scores = _product(queries, keys.mT)
    count = block.end - block.start
    if window is None or window >= block.keys:  # every query sees all that lies before its block
        hidden = _upper_triangle(count)
    else:
        hidden = banded_mask(count, block.keys, window, scores.dtype, scores.device)
    scores.unflatten(1, (count, -1))[..., -hidden.shape[1] :] += hidden[:, None]
    return scores.softmax(dim=-1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of [key heads, rows, n] and [key heads, n, columns].

    MKL, for fp32, gives whole products of a batch to threads. Those that do not divide evenly are made one by one, each
    by all threads: three products on two threads take a quarter less time.
    """
    if left.dtype != torch.float32:
        return torch.bmm(_whole(left), _whole(right))
    count, threads = len(left), torch.get_num_threads()
    even = count - count % threads
    if even in (0, count):
        return torch.bmm(left, right)
    output = left.new_empty(count, left.shape[1], right.shape[2])
    torch.bmm(left[:even], right[:even], out=output[:even])
    for index in range(even, count):
        torch.mm(left[index], right[index], out=output[index])
    return output


def _whole(factor: Tensor) -> Tensor:
    """Without the strides of a longer row, which would make another shape of it to oneDNN."""
    return factor if factor.is_contiguous() or factor.mT.is_contiguous() else factor.contiguous()


@lru_cache(maxsize=BLOCK)
def _upper_triangle(size: int) -> Tensor:
    return banded_mask(size, size, None, torch.float32, torch.device("cpu"))


def _add(total: Tensor, block: QueryBlock, grad: Tensor) -> None:
    """Add a block's gradient [key heads, K or more, D] to the row's."""
    if block.shared:
        total[:, block.prefix] += grad[:, : block.shared]
    total[:, block.own] += grad[:, block.shared : block.keys]
