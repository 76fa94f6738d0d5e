"""Products of fp32 matrices on the CPU: which library makes them, and linear layers through oneDNN.

torch.mm calls MKL, which leaves the 512-bit units of AMD's processors alone. oneDNN is a part of torch too and uses
them: on a Zen 5 it is 2.2 times as fast. The two add up in different orders, so a run keeps to one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_dpo.engine.cpu import Processor, has_bf16_units, read_processor
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.ranks import on_main
from minimind_dpo.errors import UserError

TORCH, ONEDNN = "torch", "onednn"

Multiply = Callable[[Tensor, Tensor], Tensor]  # [M, K] and [N, K] -> left @ right^T [M, N]

_ZEN_5 = 26  # the first family of AMD's whose 512-bit units are not two of 256 bits
_LEAST_LEAD = 1.25  # a smaller one goes into the kernels that oneDNN compiles for each new length
_LEAST_HALF_LEAD = 1.75  # of bf16, to be worth a line
_MEASURING_SECONDS = 0.1
_MEASURED = (256, 512, 512)  # rows, inputs and outputs: as in 26M, and small, so that the best of many turns counts
_SMALLEST = 64  # rows or columns of a weight; LoRA's matrices, with fewer, gain nothing
_STRIP = 8192  # rows of a product that is added to another, at a time


def agree_on_library(asked: str, engine: Engine, kept: str | None = None) -> tuple[str, str]:
    """The library for a run's fp32 products on the CPU, `torch` or `onednn`, and why. Collective.

    Args:
        asked: the setting `matmul`; `auto` looks at the processor and measures for 0.1 s at most.
        engine: of the run.
        kept: what the run that is resumed began with, which `auto` keeps to.

    Raises:
        UserError: asked for oneDNN, of which this torch has none.
    """
    if ONEDNN in (asked, kept) and not torch.backends.mkldnn.is_available():
        raise UserError(f"matmul: this torch is built without oneDNN; set it to {TORCH}, in a new output_dir")
    if asked != "auto":
        return asked, "as configured"
    if kept is not None:
        return kept, "as the run began"
    if engine.device.type != "cpu" or engine.precision != "no":
        return TORCH, "no products are made in fp32 on a CPU"
    library, reason = on_main(engine, lambda: choose_library(read_processor()))
    return library, reason


def choose_library(processor: Processor | None, lead: Callable[[], float] | None = None) -> tuple[str, str]:
    """The faster library on a processor, and why; torch's own where they are about even.

    Args:
        processor: None where it does not tell what it is.
        lead: measures how many times as fast oneDNN is; `measure_lead` unless given.
    """
    if processor is None or "avx512f" not in processor.flags:
        return TORCH, "no 512-bit units are known of"
    if processor.vendor == "AuthenticAMD" and processor.family < _ZEN_5:
        return TORCH, f"the 512-bit units of AMD's family {processor.family} have half the width"
    if not torch.backends.mkldnn.is_available():
        return TORCH, "this torch is built without oneDNN"
    times = (lead or measure_lead)()
    return ONEDNN if times >= _LEAST_LEAD else TORCH, f"oneDNN is {times:.2f} times as fast as torch.mm"


def measure_lead(
    clock: Callable[[], float] = time.perf_counter, multiply: tuple[Multiply, Multiply] | None = None
) -> float:
    """How many times as fast as the first the second way to multiply is, with this process's threads, the best of each.

    The two take turns, first untimed, until the next turn would pass 0.1 s.

    Args:
        clock: seconds.
        multiply: the two; torch's product and oneDNN's unless given.
    """
    rows, inputs, outputs = _MEASURED
    left, right = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    times: list[tuple[float, float]] = []
    began = clock()
    while len(times) < 2 or clock() - began + sum(times[-1]) < _MEASURING_SECONDS:
        turn = [clock()]
        for function in multiply or (F.linear, product):
            function(left, right)
            turn.append(clock())
        times.append((turn[1] - turn[0], turn[2] - turn[1]))
    first, second = (min(seconds) for seconds in zip(*times[1:], strict=True))
    return first / second


def half_precision_notice(library: str, lead: Callable[[], float] | None = None) -> str | None:
    """What to tell a run in fp32 on a processor whose products of bf16 are much faster; None elsewhere.

    Args:
        library: for the run's fp32 products.
        lead: measures how many times as fast bf16 is; 0.1 s at most.
    """
    if not has_bf16_units():
        return None

    weight = torch.ones(_MEASURED[2], _MEASURED[1], dtype=torch.bfloat16)  # rounded once a step, not at each product

    def half(left: Tensor, right: Tensor) -> Tensor:
        return F.linear(left.bfloat16(), weight)

    single = product if library == ONEDNN else F.linear
    times = (lead or partial(measure_lead, multiply=(single, half)))()
    if times < _LEAST_HALF_LEAD:
        return None
    return f"this processor multiplies bf16 {times:.1f} times as fast as fp32: see --mixed_precision bf16"


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right^T by oneDNN, of fp32 [M, K] and [N, K] in any strides."""
    if not left.numel() or not right.numel():
        return F.linear(left, right)  # oneDNN has no kernel for nothing
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def batched_product(left: Tensor, right: Tensor, library: str) -> Tensor:
    """left @ right of [key heads, rows, n] and [key heads, n, columns]; those of fp32 by `library`.

    MKL, torch's for fp32, gives whole products of a batch to threads. Those that do not divide evenly are made one by
    one, each by all threads: three products on two threads take a quarter less time.
    """
    if left.dtype != torch.float32:
        return torch.bmm(_whole(left), _whole(right))
    if library == ONEDNN:
        return torch.stack([product(*factors) for factors in zip(left, right.mT, strict=True)])
    count, threads = len(left), torch.get_num_threads()
    even = count - count % threads
    if even in (0, count):
        return torch.bmm(left, right)
    output = left.new_empty(count, left.shape[1], right.shape[2])
    torch.bmm(left[:even], right[:even], out=output[:even])
    for index in range(even, count):
        torch.mm(left[index], right[index], out=output[index])
    return output


def _whole(factor: Tensor) -> Tensor:
    """Without the strides of a longer row, which would make another shape of it to oneDNN."""
    return factor if factor.is_contiguous() or factor.mT.is_contiguous() else factor.contiguous()


def multiply_of(library: str, *tensors: Tensor) -> Multiply:
    """The product of `library` for what is to be multiplied; torch's own unless all of it is fp32 on a CPU."""
    fits = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return product if library == ONEDNN and fits else F.linear


def add_product(total: Tensor, left: Tensor, right: Tensor, multiply: Multiply) -> None:
    """Add left @ right^T, of [M, K] and [N, K], to `total` [M, N]; no second tensor of its size exists."""
    if multiply is not product:
        total.addmm_(left, right.t())
        return
    for first in range(0, len(total), _STRIP):
        strip = slice(first, first + _STRIP)
        total[strip] += product(left[strip], right)


class _Linear(torch.autograd.Function):
    """x W^T + b with all three products through oneDNN. Keeps x and W, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        output = product(x.reshape(-1, x.shape[-1]), weight)
        if bias is not None:
            output += bias
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(rows, weight.t()).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, library: str) -> Tensor:
    """x W^T + b of [..., K], [N, K] and [N] by `library` where it can and gains by it, else as torch does it."""
    if torch.is_autocast_enabled(x.device.type) or multiply_of(library, x, weight) is not product:
        return F.linear(x, weight, bias)
    if min(weight.shape) < _SMALLEST:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def linear_forwards(model: nn.Module, library: str) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The linear layers of a model, each with its forward pass by `library`; none where that is torch's own."""
    if library != TORCH:
        for module in model.modules():
            if type(module) is nn.Linear:
                yield module, partial(_linear_forward, library, module)


def _linear_forward(library: str, module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias, library)
