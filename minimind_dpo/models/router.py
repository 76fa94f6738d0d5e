"""Load-balancing losses of mixture-of-experts routers, one number a sequence. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from minimind_dpo.models.fast.segments import sum_segments

RouterKind = Literal["minimind", "transformers"]


class JoinedSequences(NamedTuple):
    """Sequences one after another, for a device to which each of its own would be many small tasks.

    Attributes:
        positions: [N] of their tokens among the rows.
        ends: [sequences + 1] where each begins in `positions`, and where the last one ends.
    """

    positions: Tensor
    ends: Tensor


@dataclass(frozen=True)
class RouterSettings:
    """How a model's router loss is computed; the fields are the keyword arguments of `router_aux_loss`.

    Attributes:
        kind: `minimind` sums a loss per layer, `transformers` pools all layers.
        top_k: experts a token is sent to.
        coefficient: weight of the loss beside the DPO loss, already applied by `router_aux_loss`.
    """

    kind: RouterKind
    top_k: int
    coefficient: float


def router_settings(config: PreTrainedConfig) -> RouterSettings | None:
    """Read the router loss of a model from its configuration.

    Args:
        config: the configuration of any causal language model.

    Returns:
        The settings, or None where there is no router loss: a dense model, a coefficient of 0, or a
        mixture of experts that is balanced without a loss (its configuration has no coefficient).
    """
    config = config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    coefficient = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)
    if not (experts and top_k and coefficient):
        return None
    kind: RouterKind = "minimind" if getattr(config, "minimind_generation", None) else "transformers"
    return RouterSettings(kind=kind, top_k=int(top_k), coefficient=float(coefficient))


def router_aux_loss(
    router_logits: Sequence[Tensor],
    sequences: Sequence[Tensor | slice] | JoinedSequences,
    *,
    kind: RouterKind,
    top_k: int,
    coefficient: float,
) -> Tensor:
    """Load-balancing loss of every sequence (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6).

    With `f` the load of each expert (no gradient) and `P` its mean softmax score (with gradient):

    - `minimind`: per layer `num_experts * sum(f * P)`, `f` the share of the sequence's routed slots
      (sums to 1); the layers are summed.
    - `transformers`: the same product with `f` in slots a token (sums to `top_k`), and `f` and `P`
      pooled over the layers first, as `load_balancing_loss_func` does.

    Args:
        router_logits: one tensor a layer, [tokens, num_experts], before the softmax.
        sequences: for each sequence the positions of its tokens among the `tokens` rows, as an index
            tensor [n] or a slice; or all of them joined, for a GPU. Sequences may share tokens: a shared prefix counts
            in each of them.
        kind: whose formula.
        top_k: experts a token is sent to.
        coefficient: multiplies the result.

    Returns:
        [number of sequences] in fp32.
    """
    scores = torch.stack([logits.float().softmax(dim=-1) for logits in router_logits])  # [layers, tokens, E]
    num_experts = scores.shape[-1]
    chosen = scores.detach().topk(top_k, dim=-1).indices
    slots = torch.zeros_like(scores, requires_grad=False).scatter_(-1, chosen, 1.0)
    if isinstance(sequences, JoinedSequences):
        load, mean_score = (_means(values, sequences) for values in (slots, scores))  # [sequences, layers, E]
        if kind == "minimind":
            return (load / top_k * mean_score).sum(dim=(1, 2)) * (num_experts * coefficient)
        return (load.mean(dim=1) * mean_score.mean(dim=1)).sum(dim=1) * (num_experts * coefficient)
    losses = []
    for tokens in sequences:
        load, mean_score = slots[:, tokens].mean(dim=1), scores[:, tokens].mean(dim=1)  # [layers, E]
        if kind == "minimind":
            losses.append((load / top_k * mean_score).sum())
        else:
            losses.append((load.mean(dim=0) * mean_score.mean(dim=0)).sum())
    return torch.stack(losses) * (num_experts * coefficient)


def _means(values: Tensor, sequences: JoinedSequences) -> Tensor:
    """[sequences, layers, E] of [layers, tokens, E]: means over each sequence's tokens."""
    rows = values.transpose(0, 1).index_select(0, sequences.positions)
    return sum_segments(rows, sequences.ends) / sequences.ends.diff()[:, None, None]
