"""What each pair comes to, of the stored log-probabilities of a model and of its baseline."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minimind_dpo.data.batch import PairBatch, pack_pairs
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses
from minimind_dpo.objective.scoring import PairScores
from minimind_dpo.objective.step import score_pairs
from minimind_dpo.objective.sums import PAIR_COLUMNS, pair_columns, sum_per_side
from minimind_dpo.reference.cache import Needed
from minimind_dpo.reference.sources import CachedReference, NoReference, Reference

LOSS = "loss"
DRIFTS = ("logps/chosen_drift", "logps/rejected_drift")
_OF_BASELINE = ("logps/chosen", "logps/rejected", "logps/accuracies")
_GAIN = "gain/logps/accuracies"


class Stored(NamedTuple):
    """What was stored of a model: log-probabilities, and with WPO's weights `PairScores.log_squares`."""

    logps: CachedReference
    log_squares: CachedReference | None = None


class PairValues(NamedTuple):
    """What N pairs come to.

    Attributes:
        metrics: [N] fp64 each, by name; those that need a baseline are left out where there is none.
        chosen_tokens, rejected_tokens: [N] counted tokens.
    """

    metrics: dict[str, np.ndarray]
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    def at(self, pairs: np.ndarray) -> PairValues:
        """Those of some pairs: indices, or one truth value each."""
        metrics = {name: values[pairs] for name, values in self.metrics.items()}
        return PairValues(metrics, self.chosen_tokens[pairs], self.rejected_tokens[pairs])

    def __len__(self) -> int:
        return len(self.chosen_tokens)


def pair_values(
    data: TokenizedData, model: Stored, baseline: Reference | None, preference: Preference, earlier_logits: float
) -> PairValues:
    """Score all pairs of `data` from what is stored, on the CPU in fp64.

    Args:
        data: N pairs.
        model: that is evaluated.
        baseline: None where there is none.
        preference: the loss; one over a step takes all pairs as one.
        earlier_logits: the running mean of `logits`, for losses that look back.
    """
    needed = Needed(data, range(len(data)))
    scored = [
        _chunk(needed.rows(chunk), model, baseline or NoReference(), preference) for chunk in range(needed.chunks())
    ]
    parts, columns, of_baseline = zip(*scored, strict=True)
    logps = PairLogps(*(torch.cat(column) for column in zip(*parts, strict=True)))
    metrics = dict(zip(PAIR_COLUMNS, torch.cat(columns, dim=1), strict=True))
    losses = dpo_losses(logps, preference, earlier_logits)
    metrics = (
        {LOSS: losses.total}
        | {f"losses/{name}": part for name, part in zip(preference.parts, losses.parts, strict=True)}
        | metrics
    )
    if baseline is None:
        kept = () if preference.needs_reference else (LOSS, *(name for name in metrics if name.startswith("losses/")))
        metrics = {name: values for name, values in metrics.items() if name.startswith("logps/") or name in kept}
    else:
        theirs = dict(zip(PAIR_COLUMNS, torch.cat(of_baseline, dim=1), strict=True))
        metrics |= {drift: metrics[name] - theirs[name] for drift, name in zip(DRIFTS, _OF_BASELINE, strict=False)}
        metrics |= {f"baseline/{name}": theirs[name] for name in _OF_BASELINE}
        metrics[_GAIN] = metrics["logps/accuracies"] - theirs["logps/accuracies"]
    arrays = {name: values.double().numpy() for name, values in metrics.items()}
    return PairValues(arrays, logps.chosen_tokens.numpy(), logps.rejected_tokens.numpy())


@torch.no_grad()
def _chunk(
    rows: list[dict], model: Stored, baseline: Reference, preference: Preference
) -> tuple[PairLogps, Tensor, Tensor]:
    """What losses know of some pairs, and `PAIR_COLUMNS` of the model and of the baseline alone, [columns, B]."""
    batch = pack_pairs(rows)
    ref_per_token_logps = baseline.per_token_logps(batch)
    no_ends = torch.empty(0, dtype=torch.long)
    scored = score_pairs(_StoredScorer(model), batch, ref_per_token_logps, preference, no_ends)
    policy_logps = sum_per_side(model.logps.per_token_logps(batch), batch)
    ref_logps = sum_per_side(ref_per_token_logps, batch)
    columns = pair_columns(batch, policy_logps=policy_logps, ref_logps=ref_logps, beta=preference.beta)
    theirs = pair_columns(batch, policy_logps=ref_logps, ref_logps=ref_logps, beta=preference.beta)
    return scored.logps, columns, theirs


class _StoredScorer(nn.Module):
    """A scorer that looks up what was scored before."""

    def __init__(self, model: Stored):
        super().__init__()
        self._model = model

    def forward(self, batch: PairBatch) -> PairScores:
        """As `PairScorer` of the model, in evaluation mode."""
        logps = self._model.logps.per_token_logps(batch)
        aux_losses = torch.zeros(len(batch))
        if self._model.log_squares is None:
            return PairScores(logps, aux_losses)
        return PairScores(logps, aux_losses, self._model.log_squares.per_token_logps(batch))
