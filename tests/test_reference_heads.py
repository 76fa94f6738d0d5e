from __future__ import annotations

from pathlib import Path

import pytest
from helpers_data import tiny_tokenizer
from helpers_run import Inputs, train_here, train_lines
from test_models import HEADS, raw_state, save_raw

from minimind_dpo.config import make_config
from minimind_dpo.errors import UserError
from minimind_dpo.models import load_model
from minimind_dpo.training.weights import load_configured


def test_each_model_has_its_own_heads(tmp_path: Path) -> None:
    """A reference of raw weights as wide as the policy has the policy's heads, unless it is told its own."""
    raw = save_raw(tmp_path / "reference.pth", raw_state(2, False))
    load_model(raw, num_attention_heads=HEADS).save_pretrained(tmp_path / "run" / "model")
    settings = {"model_name_or_path": str(tmp_path / "run"), "train_data": "a", "ref_model_name_or_path": str(raw)}

    def heads(**options: int) -> int:
        return load_configured(make_config(settings | options), str(raw)).config.num_attention_heads

    assert heads() == HEADS != 8
    assert heads(ref_num_attention_heads=2) == 2
    policy = make_config(settings | {"ref_num_attention_heads": 2})
    assert load_configured(policy, policy.model_name_or_path).config.num_attention_heads == HEADS


def test_a_run_and_its_raw_start_as_reference_are_alike(tmp_path: Path, inputs: Inputs) -> None:
    tokenizer = tiny_tokenizer()
    state = raw_state(2, False)
    vocabulary = state["model.embed_tokens.weight"].shape[0]
    if vocabulary < len(tokenizer):
        row = state["model.embed_tokens.weight"][:1].repeat(len(tokenizer), 1)
        state |= {"model.embed_tokens.weight": row, "lm_head.weight": row}
    raw = save_raw(tmp_path / "start.pth", state)
    load_model(raw, num_attention_heads=HEADS).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    own = Inputs(tmp_path / "model", inputs.train_data, inputs.eval_data)
    assert train_here(own.flags(tmp_path / "run", max_steps=1, ref_model_name_or_path=raw)) == 0
    assert train_lines(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_heads_of_no_reference_are_refused() -> None:
    with pytest.raises(UserError, match="ref_num_attention_heads: .* set ref_model_name_or_path too"):
        make_config({"model_name_or_path": "m", "train_data": "a", "ref_num_attention_heads": 4})
