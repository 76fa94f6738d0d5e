from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from test_models import HEADS, raw_state, save_raw
from transformers import AutoTokenizer

from minimind_dpo.models import load_model
from minimind_dpo.models.export import _cast, export_model
from minimind_dpo.models.portable import make_portable


def tokenizer_with_named_templates() -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }} with tools"}
    return tokenizer


@pytest.mark.parametrize("place", ["out", "model"])
def test_the_tokenizer_of_raw_weights_goes_along_with_all_templates(tmp_path: Path, place: str) -> None:
    """Beside the weights, or in `../model`."""
    tokenizer = tokenizer_with_named_templates()
    (tmp_path / "out").mkdir()
    raw = save_raw(tmp_path / "out" / "start.pth", raw_state(3, False))
    tokenizer.save_pretrained(tmp_path / place)
    written = export_model(raw, "hf", tmp_path / "exported")
    again = AutoTokenizer.from_pretrained(written)
    assert again.chat_template == tokenizer.chat_template
    assert again("red river").input_ids == tokenizer("red river").input_ids


@pytest.mark.parametrize(("generation", "moe"), [(2, False), (3, False), (3, True)])
def test_exports_say_everything_under_the_names_that_both_transformers_know(
    tmp_path: Path, generation: int, moe: bool
) -> None:
    raw = save_raw(tmp_path / "start.pth", raw_state(generation, moe))
    heads = HEADS if generation == 2 else None
    tiny_tokenizer().save_pretrained(tmp_path)
    written = export_model(raw, "hf", tmp_path / "exported", dtype="float16", num_attention_heads=heads)
    config = json.loads((written / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "float16" and config.get("rope_scaling") is None
    assert json.loads((written / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert len(AutoTokenizer.from_pretrained(written)) == len(tiny_tokenizer())
    ids = torch.arange(12)[None]
    expected = _cast(load_model(raw, dtype="float16", num_attention_heads=heads), torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(load_model(written)(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_scaled_rotary_positions_keep_their_settings(tmp_path: Path) -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    layered = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    for parameters in (scaled, layered):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": parameters}}))
        make_portable(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())["text_config"]
        assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
        assert config["rope_parameters"] == parameters
    assert config["rope_local_base_freq"] == 1e4


_ASK = """
import json, sys, torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.arange(12)[None]).logits
ids = tokenizer("red river, quiet stone").input_ids
print(json.dumps([transformers.__version__, logits.tolist(), ids]))
"""


@pytest.mark.other_transformers
@pytest.mark.parametrize(("generation", "moe"), [(2, False), (3, False), (3, True)])
def test_transformers_4_reads_exports_alike(
    tmp_path: Path, request: pytest.FixtureRequest, generation: int, moe: bool
) -> None:
    if "other_transformers" not in request.config.option.markexpr:
        pytest.skip("opt-in: downloads another transformers; run with -m other_transformers")
    packages = Path(tempfile.gettempdir()) / "minimind_dpo-transformers-4.57.3"
    if not packages.is_dir():
        names = ["transformers==4.57.3", "huggingface_hub==0.36.2", "tokenizers==0.22.2"]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *names]
        subprocess.run(install, check=True)
    raw = save_raw(tmp_path / "start.pth", raw_state(generation, moe))
    tiny_tokenizer().save_pretrained(tmp_path)
    heads = HEADS if generation == 2 else None
    written = export_model(raw, "hf", tmp_path / "exported", num_attention_heads=heads)
    environment = os.environ | {"PYTHONPATH": str(packages)}
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, str(written)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert asked.returncode == 0, asked.stderr
    version, logits, ids = json.loads(asked.stdout.splitlines()[-1])
    assert version == "4.57.3" and ids == tiny_tokenizer()("red river, quiet stone").input_ids
    expected = load_model(raw, num_attention_heads=heads)(input_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)
