"""What one run or each named configuration needs, and whether it fits."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch

from minimind_dpo.engine.console import quiet_libraries
from minimind_dpo.planning.configurations import configuration_name
from minimind_dpo.planning.measure import measure, process_bytes
from minimind_dpo.planning.peak import Peak, predict
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape, read_shape

GIB = 2**30
SPARE = 1.1  # a configuration fits with a tenth to spare
_MOST_PAIRS = 1 << 14  # of a micro-batch that is looked at
_LORA_R = 16
_FLAGS = {"pairs": "per_device_train_batch_size", "checkpointing": "gradient_checkpointing"}
CUDA_RUNTIME = 0.5 * GIB  # CUDA's context with the kernels of torch and NCCL; not measured here


def compare(
    source: str,
    runs: Sequence[RunShape],
    num_attention_heads: int | None,
    lora_r: int | None,
    device_gib: float | None,
    host_gib: float | None,
) -> dict[str, Any]:
    """The report of all runs, in the order in which they are recommended.

    Args:
        source: the model.
        runs: of one number of ranks, one batch and one device.
        num_attention_heads: of MiniMind's raw weights.
        lora_r: rank of LoRA matrices, None to train every weight.
        device_gib: memory of a GPU, None for that of this machine's first.
        host_gib: memory of a machine, None for this one's; with `device_gib`, which is of another machine, unknown.

    Raises:
        UserError: no model is there, or it cannot be read.
    """
    quiet_libraries()
    shape = read_shape(source, num_attention_heads, lora_r)
    available = _available(runs[0].cpu, device_gib, host_gib)
    plans = [_plan(shape, run, available) for run in runs]
    recommended = next((plan["name"] for plan in plans if plan["fits"]), None)
    suggestion = None
    if all(plan["fits"] is False for plan in plans):
        adapted = None if lora_r else partial(read_shape, source, num_attention_heads, _LORA_R)
        suggestion = suggest(shape, runs, available, adapted)
    return {
        "model": source,
        "parameters": shape.total,
        "trained_parameters": sum(shape.trained),
        "setup": _setup(runs[0]) | {"lora_r": lora_r, "device": "cpu" if runs[0].cpu else "cuda"},
        "available_gib": available,
        "plans": plans,
        "recommended": recommended,
        "suggestion": suggestion,
    }


def hold_against_run(
    report: dict[str, Any], run: RunShape, num_attention_heads: int | None, lora_r: int | None
) -> dict[str, float]:
    """The peak of two real optimizer steps beside the report's prediction, GiB, and their ratio.

    Raises:
        TrainingError: the run failed.
    """
    measured = measure(report["model"], run, num_attention_heads, lora_r) / GIB
    predicted = report["plans"][0]["device"]["total_gib"] - (0 if run.cpu else CUDA_RUNTIME / GIB)
    return {"predicted_gib": predicted, "measured_gib": measured, "ratio": predicted / measured}


def _setup(run: RunShape) -> dict[str, Any]:
    fields = dataclasses.asdict(run)
    zero = fields.pop("zero")
    return fields | {"stage": zero["stage"], "offload": zero["offload"]}


def _available(cpu: bool, device: float | None, host: float | None) -> dict[str, float | None]:
    """GiB of a device and of a machine, as told or as found here; None where nothing tells."""
    if host is None and (cpu or device is None):
        host = psutil.virtual_memory().total / GIB
    if device is None and not cpu and torch.cuda.is_available():
        device = torch.cuda.mem_get_info(0)[1] / GIB
    return {"device": host if cpu else device, "host": host}


def _plan(shape: ModelShape, run: RunShape, available: dict[str, float | None]) -> dict[str, Any]:
    """One run's prediction, GiB; `fits` is None where the device's memory is not known."""
    process = process_bytes()
    device, host = predict(shape, run, process, CUDA_RUNTIME)
    return {
        "name": configuration_name(run.stage, run.zero.offload, run.cpu, run.world),
        "reference": run.reference,
        "fits": (fits := _fits(device, host, run, available)),
        "lacks": None if fits is not False else "host" if _lacks_host(host, run, available) else "device",
        "max_tokens_per_micro_batch": _most_tokens(shape, run, process, available),
        "device": _gib(device),
        "host": _gib(host),
        "host_node_gib": host.total * run.per_node / GIB,
    }


def _fits(device: Peak, host: Peak, run: RunShape, available: dict[str, float | None]) -> bool | None:
    if _lacks_host(host, run, available):
        return False
    if run.cpu:
        return True
    return None if available["device"] is None else device.total / GIB * SPARE <= available["device"]


def _lacks_host(host: Peak, run: RunShape, available: dict[str, float | None]) -> bool:
    """Whether a machine's memory is known and too small."""
    return available["host"] is not None and host.total * run.per_node / GIB * SPARE > available["host"]


def suggest(
    shape: ModelShape,
    runs: Sequence[RunShape],
    available: dict[str, float | None],
    adapted: Callable[[], ModelShape] | None,
) -> dict[str, Any] | None:
    """The nearest run that fits where none does: fewer pairs at once, activations recomputed, LoRA; by train's flags.

    Args:
        shape: of the model.
        runs: of which none fits.
        available: GiB of a device and of a machine.
        adapted: gives the shape of the model with LoRA; None where it has it.
    """
    process = process_bytes()
    smaller: list[dict[str, Any]] = [{"pairs": 1}, {"checkpointing": True}, {"pairs": 1, "checkpointing": True}]
    tries = [(shape, change) for change in smaller]
    if adapted is not None:
        with_lora = adapted()
        tries += [(with_lora, {"reference": "adapter"} | change) for change in ({}, *smaller)]
    for model, change in tries:
        for run in runs:
            other = dataclasses.replace(run, **change)
            if _fits(*(peaks := predict(model, other, process, CUDA_RUNTIME)), other, available):
                flags = {"lora_r": _LORA_R} if model is not shape else {}
                flags |= {_FLAGS[name]: value for name, value in change.items() if name in _FLAGS}
                name = configuration_name(run.stage, run.zero.offload, run.cpu, run.world)
                return {"name": name, "flags": flags, "device_gib": peaks[0].total / GIB}
    return None


def _most_tokens(shape: ModelShape, run: RunShape, process: float, available: dict[str, float | None]) -> int | None:
    """Input tokens of the largest micro-batch that fits, in pairs of the run's length; None where not one pair does."""

    def fits(pairs: int) -> bool:
        wider = dataclasses.replace(run, pairs=pairs)
        return bool(_fits(*predict(shape, wider, process, CUDA_RUNTIME), wider, available))

    pairs = bisect.bisect_left(range(1, _MOST_PAIRS), True, key=lambda pairs: not fits(pairs))
    return dataclasses.replace(run, pairs=pairs).tokens if pairs else None


def _gib(peak: Peak) -> dict[str, Any]:
    parts = {purpose: size / GIB for purpose, size in peak.bytes_by_purpose.items()}
    return {"phase": peak.phase, "total_gib": peak.total / GIB, "parts_gib": parts}
