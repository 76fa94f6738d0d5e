"""Frozen linear layers in 4 bits: NF4 with double quantisation, of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

A weight takes 4.127 bits (`BYTES`): an index into 16 values, an 8-bit scale for each 64 weights, and an fp32 one for
each 256 of those. Layers are bitsandbytes'. Embeddings, norms and the output layer stay as they are, as in
transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minimind_dpo.engine.optimizers import bitsandbytes
from minimind_dpo.engine.sharding import full_shape

BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def quantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on the CPU by 4-bit ones that compute in `dtype`, one at a time, in place.

    It is done on the CPU whatever the run's device, so that a resume and an export come to the same bits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    package = bitsandbytes("quantization: nf4")
    for name, module in quantizable(model).items():
        model.set_submodule(name, _four_bits(package, module, dtype))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that `quantize` replaces, by name."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}


def dequantize(model: PreTrainedModel) -> None:
    """Undo `quantize`, with the weights that the 4-bit layers computed with, in fp32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight, plain.bias = nn.Parameter(plain_values(module.weight).float()), module.bias
            model.set_submodule(name, plain)
    model.is_loaded_in_4bit = False  # type: ignore[assignment]


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds 4-bit indices."""
    return getattr(parameter, "quant_state", None) is not None


def plain_values(parameter: Any) -> Tensor:
    """A parameter's values without gradient, dequantised if need be, in the type that products use."""
    if not is_quantized(parameter):
        return parameter.detach()
    return bitsandbytes("quantization: nf4").functional.dequantize_4bit(parameter.data, parameter.quant_state)


def plain_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter's values, whole."""
    return tuple(parameter.quant_state.shape) if is_quantized(parameter) else full_shape(parameter)


def _four_bits(package: Any, linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        layer = package.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
    weight = package.nn.Params4bit(linear.weight.detach(), quant_type="nf4", module=layer)
    layer.weight, layer.bias = weight.to("cpu"), linear.bias  # quantises
    # Else a pass without gradients on such a CPU lays the weight out anew, in a form that no backward pass reads.
    layer.support_avx512bf16_for_cpu = False
    return layer.requires_grad_(False)
