"""The same for a GPU (`attention_ops.py`): one call of a kernel of `attention_gpu.py` each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind_dpo.models.fast.attention_gpu import Scores, VarlenKernel, added_up, gathered, kernel_for


def _kernel(states: Sequence[Tensor], longest: tuple[int, int], told: Sequence[Any]) -> tuple[VarlenKernel, Scores]:
    """The kernel for such states, and how it is called."""
    query_ends, key_ends, scaling, window = told
    ends: Any = _Ends(query_ends, key_ends, *longest)
    scores = Scores(ends, scaling, window)
    if (kernel := kernel_for(states[0], states[2], scores)) is None:
        raise NotImplementedError("this GPU has no kernel for such heads, and a loop over pairs has no compiled form")
    return kernel, scores


class _Ends(NamedTuple):
    """What kernels read of a `BranchPlan`."""

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def _forward_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    key_index: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    told = query_ends, key_ends, scaling, window
    kernel, scores = _kernel((query, key, value), (longest_query, longest_key), told)
    repeats = query.shape[1] // key.shape[1] if kernel.repeats_keys else 1
    keys, values = (gathered(states, key_index, repeats) for states in (key, value))
    output, *kept = kernel.forward(query[0].transpose(0, 1), keys, values, scores)
    first, second, third = kept
    return output[None], keys, values, first, second, third


@torch.library.custom_op("minimind_dpo::gpu_attention", mutates_args=())
def gpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    key_index: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of a kernel of `attention_gpu.py`, and what its backward pass needs."""
    told = query_ends, key_ends, key_index, longest_query, longest_key, scaling, window
    return _forward_on_gpu(query, key, value, *told)


gpu_attention.register_fake(_forward_on_gpu)


def _backward_on_gpu(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    kept: Sequence[Tensor],
    query_ends: Tensor,
    key_ends: Tensor,
    key_index: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    window: int | None,
    key_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    told = query_ends, key_ends, scaling, window
    kernel, scores = _kernel((query, keys, values[None].transpose(1, 2)), (longest_query, longest_key), told)
    states = query[0].transpose(0, 1), keys, values, output[0]
    grad_query, *gradients = kernel.backward(grad[0].contiguous(), states, tuple(kept), scores)
    repeats = query.shape[1] // key_heads if kernel.repeats_keys else 1
    length = query.shape[2]
    first, second = (added_up(own, key_index, length, repeats).contiguous() for own in gradients)
    return grad_query.transpose(0, 1)[None].contiguous(), first, second


@torch.library.custom_op("minimind_dpo::gpu_attention_backward", mutates_args=())
def gpu_attention_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    kept: Sequence[Tensor],
    query_ends: Tensor,
    key_ends: Tensor,
    key_index: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    window: int | None,
    key_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    told = query_ends, key_ends, key_index, longest_query, longest_key, scaling, window, key_heads
    return _backward_on_gpu(grad, query, keys, values, output, kept, *told)


gpu_attention_backward.register_fake(_backward_on_gpu)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, _, query_ends, key_ends, key_index, *ctx.numbers = inputs
    ctx.key_heads = key.shape[1]
    ctx.save_for_backward(query, query_ends, key_ends, key_index, *output)


def _back(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, query_ends, key_ends, key_index, output, keys, values, *kept = ctx.saved_tensors
    told = query_ends, key_ends, key_index, *ctx.numbers, ctx.key_heads
    return *gpu_attention_backward(grad, query, keys, values, output, kept, *told), *[None] * 7


gpu_attention.register_autograd(_back, setup_context=_keep)
