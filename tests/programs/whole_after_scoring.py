"""Score a batch under an engine and hold what the policy then computes and generates against the loaded model's.

accelerate launch ... tests/programs/whole_after_scoring.py MODEL_DIR OUTPUT_DIR

Prints WHOLE on each rank where they are equal to the bit, with and without activation checkpointing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from minimind_dpo import load_model
from minimind_dpo.config import make_config
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.optimizers import make_optimizer
from minimind_dpo.engine.protocol import unwrap
from minimind_dpo.engine.ranks import decide
from minimind_dpo.objective.layout import PACKED, choose_layout
from minimind_dpo.objective.scoring import PairScorer

IDS = torch.arange(18).view(2, 9) * 5 % 97
ROW = {
    "chosen_input_ids": [1, 2, 3, 4],
    "chosen_completion_mask": [0, 0, 1, 1],
    "rejected_input_ids": [1, 2, 5, 6, 7],
    "rejected_completion_mask": [0, 0, 1, 1, 1],
}


@torch.no_grad()
def outputs(model: Any, ranks: int) -> list[Tensor]:
    """Logits of a direct call, and replies; ranks that hold a share each have to go together."""
    model.eval()
    replies = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, synced_gpus=ranks > 1)
    logits = model(IDS).logits
    model.train()
    return [replies, logits]


def main() -> None:
    config = make_config({"model_name_or_path": sys.argv[1], "train_data": ["unused"], "output_dir": sys.argv[2]})
    model = load_model(sys.argv[1])  # before the engine is there, so whole
    expected = outputs(model, 1)
    engine = start_engine(config)
    scorer = PairScorer(model.train())
    scorer, _ = engine.prepare(scorer, make_optimizer(scorer.parameters(), 1e-4, 0.0), "nearest")
    assert choose_layout(unwrap(scorer), "pairs", engine.device, engine.autocast, decide) is PACKED
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        scores = scorer(PACKED([ROW]).to(engine.device))
        engine.backward(scores.per_token_logps.sum() + scores.aux_losses.sum(), last=True)
        for ours, theirs in zip(outputs(model, engine.world_size), expected, strict=True):
            assert torch.equal(ours, theirs), (ours, theirs)
    print("WHOLE", flush=True)
    engine.end()


main()
