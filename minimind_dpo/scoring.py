"""The one scorer of policy and reference: PairBatch -> log-probabilities of the tokens that count."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from minimind_dpo.data.batch import PairBatch, pack_pairs, pad_pairs
from minimind_dpo.models.attention import use_pair_attention
from minimind_dpo.models.fused import fuse, restrict_last_layer
from minimind_dpo.models.head import split_head
from minimind_dpo.models.router import router_aux_loss, router_settings

logger = logging.getLogger(__name__)

PairLayout = Callable[[Sequence[dict[str, Any]]], PairBatch]


class PairScores(NamedTuple):
    """What one forward pass says of B pairs.

    Attributes:
        per_token_logps: [M] log-probabilities (nats) of the counted tokens in the batch's canonical order.
        aux_losses: [B] router loss of each pair, the mean of its two sequences; zeros for a dense model.
    """

    per_token_logps: Tensor
    aux_losses: Tensor


class PairScorer(nn.Module):
    """A causal language model that scores pairs in either layout of `data/batch.py`.

    Args:
        model: the language model; in training mode its router loss, if it has one, is scored too.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.router = router_settings(model.config)
        fuse(model)
        self._wanted = restrict_last_layer(model)
        self._split = split_head(model)
        self.fast = False  # until `choose_layout` has seen that it changes nothing

    def forward(self, batch: PairBatch) -> PairScores:
        """Score a batch; the language model head runs only where the next token counts."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if batch.segments is not None:
            inputs["pair_segments"] = batch.segments
        else:
            inputs["attention_mask"] = batch.attention_mask
        wants_router = self.router is not None and self.training
        if wants_router:
            inputs["output_router_logits"] = True
        if self.fast and self._split is not None:
            decoder, head = self._split
            self._wanted.positions = None if wants_router else batch.state_positions
            output = decoder(**inputs)
            logps = head(output.last_hidden_state.flatten(0, -2)[batch.logit_positions], batch.target_ids)
        else:
            self._wanted.positions = None
            output = self.model(**inputs, logits_to_keep=_kept(batch))
            logps = -F.cross_entropy(output.logits.flatten(0, -2).float(), batch.target_ids, reduction="none")
        return PairScores(logps[batch.token_index],
                          self._aux_losses(output, batch) if wants_router else logps.new_zeros(len(batch)))

    def _aux_losses(self, output: Any, batch: PairBatch) -> Tensor:
        assert self.router is not None
        sequence_losses = router_aux_loss(
            output.router_logits, batch.sequences, kind=self.router.kind, top_k=self.router.top_k,
            coefficient=self.router.coefficient)
        return sequence_losses.view(-1, 2).mean(dim=1)


def sum_per_side(per_token_logps: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Sum [M] per-token log-probabilities over each side's completion tokens: chosen [B] and rejected [B], nats.

    In float64: a sum of some hundred nats has steps of 1e-5 in float32, and losses are made of differences of them.
    """
    sums = torch.stack([part.sum(dtype=torch.float64) for part in per_token_logps.split(batch.side_sizes)]).view(-1, 2)
    return sums[:, 0], sums[:, 1]


@torch.no_grad()
def choose_layout(scorer: PairScorer, attn_implementation: str, device: torch.device) -> PairLayout:
    """Decide between the packed and the plain layout, and set the model's attention accordingly.

    Two probe pairs are scored by the model's own forward pass in the plain layout. Whatever is faster is used where it
    gives the same: the head on its own (`models/head.py`; a model may scale or cap its logits afterwards), and with
    `pairs` the packed layout. A model that fails at the latter (recurrent or state-space layers, an attention of its
    own) gets the plain layout, with a notice.
    """
    model, training = scorer.model, scorer.training
    original = model.config._attn_implementation
    scorer.eval()
    scorer.fast = False
    try:
        plain = scorer(pad_pairs(_probe_rows(model)).to(device)).per_token_logps
        scorer.fast = True
        scorer.fast = _agrees(scorer, pad_pairs, plain)
        if attn_implementation != "pairs":
            return pad_pairs
        if use_pair_attention(model) and _agrees(scorer, pack_pairs, plain):
            return pack_pairs
        model.set_attn_implementation(original)
    finally:
        scorer.train(training)
    logger.warning("%s cannot attend over packed pairs: each side gets a padded row of its own", type(model).__name__)
    return pad_pairs


def _agrees(scorer: PairScorer, layout: PairLayout, expected: Tensor) -> bool:
    """Whether the probe pairs in `layout` score as `expected`."""
    try:
        scores = scorer(layout(_probe_rows(scorer.model)).to(expected.device)).per_token_logps
    except (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError) as error:
        logger.info("probe failed: %s", error)
        return False
    return torch.allclose(scores, expected, rtol=1e-3, atol=1e-3 if scorer.model.dtype == torch.float32 else 0.1)


def _kept(batch: PairBatch) -> Tensor:
    """Where a model's own forward pass has to apply its head: positions, or for rows of several a mask like them."""
    if batch.segments is not None:
        return batch.logit_positions
    counted = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    counted[batch.logit_positions] = True
    return counted.view_as(batch.input_ids)


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that a model knows."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings.num_embeddings


def _probe_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Two small made-up pairs."""
    vocabulary = embedding_rows(model)
    tokens = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(24)]
    return [_probe_row(tokens[:6], tokens[6:10], tokens[10:15]), _probe_row(tokens[15:18], tokens[18:21], tokens[21:])]


def _probe_row(prefix: list[int], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, rest in (("chosen", chosen), ("rejected", rejected)):
        row[f"{name}_input_ids"] = prefix + rest
        row[f"{name}_completion_mask"] = [0] * len(prefix) + [1] * len(rest)
    return row
