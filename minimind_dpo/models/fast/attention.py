"""Attention over packed shared-prefix pairs, as one more implementation of transformers' attention interface.

Each pair is attended on its own: causally over `prefix + chosen`, then the rejected branch's queries over
`prefix + rejected`, bottom-right causal. No T x T mask exists; the largest mask is one pair's
[rejected, prefix + rejected].

The same computation in three forms: on the CPU that of `attention_cpu.py`; on a GPU in half precision one
call of flash attention for variable lengths; anywhere else SDPA a segment at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.engine.cpu import has_bf16_units
from minimind_dpo.engine.transfer import send
from minimind_dpo.models.fast.attention_blocks import banded_mask, pair_branches, visible_states
from minimind_dpo.models.fast.attention_cpu import CpuPairAttention
from minimind_dpo.models.fast.precision import autocast


def pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pair_segments: Sequence[PairSegment] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each packed pair.

    Args:
        module: the model's attention module; its `wanted_rows` (`models/fast/patch.py`), if it has them, say whose
            outputs are used: the CPU computes no others, which become 0 or anything.
        query: [1, heads, T, head_dim].
        key: [1, key/value heads, T, head_dim]; `value` likewise.
        attention_mask: None for packed rows.
        scaling: factor on the scores (default 1 / sqrt(head_dim)).
        dropout: probability of dropping an attention weight.
        pair_segments: where the pairs lie in T.
        sliding_window: positions a query sees, itself included; None sees all.

    Returns:
        [1, T, heads, head_dim] and no weights.

    Raises:
        NotImplementedError: for score soft-capping and attention sinks, which scaled dot product attention lacks,
            and for a model that does not hand on where the pairs lie, or cuts its row up before it attends.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks have no packed form")
    if pair_segments is None:
        raise NotImplementedError("the model does not tell its attention where the pairs lie")
    segments = tuple(pair_segments)
    _check_row(query, key, value, segments[-1].start + segments[-1].length)
    query, key, value = autocast(query, key, value)
    if query.device.type == "cpu" and not dropout:
        rows = getattr(module, "wanted_rows", None)
        wanted = None if rows is None else tuple(rows.tolist())
        states = [query, key, value]
        if not (query.dtype == torch.bfloat16 and has_bf16_units()):
            states = [state.float() for state in states]
        with torch.autocast("cpu", enabled=False):
            return CpuPairAttention.apply(*states, segments, scaling, sliding_window, wanted).to(query.dtype), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return varlen_attention(query, key, value, segments, scaling, sliding_window), None
    return sdpa_attention(query, key, value, segments, scaling, sliding_window, dropout), None


def _check_row(query: Tensor, key: Tensor, value: Tensor, length: int) -> None:
    """Refuse states that are not those of one row of `length` positions."""
    if not query.shape[::2] == key.shape[::2] == value.shape[::2] == (1, length):
        raise NotImplementedError(f"queries {list(query.shape)} and keys {list(key.shape)} are not one row of {length}")


def _mask(query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """Additive mask of bottom-right causal attention; None where SDPA's own causal form does."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or window >= keys):
        return None
    return banded_mask(queries, keys, window, query.dtype, query.device)


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[PairSegment],
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot product attention a segment at a time, for any device and type; arguments of `pair_attention`."""
    outputs = []
    for block in pair_branches(segments):
        queries, keys = query[:, :, block.queries], visible_states(key, block)
        mask = _mask(queries, keys, window)
        outputs.append(
            F.scaled_dot_product_attention(
                queries,
                keys,
                visible_states(value, block),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _VarlenPlan(NamedTuple):
    """A batch's branches as flash attention wants them.

    Attributes:
        key_index: [K] positions in the row whose keys are laid one after another; a prefix appears twice.
        query_ends, key_ends: [branches + 1] cumulative lengths, int32.
        longest_query, longest_key: the largest lengths.
    """

    key_index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)  # the layers of a model ask one after another
def _varlen_plan(segments: tuple[PairSegment, ...], device: torch.device) -> _VarlenPlan:
    branches = list(pair_branches(segments))
    keys = [
        torch.cat([torch.arange(branch.prefix.start, branch.prefix.stop), torch.arange(branch.start, branch.end)])
        for branch in branches
    ]
    lengths = torch.tensor(
        [[0, 0], *([branch.end - branch.start, len(index)] for branch, index in zip(branches, keys, strict=True))]
    )
    ends = lengths.cumsum(dim=0).int().T.contiguous()
    longest_query, longest_key = lengths.amax(dim=0).tolist()
    query_ends, key_ends = send(ends, device)
    return _VarlenPlan(send(torch.cat(keys), device), query_ends, key_ends, longest_query, longest_key)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[PairSegment, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All branches in one call of torch's flash attention for variable lengths; arguments of `pair_attention`.

    The row is already the queries' order; the keys of a rejected branch are its prefix again and its own. Causal
    there means bottom-right, which is what a branch needs. Half precision on a GPU only.
    """
    from torch.nn.attention.varlen import varlen_attn  # late: for GPUs only

    plan = _varlen_plan(segments, query.device)
    left = -1 if window is None else window - 1
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1)[plan.key_index],
        value[0].transpose(0, 1)[plan.key_index],
        plan.query_ends,
        plan.key_ends,
        plan.longest_query,
        plan.longest_key,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]
