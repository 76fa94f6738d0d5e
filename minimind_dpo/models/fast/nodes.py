"""RMSNorm, SwiGLU and RoPE as single autograd nodes.

Left to autograd an RMSNorm is five operations forward and a dozen backward, each of which reads and writes the whole
hidden state, and a third of what a step keeps for its backward pass is their intermediate results.
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        product = grad * x
        projection = (product @ weight).div_(x.shape[-1]).unsqueeze(-1).mul_(inverse).mul_(inverse)
        grad_x = (grad * weight).addcmul_(x, projection, value=-1).mul_(inverse)
        grad_weight = inverse.flatten() @ product.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


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


class _Rope(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin: rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Keeps cos and sin, which all layers share.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        rotated = x * cos
        rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        grad_x = grad * cos
        grad_x[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        grad_x[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return grad_x, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of [..., D] and [D], all fp32."""
    return _RmsNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    return _SwiGlu.apply(gate, up)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] with its two halves rotated into each other; cos and sin [..., D] broadcast to it."""
    return _Rope.apply(x, cos, sin)
