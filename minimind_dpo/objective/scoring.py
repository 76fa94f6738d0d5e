"""The one scorer of policy and reference: PairBatch -> log-probabilities of the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine import transfer
from minimind_dpo.models.fast.compiling import CompiledDecoder
from minimind_dpo.models.fast.half import product_places, product_weights
from minimind_dpo.models.fast.patch import Patch
from minimind_dpo.models.fast.products import TORCH
from minimind_dpo.models.router import JoinedSequences, router_aux_loss, router_settings

_NOTHING = torch.empty(0)


class PairScores(NamedTuple):
    """What one forward pass says of B pairs.

    Attributes:
        per_token_logps: [M] log-probabilities (nats) of the counted tokens in the batch's canonical order.
        aux_losses: [B] router loss of each pair, the mean of its two sequences; zeros for a dense model.
        log_squares: [M] log sum_v p(v)^2 over the vocabulary where each of them stands, without gradient; where the
            scorer was told to, else empty.
    """

    per_token_logps: Tensor
    aux_losses: Tensor
    log_squares: Tensor = _NOTHING


class PairScorer(nn.Module):
    """A causal language model that scores pairs in either layout of `data/batch.py`.

    The model is patched for the time of a batch only, so outside it computes and generates as it always did.

    Args:
        model: the language model; in training mode its router loss, if it has one, is scored too.
        library: for fp32 products on the CPU (`models/fast/products.py`).

    Attributes:
        library: as given.
        fused_head: log-probabilities come from `models/fast/head.py` and the last layer works on counted positions
            only; off until `choose_layout` has seen that it changes nothing.
        squares: whether a forward pass gives `PairScores.log_squares`.
        half_weights: by parameter the copies that products use instead, which an engine keeps up to date.
        compiled: what calls the decoder in training passes over packed rows; None: nothing but itself.
    """

    def __init__(self, model: PreTrainedModel, library: str = TORCH):
        super().__init__()
        self.model, self.library = model, library
        self.router = router_settings(model.config)
        self._patch = Patch(model, library)
        self.fused_head, self.squares = False, False
        self.half_weights: Mapping[nn.Parameter, Tensor] = {}
        self.compiled: CompiledDecoder | None = None

    def forward(self, batch: PairBatch) -> PairScores:
        """Score a batch; the language model head runs only where the next token counts.

        Raises:
            NotImplementedError: the batch is packed, and the model cannot attend over packed pairs.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if batch.segments is None:
            inputs["attention_mask"] = batch.attention_mask
        wants_router = self.router is not None and self.training
        if wants_router:
            inputs["output_router_logits"] = True
        decoder, head = self._patch.decoder, self._patch.head
        fused = self.fused_head and head is not None
        wanted = batch.state_positions if fused and not wants_router else None
        packed = batch.segments is not None
        lengths = () if packed else batch.sequence_lengths
        with self._patch.applied(packed=packed, wanted=wanted, copies=self.half_weights, lengths=lengths):
            if fused:
                output = self._decoded(decoder, inputs, batch, wanted)
                scored = head(
                    output.last_hidden_state.flatten(0, -2)[batch.logit_positions], batch.target_ids, self.squares
                )
            else:
                output = self.model(**inputs, **_pairs(batch), logits_to_keep=_kept(batch))
                scored = _scored(output.logits.flatten(0, -2).float(), batch.target_ids, self.squares)
        logps, squares = scored if self.squares else (scored, _NOTHING)
        return PairScores(
            logps[batch.token_index],
            self._aux_losses(output, batch) if wants_router else logps.new_zeros(len(batch)),
            squares[batch.token_index] if self.squares else squares,
        )

    def _decoded(self, decoder: nn.Module, inputs: dict[str, Any], batch: PairBatch, wanted: Tensor | None) -> Any:
        if self.compiled is not None and batch.segments is not None and torch.is_grad_enabled():
            return self.compiled(decoder, inputs, batch.segments, batch.branches, wanted)
        return decoder(**inputs, **_pairs(batch))

    @property
    def needs_rows(self) -> bool:
        """Whether each side needs a row of its own, since the model's positions depend on how long the row is."""
        return bool(self._patch.length_dependent)

    def product_weights(self) -> dict[str, nn.Parameter]:
        """The model's parameters that products use, by name."""
        return product_weights(self.model)

    def replace_product_weights(self, replacement: Callable[[str, nn.Parameter], Tensor]) -> None:
        """Put what `replacement` makes of a name and a parameter in the places of a frozen model's product weights.

        An embedding that is tied to the head keeps its own.
        """
        names = {parameter: name for name, parameter in self.product_weights().items()}
        for module, name in list(product_places(self.model)):
            parameter = getattr(module, name)
            setattr(module, name, nn.Parameter(replacement(names[parameter], parameter), requires_grad=False))

    def _aux_losses(self, output: Any, batch: PairBatch) -> Tensor:
        assert self.router is not None
        sequences: Any = batch.sequences
        if transfer.on_gpu(batch.input_ids):
            ends = torch.tensor([0, *accumulate(batch.sequence_lengths)])
            sequences = JoinedSequences(batch.sequence_positions, transfer.send(ends, batch.input_ids.device))
        sequence_losses = router_aux_loss(
            output.router_logits,
            sequences,
            kind=self.router.kind,
            top_k=self.router.top_k,
            coefficient=self.router.coefficient,
        )
        return sequence_losses.view(-1, 2).mean(dim=1)


def _pairs(batch: PairBatch) -> dict[str, Any]:
    """What a model hands on to its attention over a packed row."""
    return {} if batch.segments is None else {"pair_segments": batch.segments, "branch_plan": batch.branches}


def _scored(logits: Tensor, targets: Tensor, squares: bool) -> Tensor | tuple[Tensor, Tensor]:
    """What the patched head gives, of a model's own logits [K, V]."""
    logps = -F.cross_entropy(logits, targets, reduction="none")
    if not squares:
        return logps
    detached = logits.detach()
    return logps, (2 * detached).logsumexp(dim=-1) - 2 * detached.logsumexp(dim=-1)


def _kept(batch: PairBatch) -> Tensor:
    """Where a model's own forward pass has to apply its head: positions, or for rows of several a mask like them."""
    if batch.segments is not None:
        return batch.logit_positions
    counted = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    counted[batch.logit_positions] = True
    return counted.view_as(batch.input_ids)
