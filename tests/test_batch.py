"""The packed shared-prefix layout against hand-written batches and against the plain layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from helpers_model import VOCAB, random_row, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind_dpo.data.batch import PairBatch, PairSegment, pack_pairs, pad_pairs, pair_key
from minimind_dpo.models.fast import head
from minimind_dpo.models.router import router_aux_loss, router_settings
from minimind_dpo.objective.layout import PACKED, PLAIN, choose_layout
from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses
from minimind_dpo.objective.scoring import PairScorer, PairScores
from minimind_dpo.objective.sums import sum_per_side

KINDS = ["llama", "mistral_window", "qwen3", "qwen3_moe", "minimind_moe"]


def _row(chosen: list[int], rejected: list[int], chosen_mask: list[int], rejected_mask: list[int]) -> dict[str, Any]:
    return {
        "chosen_input_ids": chosen,
        "chosen_completion_mask": chosen_mask,
        "rejected_input_ids": rejected,
        "rejected_completion_mask": rejected_mask,
    }


def test_packed_batch_by_hand() -> None:
    first = _row([10, 11, 12, 13, 14], [10, 11, 12, 23, 24, 25], [0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1])
    second = _row([30, 41, 42], [30, 51], [1, 1, 1], [1, 1])
    batch = pack_pairs([first, second])

    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 23, 24, 30, 41]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert batch.segments == (PairSegment(0, 3, 1, 2), PairSegment(6, 1, 1, 0))
    # pair 1: shared 11; chosen 13 (after the prefix), 14; rejected 23 (after the prefix), 25
    # pair 2: chosen 41 (after the prefix), 42; rejected 51 (after the prefix); the first token is never predicted
    assert batch.logit_positions.tolist() == [0, 2, 3, 2, 5, 6, 7, 6]
    assert batch.target_ids.tolist() == [11, 13, 14, 23, 25, 41, 42, 51]
    assert batch.token_index.tolist() == [0, 1, 2, 0, 3, 4, 5, 6, 7]
    assert batch.chosen_tokens.tolist() == [3, 2] and batch.rejected_tokens.tolist() == [3, 1]
    assert batch.side_sizes == (3, 3, 2, 1)
    assert [s.tolist() for s in batch.sequences] == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [6, 7], [6]]
    assert batch.num_tokens == 8


def test_plain_batch_by_hand() -> None:
    batch = pad_pairs([_row([10, 11, 12], [10, 21], [0, 1, 1], [0, 1])])
    assert batch.input_ids.tolist() == [[10, 11], [10, 0]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.logit_positions.tolist() == [0, 1, 2] and batch.target_ids.tolist() == [11, 12, 21]
    assert batch.num_tokens == 3


def test_prefix_leaves_each_side_a_token_of_its_own() -> None:
    batch = pack_pairs([_row([5, 6, 7], [5, 6, 7, 8], [0, 1, 1], [0, 1, 1, 1])])
    assert batch.segments == (PairSegment(0, 2, 0, 1),)
    assert batch.target_ids.tolist() == [6, 7, 7, 8]


def _by_transformers(model: Any, batch: PairBatch) -> PairScores:
    """The plain layout through the model's own modules and all logits: what every faster way has to equal."""
    router = router_settings(model.config)
    routed = {"output_router_logits": True} if router is not None else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **routed)
    logits = output.logits.flatten(0, 1)[batch.logit_positions]
    logps = logits.log_softmax(dim=-1).gather(1, batch.target_ids[:, None])[:, 0][batch.token_index]
    if router is None:
        return PairScores(logps, torch.zeros(len(batch)))
    aux = router_aux_loss(
        output.router_logits, batch.sequences, kind=router.kind, top_k=router.top_k, coefficient=router.coefficient
    )
    return PairScores(logps, aux.view(-1, 2).mean(dim=1))


def _score(kind: str, rows: list[dict[str, Any]], layout: Any, fast: bool) -> tuple[torch.Tensor, ...]:
    """Losses, router losses, log-probabilities of policy and reference, and all gradients of one step."""
    policy, ref_model = tiny_model(kind, seed=1), tiny_model(kind, seed=2)
    batch: PairBatch = layout(rows)

    def score(model: Any) -> PairScores:
        if not fast:
            return _by_transformers(model, batch)
        scorer = PairScorer(model)
        assert choose_layout(scorer, "pairs" if layout is PACKED else "sdpa", torch.device("cpu")) is layout
        assert scorer.fused_head
        return scorer(batch)

    scores = score(policy.train())
    with torch.no_grad():
        ref_logps = sum_per_side(score(ref_model.eval()).per_token_logps, batch)
    policy_logps = sum_per_side(scores.per_token_logps, batch)
    tokens = batch.chosen_tokens, batch.rejected_tokens
    pairs = PairLogps(*policy_logps, *ref_logps, -policy_logps[0], *tokens, batch.margins, batch.weights)
    losses = dpo_losses(pairs, Preference({"sigmoid_norm": 1.0}, beta=0.5)).total
    (losses + scores.aux_losses).mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    logps = torch.stack([*policy_logps, *ref_logps])  # what the rewards are differences of
    return losses.detach(), scores.aux_losses.detach(), logps.detach(), gradients


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    mask=st.sampled_from(["final_turn", "all_assistant"]),
    seed=st.integers(0, 1000),
    head_rows=st.sampled_from([1, 7, 10_000]),
    layout=st.sampled_from([PACKED, PACKED, PLAIN]),
)
def test_every_fast_way_equals_plain(
    kind: str, lengths: list[tuple[int, int, int]], mask: str, seed: int, head_rows: int, layout: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [random_row(generator, prefix=p, chosen=c, rejected=r, mask=mask) for p, c, r in lengths]
    with mock.patch.object(head, "MOST_LOGITS", head_rows * VOCAB):
        fast = _score(kind, rows, layout, fast=True)
    for ours, oracle in zip(fast, _score(kind, rows, PLAIN, fast=False), strict=True):
        assert (ours - oracle).norm() <= 1e-5 * oracle.norm() + 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_probe_accepts_these_models(kind: str) -> None:
    assert choose_layout(PairScorer(tiny_model(kind)), "pairs", torch.device("cpu")) is PACKED


def test_recurrent_model_falls_back_to_the_plain_layout(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert choose_layout(PairScorer(model), "pairs", torch.device("cpu")) is PLAIN
    assert "cannot attend over packed pairs" in caplog.text


def test_pair_key_is_content() -> None:
    row = _row([1, 2], [1, 3], [0, 1], [0, 1])
    assert pair_key(row) == pair_key(row | {"weight": 2.0, "place": "elsewhere"})
    assert pair_key(row) != pair_key(row | {"chosen_completion_mask": [1, 1]})
    assert len(pair_key(row)) == 16
