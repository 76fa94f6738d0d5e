"""RMSNorm and RoPE as single autograd nodes of few kernels: on a GPU a small model's step waits for their launches.

Inside they compute in fp32, whatever the types they take and give, and round once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) by torch's own kernels. Keeps x and one number a row."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        states, scale = _alike(x, weight)
        output, inverse = torch.ops.aten._fused_rms_norm(states, list(weight.shape), scale, eps)
        ctx.save_for_backward(x, weight, inverse)
        return output.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        states, scale = _alike(x, weight)
        wanted = ctx.needs_input_grad[:2]
        gradients = torch.ops.aten._fused_rms_norm_backward(
            grad.to(states.dtype), states, list(weight.shape), inverse, scale, wanted
        )
        zipped = zip(gradients, (x, weight), wanted, strict=True)
        return *(gradient.to(own.dtype) if want else None for gradient, own, want in zipped), None, None


def _alike(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, as the kernels want them."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype), weight.to(dtype)


class _Rope(torch.autograd.Function):
    """Queries and keys, x * cos + rotate_half(x) * sin each, at once (arXiv:2104.09864, eq. 34). Keeps cos and sin."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = query.dtype, key.dtype
        return _turned(query, key, cos, sin, dtype, back=False)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_query: Tensor, grad_key: Tensor
    ) -> tuple[Tensor | None, ...]:
        (cos, sin), dtype = ctx.saved_tensors, torch.promote_types(*ctx.dtypes)
        turned = _turned(grad_query, grad_key, cos, sin, dtype, back=True)
        return *(states.to(own) for states, own in zip(turned, ctx.dtypes, strict=True)), None, None, None


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> tuple[Tensor, ...]:
    """Query and key [1, heads, T, D] turned, or their gradients turned back, as views of one [1, T, all heads, D]."""
    states = torch.cat([query.transpose(1, 2), key.transpose(1, 2)], dim=2)
    cos, sin = (angles.transpose(1, 2).float() for angles in (cos, sin))
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    scaled, output = states * cos, torch.empty_like(states, dtype=dtype)
    sines, sign = ((sin[..., half:], sin[..., :half]), 1) if back else ((sin[..., :half], sin[..., half:]), -1)
    torch.addcmul(scaled[..., :half], second, sines[0], value=sign, out=output[..., :half])
    torch.addcmul(scaled[..., half:], first, sines[1], value=-sign, out=output[..., half:])
    return tuple(part.transpose(1, 2) for part in output.split([query.shape[1], key.shape[1]], dim=2))


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of [..., D] and [D], rounded to `dtype`."""
    return _RmsNorm.apply(x, weight, eps, dtype)


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query and key [1, heads, T, D] with their two halves rotated into each other; cos and sin [1, 1, T, D]."""
    return _Rope.apply(query, key, cos, sin, dtype)
