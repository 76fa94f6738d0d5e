"""Attention over packed shared-prefix pairs, as one more implementation of transformers' attention interface.

Each pair is attended on its own: causally over `prefix + chosen`, then the rejected branch's queries over
`prefix + rejected`, bottom-right causal. No T x T mask exists; the largest mask is one pair's
[rejected, prefix + rejected].

The same computation in three forms: on the CPU one autograd node for all pairs, which writes every gradient once; on a
GPU in half precision one call of flash attention for variable lengths; anywhere else SDPA a segment at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.models.precision import autocast

PAIR_ATTENTION = "minimind_dpo_pairs"
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def pair_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, pair_segments: Sequence[PairSegment] | None = None,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each packed pair.

    Args:
        module: the model's attention module (unused here; part of transformers' interface).
        query: [1, heads, T, head_dim].
        key: [1, key/value heads, T, head_dim]; `value` likewise.
        attention_mask: None for packed rows.
        scaling: factor on the scores (default 1 / sqrt(head_dim)).
        dropout: probability of dropping an attention weight.
        pair_segments: where the pairs lie in T; without them this is plain causal attention.
        sliding_window: positions a query sees, itself included; None sees all.

    Returns:
        [1, T, heads, head_dim] and no weights.

    Raises:
        NotImplementedError: for score soft-capping and attention sinks, which scaled dot product attention lacks.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks have no packed form")
    if pair_segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    segments = tuple(pair_segments)
    query, key, value = autocast(query, key, value)
    if query.device.type == "cpu" and not dropout:
        return _CpuPairAttention.apply(query, key, value, segments, scaling, sliding_window), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return varlen_attention(query, key, value, segments, scaling, sliding_window), None
    return sdpa_attention(query, key, value, segments, scaling, sliding_window, dropout), None


class _Part(NamedTuple):
    """Queries from `start` to `end`, which see `prefix` (positions of the row, possibly none) and themselves."""

    start: int
    end: int
    prefix: slice

    @property
    def own(self) -> slice:
        return slice(self.start, self.end)


def _parts(segments: Sequence[PairSegment]) -> Iterator[_Part]:
    """Each pair's prefix with its chosen branch, then its rejected branch: together the row from start to end."""
    for segment in segments:
        chosen_end = segment.start + segment.prefix + segment.chosen
        yield _Part(segment.start, chosen_end, slice(segment.start, segment.start))
        if segment.rejected:
            yield _Part(chosen_end, segment.start + segment.length,
                        slice(segment.start, segment.start + segment.prefix))


def _keys(states: Tensor, part: _Part) -> Tensor:
    """What a part's queries see of [1, heads, T, head_dim]."""
    own = states[:, :, part.own]
    if part.prefix.start == part.prefix.stop:
        return own
    return torch.cat([states[:, :, part.prefix], own], dim=2)


def _mask(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """Additive mask [Q, K] of bottom-right causal attention; None where the kernel's own causal form does."""
    queries, keys = query.shape[2], key.shape[2]
    if window is None or window >= keys:
        if queries == keys:
            return None
        window = keys
    return _banded_mask(queries, keys, window, query.dtype, query.device)


@lru_cache(maxsize=16)  # every layer asks for the same ones
def _banded_mask(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None]
    hidden = (distance < 0) | (distance >= window)
    # a float mask keeps SDPA's fused path on CPU; a boolean one would leave it
    return torch.zeros_like(distance, dtype=dtype).masked_fill_(hidden, float("-inf"))


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[PairSegment], scaling: float | None,
    window: int | None, dropout: float = 0.0,
) -> Tensor:
    """Scaled dot product attention a segment at a time, for any device and type; arguments of `pair_attention`."""
    outputs = []
    for part in _parts(segments):
        queries, keys = query[:, :, part.own], _keys(key, part)
        mask = _mask(queries, keys, window)
        outputs.append(F.scaled_dot_product_attention(
            queries, keys, _keys(value, part), attn_mask=mask, is_causal=mask is None, scale=scaling,
            dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1]))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _CpuPairAttention(torch.autograd.Function):
    """`sdpa_attention` with its kernels called directly.

    Left to autograd, every slice of a segment would get a gradient as long as the whole row, zeros but for the slice,
    and these would be added up: 5 % of a step of eight pairs.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[PairSegment, ...], scaling: float | None,
        window: int | None,
    ) -> Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        sums = []
        for part in _parts(segments):
            queries, keys = query[:, :, part.own], _keys(key, part)
            mask = _mask(queries, keys, window)
            attended, logsumexp = _forward(
                queries, keys, _keys(value, part), 0.0, mask is None, attn_mask=mask, scale=scaling)
            output[:, part.own] = attended.transpose(1, 2)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.segments, ctx.scaling, ctx.window = segments, scaling, window
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, *sums = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
        for part, logsumexp in zip(_parts(ctx.segments), sums, strict=True):
            queries, keys = query[:, :, part.own], _keys(key, part)
            mask = _mask(queries, keys, ctx.window)
            grads = _backward(
                grad_output[:, part.own].transpose(1, 2), queries, keys, _keys(value, part),
                output[:, part.own].transpose(1, 2), logsumexp, 0.0, mask is None, attn_mask=mask, scale=ctx.scaling)
            grad_query[:, :, part.own] = grads[0]
            shared = part.prefix.stop - part.prefix.start
            for total, grad in ((grad_key, grads[1]), (grad_value, grads[2])):
                total[:, :, part.prefix] += grad[:, :, :shared]  # written before, with the chosen branch
                total[:, :, part.own] = grad[:, :, shared:]
        return grad_query, grad_key, grad_value, None, None, None


class _VarlenPlan(NamedTuple):
    """Parts as flash attention wants them.

    Attributes:
        key_index: [K] positions in the row whose keys are laid one after another; a prefix appears twice.
        query_ends, key_ends: [parts + 1] cumulative lengths, int32.
        longest_query, longest_key: the largest lengths.
    """

    key_index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)  # the layers of a model ask one after another
def _varlen_plan(segments: tuple[PairSegment, ...], device: torch.device) -> _VarlenPlan:
    parts = list(_parts(segments))
    keys = [torch.cat([torch.arange(part.prefix.start, part.prefix.stop), torch.arange(part.start, part.end)])
            for part in parts]
    lengths = torch.tensor([[0, 0], *([part.end - part.start, len(index)] for part, index in zip(
        parts, keys, strict=True))])
    ends = lengths.cumsum(dim=0).int().to(device)
    longest_query, longest_key = lengths.amax(dim=0).tolist()
    return _VarlenPlan(torch.cat(keys).to(device), ends[:, 0].contiguous(), ends[:, 1].contiguous(),
                       longest_query, longest_key)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[PairSegment, ...], scaling: float | None,
    window: int | None,
) -> Tensor:
    """All parts in one call of torch's flash attention for variable lengths; arguments of `pair_attention`.

    The row is already the queries' order; the keys of a rejected branch are its prefix again and its own. Causal
    there means bottom-right, which is what a branch needs. Half precision on a GPU only.
    """
    from torch.nn.attention.varlen import varlen_attn

    plan = _varlen_plan(segments, query.device)
    left = -1 if window is None else window - 1
    output = varlen_attn(
        query[0].transpose(0, 1), key[0].transpose(0, 1)[plan.key_index], value[0].transpose(0, 1)[plan.key_index],
        plan.query_ends, plan.key_ends, plan.longest_query, plan.longest_key, scale=scaling, window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1])
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(PAIR_ATTENTION, pair_attention)


def use_pair_attention(model: PreTrainedModel) -> bool:
    """Switch `model` to pair attention; False where its class does not dispatch through the interface."""
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(PAIR_ATTENTION)
    return model.config._attn_implementation == PAIR_ATTENTION
