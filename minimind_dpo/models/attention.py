"""Attention over packed shared-prefix pairs, as one more implementation of transformers' attention interface.

Each pair is attended on its own: causally over `prefix + chosen`, then the rejected branch's queries over
`prefix + rejected`, bottom-right causal. No T x T mask exists; the largest mask is one pair's
[rejected, prefix + rejected].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minimind_dpo.data.batch import PairSegment

PAIR_ATTENTION = "minimind_dpo_pairs"


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
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    for segment in pair_segments:
        chosen_end = segment.start + segment.prefix + segment.chosen
        outputs.append(_attend(
            query[:, :, segment.start : chosen_end], key[:, :, segment.start : chosen_end],
            value[:, :, segment.start : chosen_end], sliding_window, options))
        if segment.rejected:
            prefix, branch = slice(segment.start, segment.start + segment.prefix), slice(
                chosen_end, segment.start + segment.length)
            outputs.append(_attend(
                query[:, :, branch], torch.cat([key[:, :, prefix], key[:, :, branch]], dim=2),
                torch.cat([value[:, :, prefix], value[:, :, branch]], dim=2), sliding_window, options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, Any]) -> Tensor:
    """Bottom-right causal attention of the last queries [1, H, Q, D] over keys [1, H_kv, K, D], K >= Q."""
    queries, keys = query.shape[2], key.shape[2]
    if window is None or window >= keys:
        if queries == keys:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        window = keys
    position = torch.arange(keys, device=query.device)
    distance = position[keys - queries :, None] - position[None]
    hidden = (distance < 0) | (distance >= window)
    # a float mask keeps SDPA's fused path on CPU; a boolean one would leave it
    mask = torch.zeros_like(distance, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


AttentionInterface.register(PAIR_ATTENTION, pair_attention)


def use_pair_attention(model: PreTrainedModel) -> bool:
    """Switch `model` to pair attention; False where its class does not dispatch through the interface."""
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(PAIR_ATTENTION)
    return model.config._attn_implementation == PAIR_ATTENTION
