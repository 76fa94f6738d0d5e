"""Half-precision weights, rounded from their fp32 masters once an optimizer step.

A weight of 0.05 has neighbours 2.4e-4 apart in bf16. Rounded to the nearest, an update of 1e-6 reaches the forward pass
after some hundred steps in one direction, and DPO's first steps are not seen at all (docs/half_precision.md). Rounding
by a threshold u in [0, 1), floor(|w| / spacing + u), is right on average over the weights instead, and exact for a
weight on the grid. `dithered` takes the same u for a weight in every step, so that nothing but an update moves it;
`stochastic` takes another one each step.

A threshold is a pure function of the parameter's name, the element's index and, for `stochastic`, the step: the same on
every rank, under every engine and after a resume, and for policy and reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_dpo.engine.fragments import HeldPart

_PERIOD = 65521  # prime, so that no row of a matrix has the thresholds of another one
_AT_A_TIME = {"cpu": 1 << 18}  # elements; a core's cache holds them between three passes
_AT_A_TIME_ELSEWHERE = 1 << 22
_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of an fp32 mantissa that do not fit
_SMALLEST_NORMAL = 2.0**-14  # of fp16; below it the spacing stays
_SMALLEST = 2.0**-24


class HalfWeights:
    """Half-precision copies of the weights that products use.

    Args:
        masters: by name; fp32 ones get a copy.
        dtype: of the copies.
        rounding: of what is trained: `dithered`, `stochastic` or `nearest`. A frozen weight has no update to hide and
            is rounded to the nearest.

    Attributes:
        copies: by master.
    """

    def __init__(self, masters: Mapping[str, nn.Parameter], dtype: torch.dtype, rounding: str):
        self._names = {master: name for name, master in masters.items() if master.dtype == torch.float32}
        self._rounding = rounding
        self.copies = {
            master: torch.empty_like(master, dtype=dtype, memory_format=torch.contiguous_format)
            for master in self._names
        }
        self._round(self.copies, 0)

    def refresh(self, step: int) -> None:
        """Round the masters that are trained again, after `step` optimizer steps."""
        self._round((master for master in self.copies if master.requires_grad), step)

    @torch.no_grad()
    def _round(self, masters: Iterable[nn.Parameter], step: int) -> None:
        for master in masters:
            copy = self.copies[master]
            rounding = self._rounding if master.requires_grad else "nearest"
            rounded(master, copy.dtype, rounding, self._names[master], step=step, out=copy)


@torch.no_grad()
def rounded(
    weights: Tensor,
    dtype: torch.dtype,
    rounding: str,
    name: str,
    *,
    start: int = 0,
    step: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Weights in half precision.

    Args:
        weights: any shape: consecutive elements of a parameter. What is not fp32 has been rounded before.
        dtype: bfloat16 or float16.
        rounding: `dithered`, `stochastic` or `nearest`.
        name: of the parameter.
        start: index of the first of `weights` in the flattened parameter.
        step: optimizer steps taken; counts for `stochastic`.
        out: contiguous, of `dtype`; gets them, else a new tensor does.
    """
    if rounding == "nearest" or weights.dtype != torch.float32:
        return weights.to(dtype) if out is None else out.copy_(weights)
    key = f"{name} {step}" if rounding == "stochastic" else name
    offset = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") + start
    flat = weights.detach().reshape(-1)
    output = torch.empty_like(flat, dtype=dtype) if out is None else out.view(-1)
    thresholds, most = _thresholds(flat.device, _BITS[dtype])
    for first in range(0, len(flat), most):
        part = flat[first : first + most]
        place = (offset + first) % _PERIOD
        output[first : first + most] = _rounded(part, thresholds[place : place + len(part)], _BITS[dtype])
    return output.view(weights.shape)


def _rounded(weights: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """fp32 [n] on the grid of a type whose mantissa has `bits` bits less; thresholds [n] in units of the last bit."""
    # the magnitude's bits grow with it, so a carry from what is cut off goes to the neighbour
    integers = weights.view(torch.int32) + thresholds
    normal = integers.bitwise_and_(-(1 << bits)).view(torch.float32)
    if bits == _BITS[torch.bfloat16]:  # which has fp32's exponents
        return normal
    steps = (weights.abs() / _SMALLEST + thresholds * 2.0**-bits).floor_()
    return torch.where(weights.abs() < _SMALLEST_NORMAL, (steps * _SMALLEST).copysign(weights), normal)


@lru_cache(maxsize=4)
def _thresholds(device: torch.device, bits: int) -> tuple[Tensor, int]:
    """Thresholds in units of 2^-bits, one period and as many more as are used at a time, and that number.

    A period is a permutation of evenly spaced numbers, so that thresholds have no bias of their own.
    """
    keys = np.frombuffer(hashlib.shake_256(b"thresholds of weights").digest(8 * _PERIOD), dtype="<u8")
    order = np.empty(_PERIOD, np.int64)
    order[np.argsort(keys, kind="stable")] = np.arange(_PERIOD)
    period = ((2 * order + 1) << bits) // (2 * _PERIOD)
    most = _AT_A_TIME.get(device.type, _AT_A_TIME_ELSEWHERE)
    return torch.from_numpy(np.resize(period.astype(np.int32), _PERIOD + most)).to(device), most


class RoundedParts:
    """fp32 parts of parameters that an optimizer steps and DeepSpeed then copies into half precision.

    DeepSpeed copies with rounding to the nearest. As soon as the optimizer has stepped, its tensors are handed rounded
    values, which that copy leaves as they are, until `put_back`.

    Args:
        optimizer: the one that DeepSpeed calls.
        parts: by name of their parameter, as `engine/zero.py` finds them.
        dtype: that DeepSpeed copies to.
        rounding: `dithered` or `stochastic`.
    """

    def __init__(self, optimizer: Optimizer, parts: Iterable[tuple[str, HeldPart]], dtype: torch.dtype, rounding: str):
        self._parts: dict[Tensor, list[tuple[str, HeldPart]]] = {}
        for name, part in parts:
            self._parts.setdefault(part.flat, []).append((name, part))
        self._dtype, self._rounding, self._steps = dtype, rounding, 0
        self._masters: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_post_hook(lambda stepped, *_: self._hand_out(_stepped(stepped), self._steps + 1))

    def put_back(self, steps: int) -> None:
        """Have the optimizer's tensors hold the masters again, after so many optimizer steps."""
        for flat, master in self._masters:
            flat.data = master
        self._masters.clear()
        self._steps = steps

    @contextmanager
    def handed_out(self, steps: int) -> Iterator[None]:
        """While all tensors hold what they are rounded to after so many optimizer steps."""
        self._hand_out(self._parts, steps)
        try:
            yield
        finally:
            self.put_back(steps)

    @torch.no_grad()
    def _hand_out(self, flats: Iterable[Tensor], steps: int) -> None:
        for flat in flats:
            master = flat.data
            values = torch.zeros_like(master)
            for name, part in self._parts.get(flat, []):
                own = slice(part.offset, part.offset + part.length)
                values[own] = rounded(master[own], self._dtype, self._rounding, name, start=part.start, step=steps)
            self._masters.append((flat, master))
            flat.data = values


def _stepped(optimizer: Optimizer) -> list[Tensor]:
    """The tensors of the groups that DeepSpeed has the optimizer step now."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
