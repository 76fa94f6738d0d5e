"""Which modules of a model compute what an autograd node does, and the forward passes that use it.

A norm, a feed-forward block or a rotary embedding gets its node (`models/fast/nodes.py`) where its own forward pass has
the source of Llama's, which transformers copies from model to model. Nothing here changes a module: that is
`models/fast/patch.py`'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from minimind_dpo.engine import transfer
from minimind_dpo.models.fast import nodes_gpu
from minimind_dpo.models.fast.nodes import rms_norm, rope, swiglu, wide_linear
from minimind_dpo.models.fast.precision import product_type

_ROTARY = "apply_rotary_pos_emb"  # what transformers' attention modules call the function


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether a `Patch` would find norms to replace; changes nothing."""
    return any(_same_source(kind.forward, LlamaRMSNorm.forward) for kind in {type(m) for m in model.modules()})


def fused_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Modules that compute what a node computes, each with the forward pass that uses it."""
    kinds = {type(module) for module in model.modules()}
    norms, mlps = (
        {kind for kind in kinds if _same_source(kind.forward, llama.forward)} for llama in (LlamaRMSNorm, LlamaMLP)
    )
    rotating = {kind: forward for kind in kinds if (forward := _with_fused_rotary(kind.forward)) is not None}
    before_linear = set(_norms_before_linear(model))
    for module in model.modules():
        if type(module) in norms:
            yield module, MethodType(_rms_norm_before_linear if module in before_linear else _rms_norm, module)
        elif type(module) in mlps and _is_silu(module.act_fn):
            yield module, MethodType(_swiglu_mlp, module)
        elif type(module) in rotating:
            yield module, MethodType(rotating[type(module)], module)


def widened_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Embeddings and linear layers whose frozen weights are in half precision, with forward passes that stay in fp32.

    A LoRA base is kept in half precision to save memory; computed with in it, the residual stream would round away what
    LoRA's first updates add. Only for models that have no other kinds of layers but norms with Llama's source.
    """
    narrow = [module for module in model.modules() if any(_is_narrow(p) for p in module.parameters(recurse=False))]
    if not all(_can_widen(module) for module in narrow):
        return
    for module in narrow:
        if isinstance(module, nn.Embedding):
            yield module, MethodType(_wide_embedding, module)
        elif type(module) is nn.Linear:
            yield module, MethodType(_wide_linear, module)


def _is_narrow(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16) and not parameter.requires_grad


def _can_widen(module: nn.Module) -> bool:
    known = isinstance(module, nn.Embedding) or type(module) is nn.Linear
    return known or _same_source(type(module).forward, LlamaRMSNorm.forward)


def _norms_before_linear(model: nn.Module) -> Iterator[Any]:
    """The norms whose output nothing but linear layers reads: those of layers with the source of Llama's."""
    for module in model.modules():
        if _same_source(type(module).forward, LlamaDecoderLayer.forward):
            yield from (module.input_layernorm, module.post_attention_layernorm)


def _with_fused_rotary(forward: Any) -> FunctionType | None:
    """A copy of an attention module's forward function that sees the node where it calls for the rotary embedding.

    None where it calls for none, or for another than Llama's.
    """
    if (
        not isinstance(forward, FunctionType)
        or hasattr(forward, "__wrapped__")
        or _ROTARY not in forward.__code__.co_names
    ):
        return None
    names = forward.__globals__
    llama = vars(modeling_llama)
    if not all(name in names and _same_source(names[name], llama[name]) for name in (_ROTARY, "rotate_half")):
        return None
    fused = FunctionType(
        forward.__code__, names | {_ROTARY: _rotary}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _same_source(function: Any, llama: Any) -> bool:
    """Whether two functions are the same text, as far as transformers copies them from model to model."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("transformers."):
        return False
    return inspect.getsource(function) == inspect.getsource(llama)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    if transfer.on_gpu(hidden_states):
        return _gpu_rms_norm(self, hidden_states)
    if self.weight.dtype != torch.float32:
        return type(self).forward(self, hidden_states)  # which decides where to round
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _rms_norm_before_linear(self: Any, hidden_states: Tensor) -> Tensor:
    """Rounded once under autocast, where each linear layer would round, and keep, the norm's output for itself."""
    if transfer.on_gpu(hidden_states):
        rounded = product_type(hidden_states) if torch.is_autocast_enabled("cuda") else None
        return _gpu_rms_norm(self, hidden_states, rounded)
    if self.weight.dtype != torch.float32:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, product_type(hidden_states))


def _gpu_rms_norm(self: Any, hidden_states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return nodes_gpu.rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)


def _swiglu_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _wide_embedding(self: Any, ids: Tensor) -> Tensor:
    return type(self).forward(self, ids).float()


def _wide_linear(self: Any, x: Tensor) -> Tensor:
    if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, self.weight, self.bias)
    return wide_linear(x, self.weight, self.bias)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    if transfer.on_gpu(q) and unsqueeze_dim == 1:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return nodes_gpu.rope(q, k, cos, sin, product_type(q))
    if cos.dtype != torch.float32 or not q.dtype == k.dtype == product_type(q):
        # which decides where to round
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rope(q, cos, sin), rope(k, cos, sin)
