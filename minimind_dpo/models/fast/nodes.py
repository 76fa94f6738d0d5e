"""RMSNorm, SwiGLU and RoPE as single autograd nodes, and a last layer that works only where a logit is wanted.

Left to autograd an RMSNorm is five operations forward and a dozen backward, each of which reads and writes the whole
hidden state, and a third of what a step keeps for its backward pass is their intermediate results.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

_llama_rotary = modeling_llama.apply_rotary_pos_emb


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


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32:
        return type(self).forward(self, hidden_states)  # which decides where to round
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _swiglu_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    if not q.dtype == k.dtype == cos.dtype == torch.float32:
        return _llama_rotary(q, k, cos, sin, unsqueeze_dim)  # which decides where to round
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


class WantedRows:
    """Which rows of the hidden states a model's last layer works out.

    Attributes:
        positions: [S] ascending positions in the flattened rows; None for all.
    """

    positions: Tensor | None = None


def restrict_last_layer(model: PreTrainedModel) -> WantedRows:
    """Let the last layer work on the wanted rows only; its attention is told of them by a `wanted_rows` of its own.

    Past the last attention no token looks at another, so rows without a logit are of no use; left out they count 0.
    The keys and values of the last layer are made of all rows.
    """
    wanted = WantedRows()
    layers = getattr(model.get_decoder(), "layers", None)
    if layers:
        if hasattr(layers[-1], "self_attn"):
            layers[-1].self_attn.wanted_rows = wanted
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
            try:
                module = layers[-1].get_submodule(name)
            except AttributeError:
                continue
            module.forward = partial(_on_wanted_rows, wanted, module.forward)
    return wanted


def _on_wanted_rows(wanted: WantedRows, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if wanted.positions is None:
        return forward(x)
    rows = forward(x.flatten(0, -2)[wanted.positions][None])[0]
    output = rows.new_zeros(x.shape[:-1].numel(), rows.shape[-1])
    # unlike index_copy this keeps no copy of `rows` for the backward pass
    return output.index_put((wanted.positions,), rows).view(*x.shape[:-1], -1)


def fuse(model: PreTrainedModel) -> bool:
    """Give a model's modules the forms above where they compute just that: their own forward has Llama's source.

    Returns:
        Whether there were any.
    """
    kinds = {type(module) for module in model.modules()}
    norms, mlps = ({kind for kind in kinds if _same_forward(kind, wanted)} for wanted in (LlamaRMSNorm, LlamaMLP))
    for module in model.modules():
        if type(module) in norms:
            module.forward = MethodType(_rms_norm, module)
        elif type(module) in mlps and _is_silu(module.act_fn):
            module.forward = MethodType(_swiglu_mlp, module)
    for source in {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.")}:
        rotary = getattr(sys.modules[source], "apply_rotary_pos_emb", None)
        if rotary is not None and inspect.getsource(rotary) == inspect.getsource(_llama_rotary):
            vars(sys.modules[source])["apply_rotary_pos_emb"] = _rotary  # which an attention calls by this name
    return bool(norms)


def _same_forward(kind: type[nn.Module], wanted: type[nn.Module]) -> bool:
    """Whether two classes' forward methods are the same text; transformers copies them from model to model."""
    if not kind.__module__.startswith("transformers."):
        return False
    return inspect.getsource(kind.forward) == inspect.getsource(wanted.forward)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
