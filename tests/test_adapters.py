from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from helpers_model import VOCAB, tiny_model
from helpers_run import Inputs, train_here, train_lines
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from minimind_dpo.errors import TrainingError, UserError
from minimind_dpo.models import load_model
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.export import export_model
from minimind_dpo.models.merging import merge_adapters
from minimind_dpo.models.saving import save_adapter, save_model

IDS = torch.arange(24).view(2, 12)
DORA, RSLORA = {"use_dora": True}, {"use_rslora": True}


def named(*modules: str) -> dict[str, Any]:
    return {"target_modules": list(modules)}


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", DORA),
    ("llama", RSLORA),
    ("llama", named("lm_head")),
    ("llama", named("embed_tokens") | DORA),
    ("llama", named("embed_tokens", "lm_head", "q_proj")),
    ("gpt2", {}),  # Conv1D: weights lie the other way round
    ("gpt2", DORA),
    ("gpt2", named("wte", "c_attn")),
    ("gpt2", named("lm_head", "wpe")),
    ("qwen3_moe", {}),  # stacked experts, wrapped twice, and a router without a class of its own
    ("qwen3_moe", RSLORA),
    ("qwen3_moe", named("gate_proj", "up_proj", "lm_head")),
    ("minimind_moe", {}),
    ("minimind_moe", named("embed_tokens")),
]


def model_of(kind: str, vocabulary: int = VOCAB) -> PreTrainedModel:
    if kind != "gpt2":
        return tiny_model(kind, vocab_size=vocabulary)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def adapted(kind: str, base: Path, **options: Any) -> PreTrainedModel:
    """A model, saved at `base`, with LoRA matrices that all do something."""
    model = model_of(kind).eval()
    model.save_pretrained(base)
    settings: dict[str, Any] = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": [], "base": str(base), "seed": 0}
    add_adapters(model, **settings | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_of_layer_merges_on_disk_in_place_and_opens_in_peft(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    from peft import PeftModel

    model = adapted(kind, tmp_path / "base", **options)
    expected, base = logits_of(model), load_model(tmp_path / "base")
    assert float((expected - logits_of(base)).abs().max()) > 0.1
    for name in ("merged", "adapter"):
        (tmp_path / name).mkdir()
    save_model(model, tmp_path / "merged")
    save_adapter(model, tmp_path / "adapter")
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged")), expected, **near)
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), expected, **near
    )
    torch.testing.assert_close(logits_of(load_model(tmp_path / "adapter")), expected, **near)
    merge_adapters(model)
    torch.testing.assert_close(logits_of(model), expected, **near)
    unties = bool({"lm_head", "embed_tokens", "wte"} & set(options.get("target_modules", [])))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is model.config.tie_word_embeddings is not unties
    assert all(parameter.requires_grad and "lora" not in name for name, parameter in model.named_parameters())


@pytest.mark.parametrize("options", [{}, DORA])
def test_lora_starts_as_its_half_precision_base(options: dict[str, Any]) -> None:
    """DoRA's lengths are measured in fp32: rounded to the base's type they would be another model's."""
    model = tiny_model("llama").to(torch.bfloat16).eval()  # type: ignore[arg-type]
    before = logits_of(model)
    add_adapters(model, r=2, alpha=4, dropout=0.0, target_modules=[], base="b", seed=0, **options)
    assert torch.equal(logits_of(model.eval()), before)


def inputs_with(tmp_path: Path, inputs: Inputs, kind: str) -> Inputs:
    """The inputs of the tests with another model."""
    tokenizer = tiny_tokenizer()
    model_of(kind, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return Inputs(tmp_path / "model", inputs.train_data, inputs.eval_data)


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"lora_target_modules": "wte", "use_rslora": "true"}),
    ("qwen3_moe", {}),
    ("minimind_moe", {"lora_target_modules": "q_proj", "use_dora": "true"}),
    ("llama", {"lora_target_modules": "lm_head"}),
]


@pytest.mark.parametrize(("kind", "options"), RUNS)
def test_runs_checkpoints_and_exports_are_the_policy(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    """From another working directory too: the base is noted by its absolute path."""
    own = inputs_with(tmp_path, inputs, kind)
    monkeypatch.chdir(tmp_path)
    flags = own.flags(
        tmp_path / "run", lora_r=2, save_steps=1, max_steps=2, **options | {"model_name_or_path": "model"}
    )
    assert train_here(flags) == 0
    assert train_lines(tmp_path / "run")[0]["dpo_loss"] == pytest.approx(0.6931472, abs=1e-5)
    monkeypatch.chdir("/")
    final = logits_of(load_model(tmp_path / "run"))
    assert float((final - logits_of(load_model(own.model))).abs().max()) > 1e-3
    written = export_model(tmp_path / "run" / "checkpoints" / "step-000002", "hf", tmp_path / "exported")
    torch.testing.assert_close(logits_of(load_model(written)), final, rtol=1e-5, atol=1e-5)


def test_a_merge_that_fails_ends_the_run(tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_dpo.models import merging

    monkeypatch.setattr(merging.Weight, "value", lambda self: self.parameter.detach())  # forgets the matrices
    with pytest.raises(TrainingError, match="does not compute what it was written of"):
        train_here(inputs.flags(tmp_path / "run", lora_r=2, max_steps=1))
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_export_that_is_damaged_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    save = type(model).save_pretrained

    def damaged(self: Any, directory: Path) -> None:
        save(self, directory)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.norm.weight"][0] += 1.0
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(TrainingError, match="does not compute"):
        export_model(tmp_path / "model", "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_moe", DORA, "stacked experts have neither lora_dropout nor use_dora"),
        ("qwen3_moe", {"dropout": 0.1}, "stacked experts have neither lora_dropout nor use_dora"),
        ("qwen3_moe", named("gate_proj"), "without also targeting up_proj"),
        ("llama", named("norm"), "lora_target_modules: .*not supported"),
    ],
)
def test_what_cannot_be_merged_is_refused_at_start(kind: str, options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": [], "base": "b", "seed": 0}
    with pytest.raises(UserError, match=message):
        add_adapters(model_of(kind), **settings | options)


def test_an_embedding_with_a_forward_pass_of_its_own_is_refused() -> None:
    """OPT looks up other positions than it is handed."""
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes))
    settings: dict[str, Any] = {"r": 2, "alpha": 4, "dropout": 0.0, "base": "b", "seed": 0}
    with pytest.raises(UserError, match="embed_positions .OPTLearnedPositionalEmbedding. could not be merged"):
        add_adapters(model, target_modules=["embed_positions"], **settings)


@pytest.mark.parametrize("lora", [{}, {"lora_r": 3}])
def test_an_adapter_directory_is_a_policy_and_its_own_reference(
    tmp_path: Path, inputs: Inputs, lora: dict[str, int]
) -> None:
    """Without `lora_r` its matrices are trained on; with it they are merged, and new ones trained beside them."""
    assert train_here(inputs.flags(tmp_path / "first", lora_r=2, max_steps=2)) == 0
    start = logits_of(load_model(tmp_path / "first"))
    adapter = tmp_path / "first" / "adapter"
    torch.testing.assert_close(logits_of(load_model(adapter)), start, rtol=1e-5, atol=1e-5)
    flags = inputs.flags(tmp_path / "second", model_name_or_path=adapter, max_steps=2, save_steps=1, **lora)
    assert train_here(flags) == 0
    assert train_lines(tmp_path / "second")[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    final = logits_of(load_model(tmp_path / "second"))
    assert float((final - start).abs().max()) > 1e-3
    for source in (tmp_path / "second" / "adapter", tmp_path / "second" / "checkpoints" / "step-000002"):
        torch.testing.assert_close(logits_of(load_model(source)), final, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == lora.get("lora_r", 2)
    assert config["base_model_name_or_path"] == str(adapter if lora else inputs.model)
    written = export_model(tmp_path / "second" / "adapter", "hf", tmp_path / "exported")
    assert (written / "tokenizer.json").is_file()


def test_a_damaged_adapter_is_refused(tmp_path: Path, inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    """As model/: weights that are not what was written are refused, of settings it is told."""
    assert train_here(inputs.flags(tmp_path / "run", lora_r=2, max_steps=1)) == 0
    adapter = tmp_path / "run" / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_model.json"):
        whole = (adapter / name).read_bytes()
        (adapter / name).write_bytes(whole[:-9] + b"?" + whole[-8:])
        with pytest.raises(UserError, match="adapter_model.safetensors: damaged" if "safe" in name else "damaged, "):
            load_model(adapter)
        (adapter / name).write_bytes(whole + b" ")
        caplog.clear()
        if "safe" not in name:
            load_model(adapter)
            assert f"{name}: not what was written" in caplog.text
        (adapter / name).write_bytes(whole)
    assert load_model(adapter) is not None and caplog.text.count("not what was written") == 1


def test_another_base_than_the_matrices_were_trained_beside(tmp_path: Path, inputs: Inputs) -> None:
    own = inputs_with(tmp_path, inputs, "llama")
    assert train_here(own.flags(tmp_path / "run", lora_r=2, max_steps=1, save_steps=1)) == 0
    free = {"lora_r": 2, "loss_type": "simpo", "save_steps": 1}  # without a reference, whose digest would tell
    assert train_here(own.flags(tmp_path / "free", max_steps=1, **free)) == 0
    changed = load_model(own.model)
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    changed.save_pretrained(own.model)
    for place in ("adapter", "checkpoints/step-000001"):
        with pytest.raises(UserError, match="trained beside other weights"):
            load_model(tmp_path / "run" / place)
    with pytest.raises(UserError, match="model_name_or_path: .* trained beside other weights than"):
        train_here(own.flags(tmp_path / "free", max_steps=2, **free))


def test_checkpoints_beside_raw_weights_open_with_their_heads(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), rms_norm_eps=1e-5, rope_theta=1e6)
    (tmp_path / "out").mkdir()
    torch.save(model.state_dict(), tmp_path / "out" / "base.pth")
    tokenizer.save_pretrained(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    options = {"model_name_or_path": "base.pth", "num_attention_heads": 4, "lora_r": 2, "max_steps": 1, "save_steps": 1}
    assert train_here(inputs.flags(tmp_path / "run", **options)) == 0
    monkeypatch.chdir("/")
    final = logits_of(load_model(tmp_path / "run"))
    for place in ("adapter", "checkpoints/step-000001"):
        torch.testing.assert_close(logits_of(load_model(tmp_path / "run" / place)), final, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    config = {"peft_type": "IA3", "base_model_name_or_path": str(tmp_path / "base"), "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="an adapter with .*IA3; only LoRA"):
        load_model(tmp_path)
