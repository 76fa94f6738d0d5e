"""Attention over packed pairs on a GPU: all branches of a batch in one call of one of torch's own kernels.

Flash attention takes half precision on GPUs from Ampere on. The memory-efficient kernels take fp32, older GPUs and
other sizes of heads, but want as many heads of keys as of queries. Both take cumulative lengths, and their causal masks
are bottom-right, which is what a branch needs. torch has no stable function for either, so a kernel is taken only where
the installed torch's schema is the one known here.

A position's key is in at most two branches, so whatever order its two gradients are added in, their sum is the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minimind_dpo.data.branches import BranchPlan
from minimind_dpo.engine import transfer

_BOTTOM_RIGHT = 2  # of the memory-efficient kernels' masks
_HALF = (torch.bfloat16, torch.float16)


class Scores(NamedTuple):
    """How queries look at keys.

    Attributes:
        plan: where the branches lie.
        scaling: factor on the scores; None is 1 / sqrt(head_dim).
        window: positions a query sees, itself included; None where every query sees all.
    """

    plan: BranchPlan
    scaling: float | None
    window: int | None


class VarlenKernel(Protocol):
    """One of torch's kernels; states are [tokens, heads, head_dim]."""

    name: str
    repeats_keys: bool  # whether each query head needs a key head of its own

    def known(self) -> bool:
        """Whether the installed torch has the operators as they are called here."""
        ...

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, ...]:
        """The output, and what `backward` needs beside it."""
        ...

    def backward(self, grad: Tensor, states: tuple[Tensor, ...], kept: tuple[Tensor, ...], scores: Scores) -> Any:
        """Gradients of query, key and value; `states` are these and the output."""
        ...


class _Flash:
    name, repeats_keys = "flash attention", False

    @staticmethod
    def known() -> bool:
        """Whether the installed torch has the operators as they are called here."""
        states, lengths = "query key value", "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
        options = "scale window_size_left window_size_right"
        return _takes("_flash_attention_forward", f"{states} {lengths} return_debug_mask", options) and _takes(
            "_flash_attention_backward", f"grad_out {states} out logsumexp {lengths} rng_state unused", options
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, ...]:
        arguments, options = _flash_arguments(scores)
        output, logsumexp, *random, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *arguments, False, **options
        )
        return output, logsumexp, *random

    def backward(self, grad: Tensor, states: tuple[Tensor, ...], kept: tuple[Tensor, ...], scores: Scores) -> Any:
        (logsumexp, *random), (arguments, options) = kept, _flash_arguments(scores)
        return torch.ops.aten._flash_attention_backward(grad, *states, logsumexp, *arguments, *random, **options)


def _flash_arguments(scores: Scores) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plan, causal = scores.plan, scores.window is None
    left = -1 if scores.window is None else scores.window - 1
    options = {"scale": scores.scaling, "window_size_left": left, "window_size_right": 0}
    return (plan.query_ends, plan.key_ends, plan.longest_query, plan.longest_key, 0.0, causal), options


class _Efficient:
    name, repeats_keys = "memory-efficient attention", True

    @staticmethod
    def known() -> bool:
        """Whether the installed torch has the operators as they are called here."""
        states, lengths = "query key value bias", "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
        random = "dropout_p philox_seed philox_offset custom_mask_type bias_requires_grad"
        return _takes(
            "_efficient_attention_forward", f"{states} {lengths} dropout_p custom_mask_type compute_log_sumexp", "scale"
        ) and _takes("_efficient_attention_backward", f"grad_out_ {states} out {lengths} logsumexp {random}", "scale")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, ...]:
        plan = scores.plan
        ends = plan.query_ends, plan.key_ends, plan.longest_query, plan.longest_key
        output, logsumexp, *random, _, _ = torch.ops.aten._efficient_attention_forward(
            query[None], key[None], value[None], None, *ends, 0.0, _BOTTOM_RIGHT, True, scale=scores.scaling
        )
        return output[0], logsumexp, *random

    def backward(self, grad: Tensor, states: tuple[Tensor, ...], kept: tuple[Tensor, ...], scores: Scores) -> Any:
        plan, (query, key, value, output), (logsumexp, *random) = scores.plan, (s[None] for s in states), kept
        ends = plan.query_ends, plan.key_ends, plan.longest_query, plan.longest_key
        gradients = torch.ops.aten._efficient_attention_backward(
            *(grad[None], query, key, value, None, output, *ends, logsumexp),
            *(0.0, *random, _BOTTOM_RIGHT, False),
            scale=scores.scaling,
        )
        return tuple(gradient[0] for gradient in gradients[:3])


@lru_cache(maxsize=8)
def _takes(name: str, arguments: str, options: str) -> bool:
    """Whether an operator of torch's takes these arguments, in this order, these options, and needs no others."""
    overload = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if overload is None:
        return False
    known, optional = arguments.split(), options.split()
    expected = [argument for argument in overload._schema.arguments if not argument.kwarg_only]
    by_name = {argument.name for argument in overload._schema.arguments if argument.kwarg_only}
    others = [*expected[len(known) :], *(a for a in overload._schema.arguments if a.kwarg_only)]
    in_order = [argument.name for argument in expected[: len(known)]] == known
    return in_order and by_name.issuperset(optional) and all(a.has_default_value() for a in others)


FLASH, EFFICIENT = _Flash(), _Efficient()


def kernel_for(query: Tensor, value: Tensor, scores: Scores) -> VarlenKernel | None:
    """The kernel that takes such states [1, heads, T, head_dim] on their device, or None.

    Windows are for flash attention: xformers, from which the memory-efficient kernels come, does not trust the
    gradients that they give with one.
    """
    if not transfer.on_gpu(query):
        return None
    capability, size = _capability(query.device), query.shape[3]
    half, same = query.dtype in _HALF, value.shape[3] == size
    largest = 256 if capability == (8, 0) or capability >= (9, 0) else 192  # of others, the gradient needs more memory
    if FLASH.known() and half and same and capability >= (8, 0) and size % 8 == 0 and size <= largest:
        return FLASH
    typed = query.dtype in (torch.float32, torch.float16) or (query.dtype == torch.bfloat16 and capability >= (8, 0))
    aligned = size % 8 == 0 and value.shape[3] % 8 == 0
    fits = typed and aligned and scores.window is None and torch.version.hip is None  # whose mask is another one
    return EFFICIENT if fits and EFFICIENT.known() else None


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class _VarlenAttention(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V of every branch, as one node."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: VarlenKernel, scores: Scores
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1] if kernel.repeats_keys else 1
        queries = query[0].transpose(0, 1)
        keys, values = (gathered(states, scores.plan.key_index, repeats) for states in (key, value))
        output, *kept = kernel.forward(queries, keys, values, scores)
        ctx.save_for_backward(queries, keys, values, output, *kept)
        ctx.kernel, ctx.scores, ctx.repeats = kernel, scores, repeats
        return output[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, output, *kept = ctx.saved_tensors
        states = queries, keys, values, output
        grad_query, *gradients = ctx.kernel.backward(grad[0].contiguous(), states, tuple(kept), ctx.scores)
        index, length = ctx.scores.plan.key_index, len(queries)
        return (
            grad_query.transpose(0, 1)[None],
            *(added_up(g, index, length, ctx.repeats) for g in gradients),
            None,
            None,
        )


def gathered(states: Tensor, index: Tensor, repeats: int) -> Tensor:
    """[K, heads x repeats, D] of states [1, heads, T, D] at the positions `index` [K]."""
    rows = states[0].transpose(0, 1).index_select(0, index)
    return rows if repeats == 1 else rows[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2)


def added_up(grad: Tensor, index: Tensor, length: int, repeats: int) -> Tensor:
    """[1, heads, T, D] of gradients [K, heads x repeats, D] of what `gathered` gave."""
    rows = grad if repeats == 1 else grad.unflatten(1, (-1, repeats)).sum(dim=2)
    return rows.new_zeros(length, *rows.shape[1:]).index_add_(0, index, rows).transpose(0, 1)[None]


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, kernel: VarlenKernel, scores: Scores) -> Tensor:
    """[1, T, heads, D] of query [1, heads, T, D], key and value [1, key heads, T, D] by one call of `kernel`."""
    return _VarlenAttention.apply(query, key, value, kernel, scores)
