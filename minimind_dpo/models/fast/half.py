"""Half-precision copies in the places of the weights that products use, while a batch is scored.

The engine rounds them from their fp32 masters once an optimizer step (`engine/rounding.py`); left to autocast, each
call of a layer would round its weights again, and to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_NO_PRODUCTS = (nn.Embedding, nn.modules.conv._ConvNd)


def product_places(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Modules and the names of their parameters that autocast would round: those of linear layers, routers, experts.

    But for those that peft's LoRA adds to in their own place, as it does beside routers and stacked experts: it refuses
    a module that has something else there.
    """
    wrappers: list[Any] = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    taken = {(wrapper.get_base_layer(), wrapper.parameter_name) for wrapper in wrappers}
    for module in model.modules():
        if isinstance(module, _NO_PRODUCTS):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if (module, name) in taken:
                continue
            is_matrix = parameter.dim() == 3 or (parameter.dim() == 2 and name == "weight")
            if parameter.is_floating_point() and (is_matrix or isinstance(module, (nn.Linear, Conv1D))):
                yield module, name


def product_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters at `product_places`, under the names that the model itself has for them."""
    wanted = {id(getattr(module, name)) for module, name in product_places(model)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


class _OfMaster(torch.autograd.Function):
    """A master's copy; its gradient is the master's, in the master's type."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


def shadowed(model: PreTrainedModel, copies: Mapping[nn.Parameter, Tensor]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Modules, names of their parameters, and the copies to find there instead; gradients go to the parameters."""
    for module, name in product_places(model) if copies else ():
        master: Any = module._parameters[name]
        if master in copies:
            yield module, name, _OfMaster.apply(master, copies[master])
