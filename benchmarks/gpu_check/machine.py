"""Versions, and what products and copies reach on this device: the ceilings that speed is held against."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu_check.notes import Notes, Place
from benchmarks.gpu_check.timing import median_seconds, rounded
from minimind_dpo.engine.devices import sum_dtype

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "triton", "peft", "bitsandbytes", "trl")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WITHIN = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}  # of a product, relative in norm


def run(notes: Notes, place: Place) -> None:
    """Note them; products are also held against fp64."""
    notes.figure("versions", {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()})
    notes.figure("device", _device(place.device))
    notes.figure("sums are", str(sum_dtype(torch.device(place.device))))
    size = 128 if place.rehearses else 8192
    for name, dtype in DTYPES.items():
        left, right = (torch.randn(size, size, device=place.device, dtype=dtype) for _ in range(2))
        seconds = median_seconds(lambda left=left, right=right: left @ right, place.device)
        notes.figure(f"{name} TFLOP/s", rounded(2 * size**3 / seconds / 1e12))
        left, right = left[:256], right[:, :256]
        exact = left.double() @ right.double()
        error = float((left @ right - exact).norm() / exact.norm())
        notes.check(f"{name} product", error <= WITHIN[name], f"relative error {error:.1e}")
    source = torch.zeros((1 << 20) if place.rehearses else (1 << 28), device=place.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), place.device)
    notes.figure("memory GB/s", rounded(2 * source.numel() * source.element_size() / seconds / 1e9))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
