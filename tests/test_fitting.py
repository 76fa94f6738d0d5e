from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from helpers_run import Inputs, train_here
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from minimind_dpo.errors import UserError

LIMIT = 64  # positions; some sides of the tests' data have more
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda rows: GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_positions=LIMIT, n_embd=32, n_layer=1, n_head=4)
    ),
    "opt": lambda rows: OPTForCausalLM(
        OPTConfig(**SIZES, vocab_size=rows, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=LIMIT)
    ),
    "gptj": lambda rows: GPTJForCausalLM(
        GPTJConfig(vocab_size=rows, n_positions=LIMIT, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    ),
    "llama": lambda rows: LlamaForCausalLM(
        LlamaConfig(**SIZES, vocab_size=rows, intermediate_size=48, max_position_embeddings=LIMIT)
    ),
}


def with_model(directory: Path, inputs: Inputs, model: PreTrainedModel, tokenizer: Any) -> Inputs:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Inputs(directory, inputs.train_data, inputs.eval_data)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_sides_longer_than_a_table_of_positions_are_refused(tmp_path: Path, inputs: Inputs, family: str) -> None:
    tokenizer = tiny_tokenizer()
    own = with_model(tmp_path / "model", inputs, FAMILIES[family](len(tokenizer)), tokenizer)
    with pytest.raises(UserError, match=rf"max_length: 1024 .*positions for {LIMIT} only; set max_length to {LIMIT}"):
        train_here(own.flags(tmp_path / "run", max_steps=1))
    assert train_here(own.flags(tmp_path / "run", max_steps=1, max_length=LIMIT + 1, on_bad_row="drop")) == 0


def test_rotary_positions_have_no_end(tmp_path: Path, inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    own = with_model(tmp_path / "model", inputs, FAMILIES["llama"](len(tokenizer)), tokenizer)
    with caplog.at_level(logging.INFO):
        assert train_here(own.flags(tmp_path / "run", max_steps=1)) == 0
    assert f"longer than the {LIMIT} that the model names" in caplog.text


def test_only_token_ids_that_occur_need_a_row(tmp_path: Path, inputs: Inputs) -> None:
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) == rows + 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=rows, intermediate_size=48))
    own = with_model(tmp_path / "model", inputs, model, tokenizer)
    assert train_here(own.flags(tmp_path / "run", max_steps=1)) == 0
    smaller = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=rows - 50, intermediate_size=48))
    own = with_model(tmp_path / "smaller", inputs, smaller, tokenizer)
    with pytest.raises(UserError, match=rf"token id \d+ .*{rows + 1} tokens.* embeds only {rows - 50}"):
        train_here(own.flags(tmp_path / "other", max_steps=1))
