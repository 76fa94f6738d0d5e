"""Weights in the type they need: a frozen base or reference in half precision, adapters and masters in fp32."""

from __future__ import annotations

import hashlib
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_forks import Forks, train_on
from helpers_run import Inputs, built, held_bytes, make_inputs, same_bits, train_here, train_lines
from safetensors.torch import load_file

from minimind_dpo.cli import main as cli
from minimind_dpo.config import load_config, make_config, save_config
from minimind_dpo.data.cache import cache_root
from minimind_dpo.demo.run import demo_config
from minimind_dpo.errors import UserError
from minimind_dpo.models.loading import load_model
from minimind_dpo.models.quantization import dequantize, quantize
from minimind_dpo.precompute import run as precompute

BNB = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra 'quant' (bitsandbytes)")
REQUIRED = {"model_name_or_path": "m", "train_data": "d"}
BF16 = "single_cpu --mixed_precision bf16"
LORA = {"lora_r": 8, "learning_rate": 1e-3, "max_steps": 20, "eval_steps": "none"}


def demo_flags(directory: Path, **options: Any) -> list[str]:
    """The demo's run with other settings."""
    directory.mkdir(parents=True, exist_ok=True)
    save_config(demo_config(directory / "run"), directory / "demo.yaml")
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return ["--config", str(directory / "demo.yaml"), *words]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dtype": "bfloat16"}, "dtype: bfloat16 is for the frozen weights of a LoRA base, .*--mixed_precision"),
        ({"dtype": "int4", "lora_r": 4}, "dtype: 'int4' is none of auto, float32, bfloat16, float16"),
        ({"ref_dtype": "float16", "lora_r": 4}, "ref_dtype: float16 is for a reference model of its own"),
        ({"ref_dtype": "float16", "lora_r": 4, "reference": "adapter"}, "ref_dtype: float16 is for a reference"),
    ],
)
def test_types_without_a_meaning_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        make_config(REQUIRED | values)
    assert str(refused.value).count("\n") == 1
    make_config(REQUIRED | {"dtype": "float32"})
    make_config(REQUIRED | {"lora_r": 4, "dtype": "float16", "reference": "cache", "ref_dtype": "bfloat16"})


def test_a_base_in_half_precision_takes_half_the_memory_and_adapters_stay_fp32(tmp_path: Path) -> None:
    full, half = (
        built(make_config(vars(demo_config(tmp_path)) | {"lora_r": 8, "dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    )
    assert held_bytes(half.policy) == 0.5 * held_bytes(full.policy)
    trained = {name: p for name, p in half.policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("lora_" in name for name in trained)
    for group in half.optimizer.param_groups:
        assert all(p.dtype == torch.float32 for p in group["params"])


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Held-out loss of the demo with LoRA in fp32, before and after."""
    directory = tmp_path_factory.mktemp("fp32")
    assert train_here(demo_flags(directory, **LORA)) == 0
    return held_out(directory / "run")


def held_out(run: Path) -> dict[str, float]:
    summary = json.loads((run / "summary.json").read_text())
    return {when: summary[f"eval_{when}"]["eval_loss"] for when in ("before", "after")}


@pytest.mark.parametrize("how", ["dtype", "mixed_precision"])
def test_lora_learns_the_same_beside_a_bf16_base(
    tmp_path: Path, lora: dict[str, float], forks: Forks, how: str
) -> None:
    """Computed in bf16 by the base's own type, and under autocast, where `auto` gives the base that type."""
    if how == "dtype":
        assert train_here(demo_flags(tmp_path, dtype="bfloat16", **LORA)) == 0
    else:
        train_on(BF16, demo_flags(tmp_path, **LORA), forks, tmp_path)
    after = held_out(tmp_path / "run")["after"]
    assert lora["after"] < 0.8 * lora["before"]
    assert after == pytest.approx(lora["after"], rel=0.02)
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert load_model(tmp_path / "run").config.dtype == torch.float32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16", "lora_dropout": 0.1}])
def test_a_resumed_run_with_a_half_precision_base_has_the_same_bits(
    tiny: Inputs, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = options | {"lora_r": 4, "save_steps": 1, "save_total_limit": 0}
    assert train_here(tiny.flags(tmp_path / "whole", **options)) == 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000001"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["identity"]["dtype"] == options["dtype"]
    assert train_here(tiny.flags(tmp_path / "parts", resume=checkpoint, **options)) == 0
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(UserError, match=f"dtype: was {options['dtype']}, is float32"):
        train_here(tiny.flags(tmp_path / "other", resume=checkpoint, **options | {"dtype": "float32"}))


def test_a_checkpoint_from_before_there_were_types_goes_on_in_fp32(tiny: Inputs, tmp_path: Path, forks: Forks) -> None:
    """Under bf16 too, where `auto` would begin a new run with a bf16 base."""
    options = {"lora_r": 4, "save_steps": 1, "dtype": "float32"}
    train_on(BF16, tiny.flags(tmp_path / "whole", **options), forks, tmp_path)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    _forget(checkpoint, "dtype", "optim")
    options = {"lora_r": 4, "resume": checkpoint}
    train_on(BF16, tiny.flags(tmp_path / "parts", **options), forks, tmp_path)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def _forget(checkpoint: Path, *settings: str) -> None:
    """Make a checkpoint one that was written before there were these settings."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for name in settings:
        del state["identity"][name]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (checkpoint / "trainer_state.json").read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["trainer_state.json"] = entry
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("reference", ["live", "offload", "cache"])
def test_a_reference_in_its_own_type(tiny: Inputs, tmp_path: Path, reference: str) -> None:
    """The same weights in half precision are another reference: another digest, margins of rounding at the start."""
    summaries = {}
    for dtype in ("auto", "bfloat16", "float16"):
        output = tmp_path / dtype
        options = {"reference": reference, "ref_dtype": dtype, "max_steps": 1, "eval_data": tiny.eval_data}
        assert train_here(tiny.flags(output, **options)) == 0
        summaries[dtype] = json.loads((output / "summary.json").read_text())
    assert len({summary["reference_digest"] for summary in summaries.values()}) == 3
    margins = {dtype: abs(summary["eval_before"]["eval_rewards/margins"]) for dtype, summary in summaries.items()}
    assert margins["auto"] < 1e-6
    assert all(1e-6 < margins[dtype] < 1e-2 for dtype in ("float16", "bfloat16"))


def test_what_precompute_scored_in_a_type_is_what_train_reads(tiny: Inputs, tmp_path: Path) -> None:
    flags = tiny.flags(tmp_path / "run", reference="cache", ref_dtype="bfloat16")
    assert precompute(load_config(flags, "precompute")) == 0
    filled = sorted(path.name for path in (cache_root() / "reference").iterdir())
    assert train_here(flags) == 0
    assert sorted(path.name for path in (cache_root() / "reference").iterdir()) == filled
    assert len(filled) == 1


def test_a_live_reference_in_bf16_takes_half_the_memory(tiny: Inputs, tmp_path: Path) -> None:
    sizes = [
        held_bytes(built(load_config(tiny.flags(tmp_path, reference="live", ref_dtype=dtype))).reference.scorer.model)
        for dtype in ("auto", "bfloat16")
    ]
    assert sizes[1] == 0.5 * sizes[0]


def test_a_checkpoint_beside_a_half_precision_base_exports_as_the_final_model(tiny: Inputs, tmp_path: Path) -> None:
    assert train_here(tiny.flags(tmp_path / "run", lora_r=4, dtype="bfloat16", save_steps=3)) == 0
    ours = load_model(tmp_path / "run" / "checkpoints" / "step-000003", dtype="auto").state_dict()
    final = load_model(tmp_path / "run", dtype="auto").state_dict()
    for name, tensor in final.items():
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-7)


def test_a_base_kept_in_bf16_computes_in_fp32(tmp_path: Path) -> None:
    """With weights on bf16's grid, the same numbers as beside an fp32 base; no batch leaves anything wide behind."""
    model = load_model(demo_config(tmp_path).model_name_or_path)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(tmp_path / "model")
    lines = {}
    for dtype in ("float32", "bfloat16"):
        options = LORA | {"model_name_or_path": tmp_path / "model", "dtype": dtype, "max_steps": 6}
        assert train_here(demo_flags(tmp_path / dtype, **options)) == 0
        lines[dtype] = train_lines(tmp_path / dtype / "run")
    for wide, narrow in zip(lines["float32"], lines["bfloat16"], strict=True):
        assert narrow["loss"] == pytest.approx(wide["loss"], rel=1e-4)
        assert narrow["grad_norm"] == pytest.approx(wide["grad_norm"], rel=1e-2)
    assert lines["bfloat16"][-1]["rewards/margins"] > 1e-3


NF4 = {"lora_r": 4, "quantization": "nf4"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"quantization": "nf4"}, "quantization: nf4 weights can't be trained"),
        (NF4 | {"reference": "offload"}, "reference: the reference is the policy's quantised base"),
        (
            NF4 | {"reference": "live", "ref_dtype": "bfloat16"},
            "ref_dtype: the reference is the policy's quantised base",
        ),
    ],
)
def test_quantised_weights_that_cannot_be_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        make_config(REQUIRED | values)
    assert str(refused.value).count("\n") == 1


@BNB
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_four_bits(tmp_path: Path, dtype: str) -> None:
    """Linear layers take 4 bits and an 8-bit scale for 64 weights; passes with and without gradients agree."""
    model = load_model(demo_config(tmp_path).model_name_or_path, dtype=dtype)
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear and m is not model.get_output_embeddings()]
    count, size = sum(m.weight.numel() for m in linear), held_bytes(model)
    saved = held_bytes(model) - count * model.dtype.itemsize
    quantize(model, model.dtype)
    assert held_bytes(model) - saved < 0.55 * count  # 4.127 bits, and two tables a layer
    assert held_bytes(model) < size
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        quiet = model.eval()(tokens).logits
    loud = model.train()(inputs_embeds=model.get_input_embeddings()(tokens).detach().requires_grad_()).logits
    assert loud.requires_grad and torch.equal(quiet, loud)
    dequantize(model)
    noise = 1e-4 if dtype == "float32" else 0.3  # a logit of 20 has neighbours 0.125 apart in bf16
    torch.testing.assert_close(model.to(quiet.dtype)(tokens).logits, quiet, rtol=0, atol=noise)


@BNB
def test_lora_learns_the_same_beside_a_base_in_four_bits(tmp_path: Path, lora: dict[str, float]) -> None:
    assert train_here(demo_flags(tmp_path, quantization="nf4", **LORA)) == 0
    after = held_out(tmp_path / "run")
    assert after["before"] == pytest.approx(math.log(2), abs=1e-6)
    assert after["after"] == pytest.approx(lora["after"], rel=0.02)


@BNB
@pytest.mark.parametrize("engine", [None, "multi_cpu"])
def test_a_run_beside_four_bits_resumes_merges_and_exports(
    tiny: Inputs, forks: Forks, tmp_path: Path, engine: str | None
) -> None:
    """The policy of the last checkpoint is the final model, which is a plain one; a resume has the same bits."""

    def trained(name: str, **options: Any) -> Path:
        flags = tiny.flags(tmp_path / name, **NF4, **options)
        train_on(engine, flags, forks, tmp_path)
        return tmp_path / name

    whole = trained("whole", save_steps=1, save_total_limit=0)
    parts = trained("parts", resume=whole / "checkpoints" / "step-000001")
    assert same_bits(parts, whole)
    final, start = load_model(whole), load_model(tiny.model)
    last = max((whole / "checkpoints").iterdir())
    assert cli(["export", "--model", str(last), "--format", "hf", "--output", str(tmp_path / "out")]) == 0
    exported = load_model(tmp_path / "out", dtype="auto").state_dict()
    for name, tensor in final.state_dict().items():
        assert exported[name].dtype == torch.float32
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-6)
    moved = (final.model.layers[0].mlp.up_proj.weight - start.model.layers[0].mlp.up_proj.weight).abs()
    assert 1e-4 < float(moved.detach().mean())


@BNB
def test_references_of_four_bits_agree(tiny: Inputs, tmp_path: Path) -> None:
    """Adapters off, a copy of the quantised base, and the cache that precompute filled."""
    lines = {}
    assert precompute(load_config(tiny.flags(tmp_path / "x", reference="cache", **NF4), "precompute")) == 0
    for reference in ("adapter", "live", "cache"):
        assert train_here(tiny.flags(tmp_path / reference, reference=reference, **NF4)) == 0
        lines[reference] = train_lines(tmp_path / reference)
    assert len(list((cache_root() / "reference").iterdir())) == 1
    for reference in ("live", "cache"):
        for ours, theirs in zip(lines[reference], lines["adapter"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_deepspeed_decides_itself(tiny: Inputs, tmp_path: Path, forks: Forks) -> None:
    options = {"lora_r": 4, "dtype": "bfloat16", "reference": "live", "ref_dtype": "float16"}
    options |= {"quantization": "nf4", "ref_model_name_or_path": tiny.model}
    assert forks.run(tiny.flags(tmp_path / "run", **options), tmp_path, "ds_zero2_cpu --num_processes 1") == [2]
    said = (tmp_path / "log").read_text("utf-8")
    assert "quantization: is nf4, for one process or DDP" in said
    for name in ("dtype", "ref_dtype"):
        assert f"{name}: is {options[name]}, but under DeepSpeed weights have the type" in said
