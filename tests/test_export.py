from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from test_models import HEADS, HIDDEN, KINDS, equal_states, heads_of, raw_state, save_raw
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minimind_dpo.errors import UserError
from minimind_dpo.export import run_export
from minimind_dpo.models import hub, load_model
from minimind_dpo.models.export import export_model


@pytest.mark.parametrize(("generation", "moe"), KINDS)
def test_hf_round_trip_is_bit_exact(tmp_path: Path, generation: int, moe: bool) -> None:
    raw = save_raw(tmp_path / "start.pth", raw_state(generation, moe))
    heads = heads_of(generation).get("num_attention_heads")
    written = export_model(raw, "hf", tmp_path / "hf", num_attention_heads=heads)
    original, again = load_model(raw, **heads_of(generation)), load_model(written)
    assert type(again) is type(original) and equal_states(again, original)
    back = export_model(written, "minimind", tmp_path / "back.pth", dtype="float32")
    state, expected = torch.load(back, weights_only=True), raw_state(generation, moe)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("generation", "moe"), KINDS)
def test_minimind_file_is_half_precision_and_complete(tmp_path: Path, generation: int, moe: bool) -> None:
    expected = raw_state(generation, moe)
    raw = save_raw(tmp_path / "start.pth", expected)
    heads = heads_of(generation).get("num_attention_heads")
    written = export_model(raw, "minimind", tmp_path / "out", num_attention_heads=heads)
    assert written == tmp_path / "out" / f"dpo_{HIDDEN}{'_moe' if moe else ''}.pth"
    state = torch.load(written, weights_only=True)
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[key].half()), key
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * 2
    again = export_model(written, "minimind", tmp_path / "again.pth", num_attention_heads=heads)
    repeated = torch.load(again, weights_only=True)
    assert all(torch.equal(repeated[key], state[key]) for key in state)
    assert [path.name for path in written.parent.iterdir()] == [written.name]  # nothing temporary is left


def test_run_directory_with_tokenizer_through_the_command(tmp_path: Path, capsys) -> None:
    model = load_model(save_raw(tmp_path / "start.pth", raw_state(2, True)), num_attention_heads=HEADS)
    model.save_pretrained(tmp_path / "run" / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "run" / "model" / name).write_text(f'{{"a": "{name}"}}')
    output = tmp_path / "deep" / "exported"
    arguments = ["--model", str(tmp_path / "run"), "--format", "hf", "--output", str(output), "--dtype", "float16"]
    assert run_export(arguments) == 0
    assert str(output) in capsys.readouterr().out
    assert (output / "tokenizer.json").read_text() == '{"a": "tokenizer.json"}'
    assert (output / "chat_template.jinja").is_file()
    assert json.loads((output / "config.json").read_text())["dtype"] == "float16"
    half = load_model(output, dtype="auto")
    assert half.dtype == torch.float16 and torch.equal(half.model.norm.weight, model.model.norm.weight.half())


def test_hf_keeps_the_dtype_of_its_source(tmp_path: Path) -> None:
    half = {key: tensor.half() for key, tensor in raw_state(3, True).items()}
    written = export_model(save_raw(tmp_path / "half.pth", half), "hf", tmp_path / "hf")
    assert load_model(written, dtype="auto").dtype == torch.float16


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    raw = save_raw(tmp_path / "start.pth", raw_state(3, False))
    (tmp_path / "out").mkdir()
    export_model(raw, "hf", tmp_path / "out")  # an empty directory is fine
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="already there"):
        export_model(raw, "hf", tmp_path / "out")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()) == before
    written = export_model(raw, "minimind", tmp_path / "out")  # a new file beside others is fine
    for output in (tmp_path / "out", written):
        with pytest.raises(UserError, match="already there"):
            export_model(raw, "minimind", output)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    raw = save_raw(tmp_path / "start.pth", raw_state(3, False))
    monkeypatch.setattr(torch, "save", lambda state, path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_model(raw, "minimind", tmp_path / "out" / "weights.pth")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("format", ["hf", "minimind"])
def test_weights_beyond_half_precision(tmp_path: Path, format: str) -> None:
    state = raw_state(3, False)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 70000.0
    raw = save_raw(tmp_path / "large.pth", state)
    with pytest.raises(UserError, match=r"beyond the range.*layers\.0\.mlp\.up_proj"):
        export_model(raw, format, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export_model(raw, format, tmp_path / "out", dtype="float32")


SIZES = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
FITS = {**SIZES, "rope_parameters": ROPE, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (MistralForCausalLM, MistralConfig(**FITS), "MistralForCausalLM"),
        (LlamaForCausalLM, LlamaConfig(**FITS, attention_bias=True), "q_proj.bias"),
        (LlamaForCausalLM, LlamaConfig(**FITS | {"rms_norm_eps": 1e-6}), "rms_norm_eps"),
        (LlamaForCausalLM, LlamaConfig(**FITS | {"tie_word_embeddings": False}), "tie_word_embeddings"),
        (LlamaForCausalLM, LlamaConfig(**FITS, hidden_act="gelu"), "hidden_act"),
        (LlamaForCausalLM, LlamaConfig(**SIZES, rms_norm_eps=1e-5), "rope_parameters"),
        (
            Qwen3ForCausalLM,
            Qwen3Config(
                **FITS | {"rms_norm_eps": 1e-6},
                head_dim=8,
                use_sliding_window=True,
                sliding_window=16,
                max_window_layers=0,
            ),
            "sliding_window",
        ),
    ],
)
def test_models_that_minimind_cannot_run(tmp_path: Path, model_class, config, message: str) -> None:
    model_class(config).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        export_model(tmp_path / "model", "minimind", tmp_path / "out")


def test_a_plain_llama_of_minimind_shape_can(tmp_path: Path) -> None:
    """MiniMind2's weights on the hub are saved as Llama, without our mark."""
    LlamaForCausalLM(LlamaConfig(**FITS)).save_pretrained(tmp_path / "model")
    assert export_model(tmp_path / "model", "minimind", tmp_path / "out").name == f"dpo_{HIDDEN}.pth"


@pytest.mark.parametrize(("format", "dtype", "message"), [("ggml", None, "ggml"), ("hf", "int8", "int8")])
def test_unknown_format_and_dtype(tmp_path: Path, format: str, dtype: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_model(tmp_path, format, tmp_path / "out", dtype=dtype)


def test_wrong_usage_exits_with_two(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run_export(["--model", str(tmp_path), "--format", "onnx", "--output", "x"])
    assert caught.value.code == 2


STAND_IN = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype")
told = parser.parse_args()
if json.loads((told.model / "config.json").read_text())["model_type"] == "qwen3":
    raise SystemExit("Model Qwen3ForCausalLM is not supported")
files = sorted(path.name for path in told.model.iterdir())
told.outfile.write_text("GGUF" + json.dumps([told.model.name, told.outtype, files]))
"""


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A checkout of llama.cpp with something in the converter's place that takes the same arguments."""
    (tmp_path / "llama.cpp").mkdir()
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.write_text("#!/usr/bin/env python3" + STAND_IN)
    converter.chmod(0o755)
    return converter.parent


def _with_tokenizer(tmp_path: Path, generation: int = 2) -> Path:
    raw = save_raw(tmp_path / "start.pth", raw_state(generation, False))
    model = load_model(raw, **heads_of(generation))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_gguf_is_made_by_the_converter(tmp_path: Path, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed a directory with weights and tokenizer, and only the file is left."""
    model, output = _with_tokenizer(tmp_path), tmp_path / "out" / "mine.gguf"
    flags = ["--model", str(model), "--format", "gguf", "--output", str(output), "--llama_cpp", str(llama_cpp)]
    assert run_export([*flags, "--dtype", "float16"]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["mine.gguf"]
    name, outtype, files = json.loads(output.read_text().removeprefix("GGUF"))
    assert (name, outtype) == ("mine", "f16")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    with pytest.raises(UserError, match="already there"):
        run_export(flags)
    monkeypatch.setenv("PATH", str(llama_cpp), prepend=":")
    assert export_model(model, "gguf", tmp_path / "found") == tmp_path / "found" / "model.gguf"
    assert json.loads((tmp_path / "found" / "model.gguf").read_text().removeprefix("GGUF"))[1] == "auto"


def test_gguf_that_cannot_be_made(tmp_path: Path, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="convert_hf_to_gguf.py of llama.cpp is not on PATH.*--llama_cpp DIR"):
        export_model("model", "gguf", tmp_path / "out")
    with pytest.raises(UserError, match="--llama_cpp: .*nowhere/convert_hf_to_gguf.py is not there"):
        export_model("model", "gguf", tmp_path / "out", llama_cpp=str(tmp_path / "nowhere"))
    alone = save_raw(tmp_path / "alone.pth", raw_state(3, False))
    with pytest.raises(UserError, match="alone.pth: no tokenizer beside it"):
        export_model(alone, "gguf", tmp_path / "out", llama_cpp=str(llama_cpp))
    with pytest.raises(UserError, match="(?s)failed with code 1:.*Qwen3ForCausalLM is not supported"):
        export_model(_with_tokenizer(tmp_path, generation=3), "gguf", tmp_path / "out", llama_cpp=str(llama_cpp))
    assert list((tmp_path / "out").iterdir()) == []


class Hub:
    """What of huggingface_hub's API an export calls; it takes nobody's token."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuses = False

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.refuses:
            raise ConnectionError("401 Client Error")
        self.calls.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def _upload(self, **options: Any) -> Any:
        self.calls.append((options.pop("repo_id"), options))
        return SimpleNamespace(commit_url="https://huggingface.co/me/mine/commit/1")

    upload_folder = upload_file = _upload


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    return made


def test_a_model_is_sent_to_the_hub(tmp_path: Path, a_hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    model = _with_tokenizer(tmp_path)
    flags = ["--model", str(model), "--push_to_hub", "mine"]
    assert run_export([*flags, "--format", "hf", "--output", str(tmp_path / "hf")]) == 0
    assert a_hub.calls[0] == ("mine", {"private": True, "exist_ok": True})
    assert a_hub.calls[1][0] == "me/mine" and a_hub.calls[1][1]["folder_path"] == tmp_path / "hf"
    assert "sent to https://huggingface.co/me/mine/commit/1" in capsys.readouterr().out
    assert run_export([*flags, "--format", "minimind", "--output", str(tmp_path / "raw")]) == 0
    assert a_hub.calls[3][1]["path_in_repo"] == f"dpo_{HIDDEN}.pth"
    assert not any("token" in options for _, options in a_hub.calls)


def test_a_hub_that_refuses(tmp_path: Path, a_hub: Hub) -> None:
    """The model stays; a name that no repository can have is told before anything is written."""
    model = _with_tokenizer(tmp_path)
    flags = ["--model", str(model), "--format", "hf", "--output", str(tmp_path / "hf"), "--push_to_hub"]
    with pytest.raises(UserError, match="--push_to_hub"):
        run_export([*flags, "a/b/c"])
    assert not (tmp_path / "hf").exists()
    a_hub.refuses = True
    with pytest.raises(UserError, match="(?s)me/mine: ConnectionError: 401 Client Error.*hf auth login"):
        run_export([*flags, "me/mine"])
    assert equal_states(load_model(tmp_path / "hf"), load_model(model))
