from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_model import VOCAB, random_row, tiny_model
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from minimind_dpo.objective.layout import PLAIN, choose_layout
from minimind_dpo.objective.scoring import PairScorer

ORIGINAL = 32  # positions of the original context; sides of the long pair have more


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return tiny_model("llama", max_position_embeddings=ORIGINAL, rope_parameters=rope)


def longrope() -> PreTrainedModel:
    torch.manual_seed(0)
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0]}
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return Phi3ForCausalLM(config)


@pytest.mark.parametrize("make", [dynamic, longrope])
@torch.no_grad()
def test_scores_do_not_depend_on_batch_mates(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Alone, beside a longer pair, and in the model's own forward pass of that side alone."""
    generator = torch.Generator().manual_seed(0)
    short = random_row(generator, prefix=6, chosen=5, rejected=7, mask="final_turn")
    long = random_row(generator, prefix=20, chosen=60, rejected=25, mask="final_turn")
    scorer = PairScorer(make().eval())
    layout = choose_layout(scorer, "pairs", torch.device("cpu"))
    assert layout is PLAIN and "depend on the length of a row" in caplog.text
    alone = [scorer(layout([row])).per_token_logps for row in (short, long)]
    for rows, expected in (((short, long), alone), ((long, short), alone[::-1])):
        together = scorer(layout(list(rows))).per_token_logps
        torch.testing.assert_close(together, torch.cat(expected), rtol=1e-5, atol=1e-5)
    ids = torch.tensor(long["chosen_input_ids"])
    logps = make().eval()(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
    own = logps.gather(-1, ids[1:, None])[19:, 0]
    torch.testing.assert_close(alone[1][: len(own)], own, rtol=1e-5, atol=1e-5)
