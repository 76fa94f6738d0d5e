"""Each term of a plan by hand for one small shape, and the settings that it reads from configs/."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers_planning import BILLION, planned, total

from minimind_dpo.errors import UserError
from minimind_dpo.planning import activations, configurations, heap, phases, states
from minimind_dpo.planning.allocation import LARGE, Allocation
from minimind_dpo.planning.configurations import CONFIGURATIONS, ZeroSettings, configuration_name, read_zero
from minimind_dpo.planning.peak import predict
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = ModelShape(
    parameters=(3000, 1000),
    adapters=(),
    layers=2,
    hidden=10,
    heads=2,
    query=20,
    key_value=8,
    intermediate=30,
    dense_blocks=1,
    routed=0,
    gated=True,
    normed_heads=False,
    fused=True,
    vocab=50,
    products=(3000, 500),
)
TIED = replace(SMALL, parameters=(3000, 500, 500 // 2, 500 // 2))
LORA = replace(SMALL, adapters=(40, 60, 40, 60), lora_r=2, linear=(3000,))
BIG = replace(SMALL, parameters=(8192, 1000), factors=(64 + 128, 1000))
NF4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of an index, of a scale for 64, of a scale for 256 of those
PLAIN = replace(SMALL, fused=False)
FP32 = planned(pairs=2, length=6, prompt_share=0.5, cpu=True)  # 3 tokens shared, 2 more a side are input: 2 (3 + 2 + 2)
GPU = planned(pairs=2, length=6, prompt_share=0.5, bf16=True)
TERMS = [
    (states.weights, SMALL, planned(), 4 * 4000),
    (states.weights, SMALL, planned(2, bf16=True), 2 * 4000),
    (states.weights, SMALL, planned(3, world=4), 4 * 4000 / 4),
    (states.weights, LORA, planned(), 4 * (4000 + 200)),
    (states.weights, LORA, planned(3, world=4, bf16=True), 2 * (4000 + 200) / 4),
    (states.gathered_weights, SMALL, planned(2), 0),
    (states.gathered_weights, SMALL, planned(3, world=4), 4 * 4000),
    (states.gathered_weights, BILLION, planned(3, world=4, bf16=True), 2 * (500_000_000 + 50_000_000 + 1_000_000)),
    (states.optimizer_states, SMALL, planned(), 2 * 4 * 4000),
    (states.optimizer_states, SMALL, planned(1, world=4, bf16=True), 3 * 4 * 4000 / 4),
    (states.optimizer_states, LORA, planned(2, world=2), 3 * 4 * 200 / 2),
    (states.followed_reference, SMALL, planned(), 0),
    (states.followed_reference, SMALL, planned(follows=True), 4 * 4000),
    (states.followed_reference, SMALL, planned(3, world=4, follows=True), 4 * 4000 / 4),
    (states.weights, LORA, planned(dtype="bfloat16"), 2 * 4000 + 4 * 200),
    (states.weights, LORA, planned(bf16=True), 2 * 4000 + 4 * 200),
    (states.weights, LORA, planned(bf16=True, dtype="float32"), 4 * 4200),
    (states.weights, LORA, planned(quantization="nf4"), NF4 * 3000 + 4 * 1000 + 4 * 200),
    (states.base_blocks, SMALL, planned(bf16=True), 4 * 4000),
    (states.base_blocks, LORA, planned(bf16=True, quantization="nf4"), NF4 * 3000 + 2 * 1000),
    (states.optimizer_states, BIG, planned(optim="adamw_8bit"), (2 + 8 / 256) * 8192 + 8 * 1000),
    (states.optimizer_states, BIG, planned(optim="paged_adamw_8bit"), (2 + 8 / 256) * 8192 + 8 * 1000),
    (states.optimizer_states, BIG, planned(optim="adafactor"), 4 * (64 + 128 + 1000)),
    (states.reference_blocks, SMALL, planned(ref_dtype="float16"), 2 * 4000),
    (states.reference_blocks, LORA, planned(dtype="bfloat16"), 2 * 4000),
    (states.reference_blocks, SMALL, planned(2, bf16=True), 2 * 4000),
    (states.whole_gradients, SMALL, planned(world=2), 4 * 4000),
    (states.whole_gradients, SMALL, planned(1, world=2, bf16=True), 2 * 4000),
    (states.whole_gradients, BILLION, planned(1, world=2, cpu=True), 4 * 950_000_000),
    (states.whole_gradients, SMALL, planned(2, world=2), 0),
    (states.gradient_partition, SMALL, planned(2, world=2, bf16=True), 2 * 4000 / 2),
    (states.gradient_partition, SMALL, planned(2, "optimizer", world=2), 0),
    (states.gradient_partition, SMALL, planned(3, "all", world=2), 4 * 4000 / 2),
    (states.fp32_gradients, SMALL, planned(2, world=2, bf16=True), 4 * 4000 / 2),
    (states.fp32_gradients, SMALL, planned(2, world=2, cpu=True), 0),
    (states.fp32_gradients, SMALL, planned(3, world=2, cpu=True), 4 * 4000 / 2),
    (states.gradient_norm, SMALL, planned(2, world=4), 8 * 1000),
    (states.gradient_norm, SMALL, planned(2), 8 * 3000),
    (states.ddp_buckets, SMALL, planned(world=2), 4 * 4000),
    (states.ddp_buckets, SMALL, planned(), 0),
    (states.reduce_bucket_bytes, BILLION, planned(2, bf16=True), 2 * 50_000_000),
    (states.reduce_bucket_bytes, SMALL, planned(2, cpu=True), 4 * 4000),
    (states.offload_buffers, SMALL, planned(2, "optimizer", world=2, bf16=True), 2 * (4000 / 2 + 2 * 3000)),
    (states.offload_buffers, SMALL, planned(3, "all", world=2), 0),
    (phases.weights_file, replace(SMALL, stored=2), FP32, 2 * 4000),
    (phases.weights_file, SMALL, planned(3), 4 * 3000),
    (phases.weights_file, LORA, planned(bf16=True), 2 * 4000),
    (phases.loaded_model, LORA, planned(dtype="bfloat16", cpu=True), 2 * 4000),
    (phases.loaded_model, replace(LORA, stored=2), planned(dtype="bfloat16", cpu=True), 0),
    (phases.loaded_model, LORA, planned(bf16=True, quantization="nf4"), NF4 * 3000 + 2 * 1000),
    (phases.quantized_model, LORA, planned(bf16=True, quantization="nf4"), NF4 * 3000),
    (phases.quantized_model, LORA, planned(), 0),
    (phases.loaded_reference, SMALL, planned(reference="live", ref_dtype="bfloat16"), 2 * 4000),
    (phases.loaded_model, SMALL, FP32, 0),
    (phases.loaded_model, replace(SMALL, stored=2), FP32, 4 * 4000),
    (phases.loaded_model, SMALL, planned(3, world=4, bf16=True), 2 * 4000 / 4 + 4 * 3000),
    (phases.loaded_reference, SMALL, planned(reference="live"), 4 * 4000),
    (phases.loaded_reference, SMALL, planned(3, reference="offload", world=4, bf16=True), 2 * 4000 / 4),
    (phases.flat_copy, LORA, planned(2), 4 * 200),
    (phases.flat_copy, LORA, planned(2, bf16=True), 0),
    (heap.gathering_holes, LORA, planned(3, world=2, cpu=True), 2 * 4 * 4000),
    (heap.gathering_holes, SMALL, planned(3, world=2, cpu=True), 0),
    (heap.gathering_holes, LORA, planned(2, world=2, cpu=True), 0),
    (heap.reference_holes, SMALL, planned(3, world=4, reference="live", cpu=True), 4 * 4000),
    (heap.reference_holes, SMALL, planned(2, world=4, reference="offload", cpu=True), 4 * 4000 * 3 / 4),
    (heap.reference_holes, SMALL, planned(2, world=4, reference="live", cpu=True), 0),
    (heap.reference_holes, replace(SMALL, parameters=(LARGE, 8)), planned(3, reference="live", cpu=True), 4 * 8),
    (activations.norm_bytes, SMALL, FP32, 2 * (4 + 4) * 10),
    (activations.norm_bytes, PLAIN, FP32, 2 * (4 + 4 + 4) * 10),
    (activations.norm_bytes, SMALL, GPU, 2 * 4 * 10 + 2 * 2 * 10),
    (activations.norm_bytes, PLAIN, GPU, 2 * (4 + 4) * 10 + 5 * 2 * 10),
    (activations.norm_bytes, SMALL, replace(GPU, zero=read_zero(2, "none", cpu=False)), 2 * (2 + 2) * 10),
    (activations.attention_bytes, SMALL, FP32, 4 * (20 + 2 * 8) + 4 * 20),
    (activations.attention_bytes, SMALL, GPU, 2 * (20 + 8 + 20) + 4 * 2 + 2 * 2 * 8 * (1 + 6 / 14)),
    (
        activations.attention_bytes,
        SMALL,
        replace(GPU, bf16=False),
        4 * (20 + 8 + 20) + 4 * 2 + 2 * 4 * 20 * (1 + 6 / 14),
    ),
    (activations.attention_bytes, replace(PLAIN, normed_heads=True), FP32, 4 * (20 + 2 * 8 + 20) + (4 + 4) * (20 + 8)),
    (activations.feed_forward_bytes, SMALL, FP32, 4 * 3 * 30),
    (activations.feed_forward_bytes, PLAIN, FP32, 4 * 4 * 30),
    (activations.feed_forward_bytes, replace(PLAIN, gated=False), FP32, 4 * 2 * 30),
    (activations.feed_forward_bytes, replace(SMALL, dense_blocks=0, routed=2), GPU, 2 * (2 * (4 * 30 + 2 * 10) + 24)),
    (activations.feed_forward_bytes, replace(SMALL, dense_blocks=0, routed=2), FP32, 2 * 4 * (3 * 30 + 3 * 10)),
    (activations.feed_forward_bytes, replace(SMALL, routed=2, whole_experts=4), GPU, 2 * 5 * 3 * 30 + 4 * 4 * 10),
    (activations.lora_bytes, LORA, FP32, 4 * 2),
    (activations.layer_bytes, SMALL, FP32, 14 * (160 + 224 + 360)),
    (activations.decoder_bytes, SMALL, FP32, 14 * 744 + 14 * 384 + 12 * 360 + (4 * 14 + 4 * 4 * 12) * 10),
    (
        activations.decoder_bytes,
        SMALL,
        replace(FP32, checkpointing=True),
        2 * 4 * 14 * 10 + 14 * 744 + (4 * 14 + 4 * 4 * 12) * 10,
    ),
    (activations.kept_activations, SMALL, FP32, 14 * 744 + 14 * 384 + 12 * 360 + (4 * 14 + 4 * 4 * 12) * 10),
    (activations.working_activations, SMALL, GPU, 2 * 2 * 14 * 30),
    (states.half_weights, SMALL, GPU, 2 * 3500),
    (states.half_weights, LORA, GPU, 2 * 200),
    (states.half_weights, LORA, replace(GPU, dtype="float32"), 2 * 3700),
    (states.half_weights, SMALL, FP32, 0),
    (states.half_weights, SMALL, planned(2, bf16=True), 0),
    (states.rounded_masters, SMALL, planned(2, world=2, bf16=True), 4 * 4000 / 2),
    (states.rounded_masters, SMALL, planned(2, world=2), 0),
    (states.rounded_masters, SMALL, GPU, 0),
    (states.reference_blocks, TIED, GPU, 2 * 3500 + 4 * 500 + 4 * 500),
    (states.reference_blocks, replace(TIED, parameters=(3000, 500, 500, 20)), GPU, 2 * 3500 + 4 * 520),
    (activations.dequantized_weight, LORA, replace(GPU, quantization="nf4"), 2 * 3000),
    (activations.dequantized_weight, LORA, GPU, 0),
    # of each pair one block of 5 queries that see 5 keys, and one of 2 that see the 3 shared ones and these 2
    (activations.kept_softmax, SMALL, FP32, 2 * 2 * 4 * 2 * (5 * 5 + 2 * 5)),
    (activations.kept_softmax, SMALL, GPU, 0),
    (activations.head_logits, SMALL, FP32, 4 * 12 * 50),
    (activations.head_logits, SMALL, GPU, (4 + 2) * 12 * 50),
    (activations.head_logits, SMALL, replace(GPU, cpu=True), (4 + 2) * 12 * 50 + 4 * 50 * 10),
]


@pytest.mark.parametrize(("term", "shape", "run", "expected"), TERMS)
def test_terms_by_hand(
    term: Callable[[ModelShape, RunShape], list[Allocation] | list[float] | float],
    shape: ModelShape,
    run: RunShape,
    expected: float,
) -> None:
    found = term(shape, run)
    if isinstance(found, list):
        found = sum(item.bytes if isinstance(item, Allocation) else item for item in found)
    assert found == pytest.approx(expected)


def test_every_term_is_checked() -> None:
    """Whatever three modules compute of a shape and a run, except for what other tests check."""
    found = {
        function.__name__
        for module in (states, activations, heap)
        for function in vars(module).values()
        if getattr(function, "__module__", None) == module.__name__
        and list(getattr(function, "__annotations__", ())) == ["shape", "run", "return"]
    }
    checked = {term.__name__ for term, *_ in TERMS}
    assert found - checked == {
        "reference_weights",
        "fuses_norms",
        "norm_input",
        "keeps_normalised",
        "mapped_bytes",
        "heap_holes",
        "activation_holes",
        "_heap_weights",
    }


def test_holes_are_a_share_of_the_activations() -> None:
    """As many where they are made layer by layer; what is mapped leaves holes with LoRA only."""
    kept, working = 14 * 744 + 14 * 384 + 12 * 360 + (4 * 14 + 4 * 4 * 12) * 10, 2 * 4 * 14 * 30
    assert heap.activation_holes(SMALL, FP32) == pytest.approx((kept + working) / 3)
    assert heap.activation_holes(SMALL, replace(FP32, checkpointing=True)) == pytest.approx((kept + working) / 3)
    lora = 2 * 14 * 4 * 2  # of two layers
    assert heap.activation_holes(LORA, FP32) == pytest.approx(0.8 * (kept + lora + working))
    run = planned(pairs=4, length=1025, cpu=True)
    everything = activations.kept_activations(BILLION, run) + activations.working_activations(BILLION, run)
    assert heap.activation_holes(BILLION, run) == pytest.approx(sum(item.heap for item in everything) / 3)
    adapted = replace(BILLION, adapters=(1000,) * 20)
    assert heap.activation_holes(adapted, run) == pytest.approx(0.8 * total(everything))


def test_large_inner_tensors_are_mapped() -> None:
    """8192 tokens of 4000 in fp32 are 125 MiB each: three of them in all layers except for the last."""
    run = planned(pairs=4, length=1025, cpu=True)
    assert activations.mapped_bytes(BILLION, run) == 9 * 3 * 4 * 8192 * 4000
    assert activations.kept_activations(BILLION, run)[0].mapped == activations.mapped_bytes(BILLION, run)
    assert activations.mapped_bytes(SMALL, run) == 0


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize(("stage", "offload"), CONFIGURATIONS)
def test_settings_are_those_of_the_files(stage: int, offload: str, cpu: bool) -> None:
    name = configuration_name(stage, offload, cpu, world=2)
    assert (REPOSITORY / "configs" / "accelerate" / f"{name}.yaml").is_file()
    if stage == 0:
        assert read_zero(stage, offload, cpu) == ZeroSettings()
        return
    found = read_zero(stage, offload, cpu)
    content = json.loads((REPOSITORY / "configs" / "deepspeed" / f"{name.removeprefix('ds_')}.json").read_text("utf-8"))
    zero = content["zero_optimization"]
    assert (found.stage, found.offload) == (zero["stage"], offload)
    assert found.overlap_comm == zero.get("overlap_comm", stage == 3)
    assert found.reduce_bucket_size == zero["reduce_bucket_size"]
    assert found.prefetch_bucket_size == zero.get("stage3_prefetch_bucket_size", 50_000_000)


def test_what_a_file_leaves_out_is_as_in_deepspeed() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    for field in fields(ZeroSettings):
        if field.name not in ("stage", "offload", "overlap_comm"):
            assert getattr(ZeroSettings(), field.name) == getattr(config, field.name)


def test_a_changed_file_changes_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    monkeypatch.setattr(configurations, "CONFIGS", tmp_path / "configs")
    path = tmp_path / "configs" / "deepspeed" / "zero2.json"
    content = json.loads(path.read_text("utf-8"))
    before = planned(2, world=2, bf16=True)
    content["zero_optimization"] |= {"reduce_bucket_size": 500_000_000, "overlap_comm": False}
    path.write_text(json.dumps(content), "utf-8")
    after = planned(2, world=2, bf16=True)
    # three buckets of 50 million elements became one of 500 million and its flattened copy
    partition = 2 * 1_000_000_000 / 2
    assert total(phases.gradient_exchange(BILLION, before)) == 3 * 2 * 50_000_000 + partition
    assert total(phases.gradient_exchange(BILLION, after)) == 2 * 2 * 500_000_000 + partition
    assert predict(BILLION, after, 0)[0].total > predict(BILLION, before, 0)[0].total
    content["zero_optimization"]["reduce_bucket_size"] = "auto"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match="ds_zero2: reduce_bucket_size is 'auto'"):
        planned(2)


def test_help_imports_nothing_slow() -> None:
    """Neither the flags nor a mistake in them need torch, which takes seconds to import."""
    code = (
        "import sys\nfrom minimind_dpo.cli import main\n"
        "main(['plan', '--model_name_or_path', 'none', '--num_processes', '0'])\n"
        "try: main(['plan', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--zero_stage" in result.stdout and "num_processes: must be at least 1" in result.stderr
