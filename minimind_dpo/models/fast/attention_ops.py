"""Attention over packed pairs as operators that a compiled decoder calls without looking into them.

Left to the compiler, loops over pairs would be unrolled, and a new batch's pairs would be new code. Here a tensor says
where pairs lie, and what is kept for the backward pass is an output whose size follows from numbers of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind_dpo.data.branches import BranchPlan, PairSegment
from minimind_dpo.engine.cpu import has_bf16_units
from minimind_dpo.models.fast.attention_cpu import attend, attend_back, keeps_weights, query_blocks
from minimind_dpo.models.fast.attention_ops_gpu import gpu_attention


class RowPlan(NamedTuple):
    """Where packed pairs lie, for a compiled decoder; what the other kind of device needs is None or 0.

    Attributes:
        segments: [N, 4] start, prefix, chosen and rejected of each pair, on the host: for a CPU.
        areas: a head's elements of the softmax that is kept, of all rows and of those to the wanted ones.
        query_ends, key_ends, key_index, longest_query, longest_key: of `BranchPlan`, for a GPU.
    """

    segments: Tensor | None = None
    areas: tuple[int, int] = (0, 0)
    query_ends: Tensor | None = None
    key_ends: Tensor | None = None
    key_index: Tensor | None = None
    longest_query: int = 0
    longest_key: int = 0


def cpu_plan(segments: Sequence[PairSegment], wanted: Tensor | None) -> RowPlan:
    """The plan of a row on a CPU, where `wanted` [S] are the positions that its last layer is for."""
    numbers = [[one.start, one.prefix, one.chosen, one.rejected] for one in segments]
    areas = _area(segments, None), _area(segments, None if wanted is None else wanted.tolist())
    return RowPlan(torch.tensor(numbers), areas)


def gpu_plan(plan: BranchPlan) -> RowPlan:
    """The plan of a row on a GPU."""
    return RowPlan(None, (0, 0), plan.query_ends, plan.key_ends, plan.key_index, plan.longest_query, plan.longest_key)


def _area(segments: Sequence[PairSegment], wanted: Sequence[int] | None) -> int:
    blocks = query_blocks(segments, wanted)
    return sum((block.end - block.start) * block.keys for block in blocks if keeps_weights(block))


def plan_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, scaling: float, window: int | None, wanted: Tensor | None
) -> Tensor:
    """[1, T, heads, head_dim] of states [1, heads, T, head_dim]; arguments of `pair_attention`."""
    if plan.segments is not None:
        area = plan.areas[0 if wanted is None else 1]
        return cpu_attention(query, key, value, plan.segments, area, scaling, window, wanted)[0]
    lengths = plan.query_ends, plan.key_ends, plan.key_index, plan.longest_query, plan.longest_key
    return gpu_attention(query, key, value, *lengths, scaling, window)[0]


def _segments(numbers: Tensor) -> tuple[PairSegment, ...]:
    return tuple(PairSegment(*row) for row in numbers.tolist())


def _kept_type(states: Tensor) -> torch.dtype:
    """The type that a CPU attends in."""
    return states.dtype if states.dtype == torch.bfloat16 and has_bf16_units() else torch.float32


@torch.library.custom_op("minimind_dpo::cpu_attention", mutates_args=())
def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    area: int,
    scaling: float,
    window: int | None,
    wanted: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs of `attend`, and all softmax that it keeps, one block's after another's: [heads x area]."""
    states = [tensor.detach().to(_kept_type(query)) for tensor in (query, key, value)]
    kept: list[Tensor | None] = []
    rows = None if wanted is None else wanted.tolist()
    output = attend(states[0], states[1], states[2], kept, _segments(segments), scaling, window, rows)
    parts = [weights.flatten() for weights in kept if weights is not None]
    flat = torch.cat(parts) if parts else states[0].new_empty(0)
    return output.to(query.dtype), flat


@cpu_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    area: int,
    scaling: float,
    window: int | None,
    wanted: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _, heads, length, _ = query.shape
    output = query.new_empty(1, length, heads, value.shape[3])
    return output, query.new_empty(heads * area, dtype=_kept_type(query))


@torch.library.custom_op("minimind_dpo::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flat: Tensor,
    segments: Tensor,
    scaling: float,
    window: int | None,
    wanted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    rows, pairs, dtype = None if wanted is None else wanted.tolist(), _segments(segments), _kept_type(query)
    states = [tensor.detach().to(dtype) for tensor in (query, key, value)]
    kept = list(_unpacked(flat, query.shape[1], query.shape[1] // key.shape[1], pairs, rows))
    gradients = attend_back(grad.to(dtype), states[0], states[1], states[2], kept, pairs, scaling, window, rows)
    first, second, third = (
        own.to(given.dtype).contiguous() for own, given in zip(gradients, (query, key, value), strict=True)
    )
    return first, second, third


@cpu_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _unpacked(
    flat: Tensor, heads: int, group: int, pairs: Sequence[PairSegment], wanted: Sequence[int] | None
) -> Iterator[Tensor | None]:
    first = 0
    for block in query_blocks(pairs, wanted):
        if not keeps_weights(block):
            yield None
            continue
        rows, last = (block.end - block.start) * group, first + heads * (block.end - block.start) * block.keys
        yield flat[first:last].view(heads // group, rows, block.keys)
        first = last


def _keep_for_cpu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, _, ctx.scaling, ctx.window, wanted = inputs
    ctx.save_for_backward(query, key, value, output[1], segments, wanted)


def _back_on_cpu(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, flat, segments, wanted = ctx.saved_tensors
    told = segments, ctx.scaling, ctx.window, wanted
    return *cpu_attention_backward(grad, query, key, value, flat, *told), None, None, None, None, None


cpu_attention.register_autograd(_back_on_cpu, setup_context=_keep_for_cpu)
