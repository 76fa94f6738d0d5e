from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from helpers_run import Inputs, train_here, train_lines
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from minimind_dpo.models.dropout import set_dropout

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda size: GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=512, n_embd=32, n_layer=2, n_head=4)),
    "gpt_neox": lambda size: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, vocab_size=size, attention_dropout=0.3, hidden_dropout=0.3)
    ),
    "opt": lambda size: OPTForCausalLM(
        OPTConfig(
            vocab_size=size,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            dropout=0.3,
            attention_dropout=0.3,
            layerdrop=0.3,
        )
    ),
    "bloom": lambda size: BloomForCausalLM(
        BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.3, attention_dropout=0.3)
    ),
    "falcon": lambda size: FalconForCausalLM(
        FalconConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout=0.3,
            attention_dropout=0.3,
        )
    ),
    "persimmon": lambda size: PersimmonForCausalLM(
        PersimmonConfig(**SIZES, vocab_size=size, hidden_dropout=0.3, attention_dropout=0.3)
    ),
    "phi": lambda size: PhiForCausalLM(
        PhiConfig(**SIZES, vocab_size=size, resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3)
    ),
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=size, attention_dropout=0.3)),
    "mixtral": lambda size: MixtralForCausalLM(
        MixtralConfig(**SIZES, vocab_size=size, num_key_value_heads=4, num_local_experts=4, router_jitter_noise=0.3)
    ),
}


def model_of(family: str, vocabulary: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family](vocabulary)


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_drawn_at_random_in_training(family: str) -> None:
    model = model_of(family).train()
    before = model.config.to_json_string()
    assert not torch.equal(logits_of(model, 1), logits_of(model, 2))
    assert set_dropout(model, 0.0)
    assert torch.equal(logits_of(model, 1), logits_of(model, 2))
    assert torch.equal(logits_of(model, 1), logits_of(model.eval(), 1))
    assert model.config.to_json_string() == before
    if family != "mixtral":  # which can only jitter
        set_dropout(model.train(), 0.5)
        assert not torch.equal(logits_of(model, 1), logits_of(model, 2))


def test_a_model_without_any_stays_as_it_is() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64))
    assert set_dropout(model, 0.0) == {} and model.model.layers[0].self_attn.config is model.config


def test_gpt2_begins_at_ln_2(tmp_path: Path, inputs: Inputs) -> None:
    tokenizer = tiny_tokenizer()
    model_of("gpt2", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    own = Inputs(tmp_path / "model", inputs.train_data, inputs.eval_data)
    assert train_here(own.flags(tmp_path / "off", max_steps=1)) == 0
    assert train_lines(tmp_path / "off")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert json.loads((tmp_path / "off" / "model" / "config.json").read_text())["attn_pdrop"] == 0.1
    assert train_here(own.flags(tmp_path / "on", max_steps=1, dropout=0.3)) == 0
    assert abs(train_lines(tmp_path / "on")[0]["loss"] - 0.6931472) > 1e-3
