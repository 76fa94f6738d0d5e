"""Whole optimizer steps on a CUDA that computes nothing: what they ask of a GPU, within what a GPU forgives."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("gpu_free")  # one program takes all steps

NAMES = (
    *("26m bf16 4", "26m bf16 32", "26m fp32 32", "26m bf16 4 whole"),
    *("llama bf16", "llama fp16", "llama fp32", "llama bf16 weights"),
    *("qwen3 bf16", "minimind_moe bf16", "mistral_window bf16", "qwen3_moe bf16"),
    *("llama bf16 accumulated", "llama bf16 live", "llama bf16 lora", "llama bf16 checkpointing"),
    "llama bf16 over the step",
)
HALF = [name for name in NAMES if "fp32" not in name]

# Kernels at most, a forward and backward pass of one micro-batch, whatever its pairs.
BUDGETS = {"26m bf16 4": 800, "26m bf16 32": 800, "26m fp32 32": 2500}
DISPATCHES = 7000  # at most, views and allocations among them: each takes some time of the host's


@pytest.fixture
def step(steps: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the step of the test's `name` asked of the device."""
    found = steps[request.getfixturevalue("name")]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits(step: dict[str, Any], name: str) -> None:
    """Neither for a number of the device's, nor for a copy to it."""
    assert step["waits"] == [] and step["blocking"] == []
    assert step["copies"] >= 11  # the batch itself


@pytest.mark.parametrize("name", BUDGETS)
def test_kernels_are_few(step: dict[str, Any], name: str) -> None:
    assert step["kernels"] <= BUDGETS[name], step["by_kernel"]
    assert step["dispatches"] <= DISPATCHES


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_one_call_a_layer(step: dict[str, Any], name: str) -> None:
    """And one more where a reference scores beside the policy, a pass is made twice, or another micro-batch follows."""
    layers = 8 if "26m" in name else 2
    passes = {"live": (2, 1), "checkpointing": (2, 1), "accumulated": (2, 2), "over the step": (4, 2)}
    forward, backward = next((count for word, count in passes.items() if word in name), (1, 1))
    kind = "efficient" if "fp32" in name else "flash"
    calls = {kernel: count for kernel, count in step["by_kernel"].items() if "attention" in kernel}
    assert calls == {f"_{kind}_attention_forward": forward * layers, f"_{kind}_attention_backward": backward * layers}


@pytest.mark.parametrize("name", HALF)
def test_products_are_of_half_precision(step: dict[str, Any], name: str) -> None:
    assert set(step["products"]) == {"float16" if "fp16" in name else "bfloat16"}
