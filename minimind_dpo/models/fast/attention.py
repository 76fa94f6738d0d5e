"""Attention over packed shared-prefix pairs, as one more implementation of transformers' attention interface.

Each pair is attended on its own: causally over `prefix + chosen`, then the rejected branch's queries over
`prefix + rejected`, bottom-right causal. No T x T mask exists; the largest mask is one pair's
[rejected, prefix + rejected].

The same computation in three forms: on the CPU that of `attention_cpu.py`; on a GPU one call of a kernel for variable
lengths (`attention_gpu.py`); anywhere else SDPA a segment at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_dpo.data.branches import BranchPlan, PairSegment
from minimind_dpo.engine import transfer
from minimind_dpo.engine.cpu import has_bf16_units
from minimind_dpo.models.fast.attention_blocks import banded_mask, pair_branches, visible_states
from minimind_dpo.models.fast.attention_cpu import CpuPairAttention
from minimind_dpo.models.fast.attention_gpu import Scores, kernel_for, varlen_attention
from minimind_dpo.models.fast.attention_ops import RowPlan, plan_attention
from minimind_dpo.models.fast.precision import autocast
from minimind_dpo.models.fast.products import TORCH

logger = logging.getLogger(__name__)


def pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pair_segments: Sequence[PairSegment] | None = None,
    branch_plan: BranchPlan | None = None,
    sliding_window: int | None = None,
    library: str = TORCH,
    row_plan: RowPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each packed pair.

    Args:
        module: of the model; its `wanted_rows` (`models/fast/patch.py`), if any, say whose outputs are used.
        query: [1, heads, T, head_dim].
        key: [1, key/value heads, T, head_dim]; `value` likewise.
        attention_mask: None for packed rows.
        scaling: factor on the scores (default 1 / sqrt(head_dim)).
        dropout: probability of dropping an attention weight.
        pair_segments: where the pairs lie in T.
        branch_plan: the same for a GPU's kernels, on the GPU; without it there is SDPA.
        sliding_window: positions a query sees, itself included; None sees all.
        library: for products of fp32 on the CPU (`models/fast/products.py`).
        row_plan: instead of the two before, where a compiled decoder calls; its products are torch's.

    Returns:
        [1, T, heads, head_dim] and no weights.

    Raises:
        NotImplementedError: for score soft-capping and attention sinks, which scaled dot product attention lacks,
            and for a model that does not hand on where the pairs lie, or cuts its row up before it attends.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("soft-capped scores and attention sinks have no packed form")
    if row_plan is not None:
        return _planned(module, (query, key, value), row_plan, scaling, sliding_window, dropout), None
    segments = _checked(pair_segments, query, key, value)
    query, key, value = autocast(query, key, value)
    if query.device.type == "cpu" and not dropout and not transfer.on_gpu(query):
        return _cpu_attention(module, (query, key, value), library, segments, scaling, sliding_window), None
    told = scaling, sliding_window
    output = None if branch_plan is None or dropout else _gpu_attention(query, key, value, branch_plan, *told)
    if output is None:
        output = sdpa_attention(query, key, value, segments, scaling, sliding_window, dropout)
    return output, None


@cache
def _say(how: str) -> None:
    """Say once how pairs are attended; the device and the size of heads decide."""
    logger.info("attention over packed pairs: %s", how)


def _gpu_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: BranchPlan, scaling: float | None, window: int | None
) -> Tensor | None:
    """By one call of a kernel, or None where there is none for such states."""
    narrow = window is not None and window < plan.longest_key
    scores = Scores(plan, scaling, window if narrow else None)
    if (kernel := kernel_for(query, value, scores)) is None:
        return None
    _say(f"{kernel.name} in {str(query.dtype).removeprefix('torch.')}, one call a layer")
    return varlen_attention(query, key, value, kernel, scores)


def _planned(
    module: nn.Module,
    states: tuple[Tensor, ...],
    plan: RowPlan,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    if dropout:
        raise NotImplementedError("dropped attention weights have no compiled form")
    query, key, value = autocast(*states)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return plan_attention(query, key, value, plan, scaling, window, getattr(module, "wanted_rows", None))


def _cpu_attention(module: nn.Module, states: tuple[Tensor, ...], library: str, *arguments: Any) -> Tensor:
    _say("on the CPU, a pair at a time")
    rows, dtype = getattr(module, "wanted_rows", None), states[0].dtype
    wanted = None if rows is None else tuple(rows.tolist())
    if not (dtype == torch.bfloat16 and has_bf16_units()):
        states = tuple(state.float() for state in states)
    with torch.autocast("cpu", enabled=False):
        return CpuPairAttention.apply(*states, *arguments, wanted, library).to(dtype)


def _checked(segments: Sequence[PairSegment] | None, *states: Tensor) -> tuple[PairSegment, ...]:
    """The segments, unless the states [1, heads, T, D] are not those of their row."""
    if segments is None:
        raise NotImplementedError("the model does not tell its attention where the pairs lie")
    length = segments[-1].start + segments[-1].length
    if any(state.shape[::2] != (1, length) for state in states):
        shapes = " and ".join(str(list(state.shape)) for state in states[:2])
        raise NotImplementedError(f"queries and keys {shapes} are not one row of {length}")
    return tuple(segments)


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
    _say("torch's SDPA, a segment at a time")
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
