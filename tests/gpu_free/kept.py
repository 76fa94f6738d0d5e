"""What a forward pass on a CUDA that computes nothing keeps for its way back, in bytes."""

from __future__ import annotations

from typing import Any

import torch
from gpu_free.counting import Storages, Watch
from gpu_free.fakes import DEVICE, FakeEngine, Scored, fake_scorer
from helpers_model import random_row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from minimind_dpo.data.batch import pack_pairs

PAIRS, PREFIX, REST = 3, 24, 40  # tokens that the sides of a pair share, and that each has of its own
SHAPE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)

KINDS = ("llama", "qwen3", "mistral_window", "minimind_moe", "qwen3_moe")
WAYS: dict[str, dict[str, Any]] = {
    "bf16": dict(),
    "fp32": dict(precision="no"),
    "bf16 weights": dict(precision="no", dtype=torch.bfloat16),
    "bf16 lora": dict(lora=True),
    "bf16 lora, bf16 base": dict(lora=True, dtype=torch.bfloat16),
    "bf16 checkpointing": dict(checkpointing=True),
}
KEPT = {f"{kind} keeps in {way}": dict(kind=kind) | told for kind in KINDS for way, told in WAYS.items()}


def keep(
    mode: FakeTensorMode,
    kind: str,
    precision: str = "bf16",
    dtype: torch.dtype = torch.float32,
    lora: bool = False,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes that exist after a forward pass because of it, and under checkpointing those of a layer computed again."""
    scorer = fake_scorer(mode, kind, dtype, [] if lora else None, checkpointing, **SHAPE)
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(generator, prefix=PREFIX, chosen=REST, rejected=REST, mask="final_turn") for _ in range(PAIRS)]
    with mode:
        engine = FakeEngine(scorer, precision, steps=False)
        batch = pack_pairs(rows)._moved(mode.from_tensor).pin_memory().to(DEVICE)
        with Storages() as storages, Watch(), set_checkpoint_early_stop(False):
            scores = Scored(scorer, engine.autocast)(batch)
            kept, again = storages.alive(), _Again(scorer.model.model.layers[0], storages)
            if checkpointing:
                (scores.per_token_logps.sum() + scores.aux_losses.sum()).backward()
    return {"kept": kept + again.bytes}


class _Again:
    """Bytes that a layer's next forward pass leaves behind, from its first module to its last."""

    def __init__(self, layer: Any, storages: Storages):
        self.bytes = 0
        layer.input_layernorm.register_forward_pre_hook(lambda *_: self._add(-storages.alive()))
        layer.mlp.register_forward_hook(lambda *_: self._add(storages.alive()))

    def _add(self, number: int) -> None:
        self.bytes += number
