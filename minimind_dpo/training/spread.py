"""The held-out pairs of an evaluation one by one: their rewards and lengths, and the tokens of a few of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine.devices import sum_dtype, summable
from minimind_dpo.engine.transfer import send
from minimind_dpo.objective.step import score_pairs
from minimind_dpo.objective.sums import sum_per_side
from minimind_dpo.training.run import Run

_SHOWN = 6  # worst and best pairs
_MOST_TOKENS = 320  # shown of an answer
_PROMPT = 600  # characters shown of what comes before it, its end


class PairRewards:
    """Rewards and lengths of N held-out pairs, taken in while an evaluation scores them on several ranks.

    Args:
        num_pairs: N.
        beta: of the rewards.
        device: of the values.
    """

    def __init__(self, num_pairs: int, beta: float, device: torch.device):
        self._beta = beta
        self._values = torch.zeros(num_pairs, 3, dtype=sum_dtype(device), device=device)

    def put(self, pairs: Sequence[int], batch: PairBatch, per_token_logratios: Tensor) -> None:
        """Take in the pairs of a micro-batch: their positions, and [M] log-ratios of their counted tokens."""
        chosen, rejected = (self._beta * side for side in sum_per_side(per_token_logratios, batch))
        columns = torch.stack([chosen, rejected, summable(batch.chosen_tokens - batch.rejected_tokens)], dim=1)
        self._values.index_copy_(0, send(torch.tensor(pairs), columns.device), columns)

    def gather(self, total: Callable[[Tensor], Tensor]) -> np.ndarray:
        """[N, 3] on every rank: chosen and rejected rewards, and by how many tokens the chosen side is longer.

        Collective; `total` adds up all ranks' values.
        """
        return total(self._values).cpu().numpy()


def empty_rewards(run: Run) -> dict[str, PairRewards]:
    """What an evaluation may fill: of each set of held-out pairs, by its name."""
    return {name: PairRewards(len(data), run.config.beta, run.engine.device) for name, data in run.eval_sets.items()}


def extremes(values: np.ndarray, most: int = _SHOWN) -> list[tuple[str, int]]:
    """("worst" or "best", position) of the pairs with the lowest and the highest margins of `gather`'s values."""
    margins = values[:, 0] - values[:, 1]
    order = [pair for pair in np.argsort(margins, kind="stable") if np.isfinite(margins[pair])]
    count = min(most, len(order) // 2)
    return [("worst", int(pair)) for pair in order[:count]] + [("best", int(pair)) for pair in order[::-1][:count]]


@torch.no_grad()
def describe_extremes(run: Run, name: str, values: np.ndarray) -> list[dict[str, Any]]:
    """Worst and best pairs of a set with each counted token's log-ratio to the reference. Collective.

    They are scored once more, one at a time: so the evaluation need not keep every token of every pair. Several sets
    share the number of pairs that is shown.
    """
    data, most = run.eval_sets[name], max(_SHOWN // len(run.eval_sets), 1)
    collate, was_training, rows = run.reference.collating(run.layout), run.scorer.training, []
    run.scorer.eval()
    for kind, pair in extremes(values, most):
        row = data.dataset[pair]
        batch = collate([row]).to(run.engine.device)
        reference = run.reference.per_token_logps(batch)
        scored = score_pairs(run.scorer, batch, reference, run.preference, run.end_token_ids)
        ratios = scored.per_token_logratios.float().cpu().split(batch.side_sizes)
        chosen, rejected, longer = map(float, values[pair])
        sides = {
            side: {"reward": reward} | pieces(row, side, part.tolist(), run.tokenizer)
            for side, reward, part in zip(("chosen", "rejected"), (chosen, rejected), ratios, strict=True)
        }
        told = {"kind": kind, "set": name, "place": row["place"], "margin": chosen - rejected, "longer": longer}
        rows.append(told | sides)
    run.scorer.train(was_training)
    return rows


def pieces(row: dict[str, Any], side: str, logratios: Sequence[float], tokenizer: Any) -> dict[str, Any]:
    """One side of a pair as text with log-ratios.

    Args:
        row: of the tokenised data.
        side: `chosen` or `rejected`.
        logratios: of its counted tokens, nats.
        tokenizer: a fast one.

    Returns:
        `before`: the text before the first counted token, its end; `tokens`: [text, log-ratio or None where a token
        does not count] from there on, tokens that share a character joined; `cut`: how many tokens are left out.
    """
    ids, mask = row[f"{side}_input_ids"], row[f"{side}_completion_mask"]
    values: list[float | None] = [None] * len(ids)
    for place, value in zip(np.flatnonzero(np.asarray(mask)[1:]) + 1, logratios, strict=True):
        values[place] = value
    begin = next((place for place, value in enumerate(values) if value is not None), len(ids))
    stream, tokens, waiting = DecodeStream(skip_special_tokens=False), list[Any](), list[float]()
    for token, logratio in zip(ids[begin : begin + _MOST_TOKENS], values[begin:], strict=False):
        waiting += [] if logratio is None else [logratio]
        text = stream.step(tokenizer.backend_tokenizer, token)
        if text:
            tokens.append([text, round(sum(waiting), 4) if waiting else None])
            waiting = []
    before = tokenizer.decode(ids[:begin], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"before": before[-_PROMPT:], "tokens": tokens, "cut": max(len(ids) - begin - _MOST_TOKENS, 0)}
