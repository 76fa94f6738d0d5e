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
from minimind_dpo.engine.launcher import backward, make_accelerator, make_optimizer, prepare, unwrap
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
    accelerator = make_accelerator(config)
    scorer = PairScorer(model.train())
    scorer, _ = prepare(accelerator, scorer, make_optimizer(scorer, 1e-4, 0.0))
    assert choose_layout(unwrap(scorer), "pairs", accelerator.device, accelerator.autocast, decide) is PACKED
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        scores = scorer(PACKED([ROW]).to(accelerator.device))
        backward(accelerator, scores.per_token_logps.sum() + scores.aux_losses.sum(), True)
        for ours, theirs in zip(outputs(model, accelerator.num_processes), expected, strict=True):
            assert torch.equal(ours, theirs), (ours, theirs)
    print("WHOLE", flush=True)
    accelerator.end_training()


main()
