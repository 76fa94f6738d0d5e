"""Score one batch with an offloaded reference and print how many parameters were on the device at once, at most.

[accelerate launch ...] tests/programs/held_by_reference.py MODEL_DIR OUTPUT_DIR
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minimind_dpo import load_model
from minimind_dpo.config import make_config
from minimind_dpo.data.batch import pack_pairs
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.protocol import unwrap
from minimind_dpo.objective.layout import choose_layout
from minimind_dpo.objective.scoring import PairScorer


class Watch(TorchDispatchMode):
    """Counts, at every operation, the elements of a model's parameters that are there to compute with."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.most = model, 0

    def held(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if not parameter.is_meta)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, self.held())
        return result


def main() -> None:
    config = make_config({"model_name_or_path": sys.argv[1], "train_data": ["unused"], "output_dir": sys.argv[2]})
    engine = start_engine(config)
    with engine.loading_reference(offload=True):
        model = load_model(sys.argv[1])
    whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    largest = max(
        sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in part.parameters())
        for part in [*model.model.layers, model.lm_head]
    )
    scorer = engine.freeze(PairScorer(model), True, "nearest")
    choose_layout(unwrap(scorer), "pairs", engine.device)

    row = {
        "chosen_input_ids": [1, 2, 3, 4],
        "chosen_completion_mask": [0, 0, 1, 1],
        "rejected_input_ids": [1, 2, 5, 6, 7],
        "rejected_completion_mask": [0, 0, 1, 1, 1],
    }
    with torch.no_grad(), Watch(model) as watch:
        logps = scorer(pack_pairs([row]).to(engine.device)).per_token_logps
    print(
        f"HELD whole={whole} largest={largest} most={watch.most} between={watch.held()} sum={float(logps.sum()):.5f}",
        flush=True,
    )
    engine.end()


main()
