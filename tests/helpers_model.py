"""Tiny models and made-up tokenised pairs for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind_dpo.models.minimind import MiniMindMoeConfig, MiniMindMoeForCausalLM

VOCAB = 97


def tiny_model(kind: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random two-layer model of a few thousand parameters, fp32; weights large enough to route unevenly."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = (
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
        | options
    )
    moe: dict[str, Any] = dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, router_aux_loss_coef=0.05
    )
    classes: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "mistral_window": lambda: MistralForCausalLM(MistralConfig(**shape, sliding_window=7)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, head_dim=8, **moe)),
        "minimind_moe": lambda: MiniMindMoeForCausalLM(MiniMindMoeConfig(**shape)),
    }
    return classes[kind]()


def random_row(generator: torch.Generator, *, prefix: int, chosen: int, rejected: int, mask: str) -> dict[str, Any]:
    """A tokenised pair with the given lengths of shared prefix and rests.

    `mask`: final_turn counts the rests; all_assistant also counts a random share of the prefix, on both sides.
    """

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    shared = tokens(prefix)
    counted = [0] * prefix
    if mask == "all_assistant":
        counted = torch.randint(0, 2, (prefix,), generator=generator).tolist()
    row: dict[str, Any] = {"weight": 1.0}
    for name, first, length in (("chosen", 1, chosen), ("rejected", 2, rejected)):
        row[f"{name}_input_ids"] = shared + [first] + tokens(length - 1)
        row[f"{name}_completion_mask"] = counted + [1] * length
    return row
