"""RMSNorm, SwiGLU and RoPE as single autograd nodes.

Left to autograd an RMSNorm is five operations forward and a dozen backward, each of which reads and writes the whole
hidden state, and a third of what a step keeps for its backward pass is their intermediate results. Inside they compute
in fp32, SwiGLU in its inputs' type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    Keeps x and one number a row.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        states = x.float()
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (states * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        grad, states = grad.float(), x.float()
        product = grad * states
        projection = (product @ weight).div_(x.shape[-1]).unsqueeze(-1).mul_(inverse).mul_(inverse)
        grad_x = (grad * weight).addcmul_(states, projection, value=-1).mul_(inverse)
        grad_weight = inverse.flatten() @ product.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x.to(x.dtype), grad_weight, None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 5). Keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


class _WideLinear(torch.autograd.Function):
    """x W^T + b in the type of x, of a frozen W in a narrower one. Keeps W as it is, and no copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class _Rope(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin: rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Keeps cos and sin, which all layers share.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        states = x.float()
        rotated = states * cos
        rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
        return rotated.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        states = grad.float()
        grad_x = states * cos
        grad_x[..., :half].addcmul_(states[..., half:], sin[..., half:])
        grad_x[..., half:].addcmul_(states[..., :half], sin[..., :half], value=-1)
        return grad_x.to(grad.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of [..., D] and fp32 [D], rounded to `dtype`."""
    return _RmsNorm.apply(x, weight, eps, dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    return _SwiGlu.apply(gate, up)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] with its two halves rotated into each other, in its type; fp32 cos and sin broadcast to it."""
    return _Rope.apply(x, cos, sin)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of [..., K], [N, K] and [N] in the type of x; W and b are frozen and in a narrower one."""
    return _WideLinear.apply(x, weight, bias)
