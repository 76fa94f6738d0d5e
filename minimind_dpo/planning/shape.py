"""The sizes of a model, read from its configuration or its raw weights' shapes; no weight is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from minimind_dpo.config.names import is_raw_weights
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.fast.fusing import can_fuse
from minimind_dpo.models.fast.half import product_weights
from minimind_dpo.models.minimind import MiniMindMoeBlock
from minimind_dpo.models.places import adapter_base, is_adapter, locate_model
from minimind_dpo.models.quantization import quantizable
from minimind_dpo.models.raw import read_raw_weights
from minimind_dpo.models.weights import MODEL_CLASSES, minimind_config, read_layout


@dataclass(frozen=True)
class ModelShape:
    """Numbers of elements, as far as memory depends on them.

    Attributes:
        parameters: elements of each weight; a tied one counts once.
        adapters: elements of each LoRA matrix, none without LoRA.
        layers: of the decoder.
        hidden: size of the residual stream.
        heads: query heads.
        query: rows of all query heads together.
        key_value: rows of all key heads together; as many of the value heads.
        intermediate: inner size of a feed-forward block or of one expert.
        dense_blocks: feed-forward blocks every token passes: 1, or the shared experts.
        routed: experts a token is sent to, 0 in a dense model.
        gated: whether feed-forward blocks have a gate beside the first matrix.
        normed_heads: whether queries and keys are normalised.
        fused: whether norms and feed-forward blocks are computed by `models/fast/nodes.py`.
        vocab: tokens that the output layer scores.
        stored: bytes of an element in the source: 4 fp32, 2 half precision.
        lora_r: rank of the LoRA matrices, 0 without.
        linear: elements of each weight that quantisation takes: of linear layers but the output layer.
        products: elements of each weight that half-precision products have a copy of (`models/fast/half.py`).
        factors: elements that Adafactor keeps of each trained weight: rows and columns of a matrix.
        whole_experts: experts of a layer that on a GPU take every token, MiniMind's; else 0.
    """

    parameters: tuple[int, ...]
    adapters: tuple[int, ...]
    layers: int
    hidden: int
    heads: int
    query: int
    key_value: int
    intermediate: int
    dense_blocks: int
    routed: int
    gated: bool
    normed_heads: bool
    fused: bool
    vocab: int
    stored: int = 4
    lora_r: int = 0
    linear: tuple[int, ...] = ()
    products: tuple[int, ...] = ()
    factors: tuple[int, ...] = ()
    whole_experts: int = 0

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(self.parameters)

    @property
    def trained(self) -> tuple[int, ...]:
        """Elements of each weight that is trained."""
        return self.adapters or self.parameters


def read_shape(source: str, num_attention_heads: int | None = None, lora_r: int | None = None) -> ModelShape:
    """The sizes of the model that `source` names: a directory or its config.json, a hub id, a .pth or a .gguf file.

    With `lora_r` also those of the LoRA matrices of that rank beside all linear layers.

    Raises:
        UserError: no model is there, or it cannot be read.
    """
    config, stored = read_config(source, num_attention_heads)
    return shape_of(_meta_model(config, source), stored, lora_r)


def read_config(source: str, num_attention_heads: int | None = None) -> tuple[PreTrainedConfig, int]:
    """The configuration of the model that `source` names, and the bytes of a stored element."""
    if Path(source).name == "config.json":
        source = str(Path(source).parent)
    location = locate_model(source)
    if location is not None and is_adapter(location):
        return read_config(adapter_base(location), num_attention_heads)
    if location is not None and is_raw_weights(location):
        state = read_raw_weights(location)
        layout = read_layout({key: tuple(tensor.shape) for key, tensor in state.items()}, source)
        config = minimind_config(layout, num_attention_heads, source)
        return config, next(iter(state.values())).element_size()
    if num_attention_heads is not None:
        raise UserError(f"num_attention_heads: {source} has a configuration that says it; leave the flag out")
    path = Path(source) if location is None else location
    name, files = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
    try:
        config = AutoConfig.from_pretrained(name, **files)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: transformers can't read this model's configuration: {error}") from None
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return config, dtype.itemsize


def _meta_model(config: PreTrainedConfig, source: str) -> PreTrainedModel:
    """The model without memory behind its weights."""
    own = {pair[0]: pair[1] for pair in MODEL_CLASSES.values()}
    try:
        with torch.device("meta"):
            if type(config) in own:
                return own[type(config)]._from_config(config)
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise UserError(f"{source}: not a causal language model that transformers builds: {error}") from None


def shape_of(model: PreTrainedModel, stored: int = 4, lora_r: int | None = None) -> ModelShape:
    """The sizes of a model on any device; with `lora_r` LoRA matrices are added to it."""
    model.tie_weights()
    linear = tuple(module.weight.numel() for module in quantizable(model).values())
    parameters = tuple(parameter.numel() for parameter in model.parameters())
    products = tuple(parameter.numel() for parameter in product_weights(model).values())
    names = [name for name, _ in model.named_parameters()]
    adapters: tuple[int, ...] = ()
    if lora_r is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of patterns that are for other models
            add_adapters(model, r=lora_r, alpha=1, dropout=0.0, target_modules=[], base="", seed=0)
        adapters = tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return ModelShape(
        parameters=parameters,
        adapters=adapters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        query=heads * head_dim,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        intermediate=(getattr(config, "moe_intermediate_size", None) or dense) if experts else dense,
        dense_blocks=(getattr(config, "num_shared_experts", None) or 0) if experts else 1,
        routed=config.num_experts_per_tok if experts else 0,
        gated=any("gate_proj" in name or "gate_up_proj" in name for name in names),
        normed_heads=any("q_norm" in name for name in names),
        fused=can_fuse(model),
        vocab=config.vocab_size,
        stored=stored,
        lora_r=lora_r or 0,
        linear=linear,
        products=products,
        whole_experts=experts if any(isinstance(module, MiniMindMoeBlock) for module in model.modules()) else 0,
        factors=tuple(_factors(parameter) for parameter in model.parameters() if parameter.requires_grad),
    )


def _factors(parameter: torch.Tensor) -> int:
    """Elements of Adafactor's state of a parameter."""
    if parameter.dim() < 2:
        return parameter.numel()
    *outer, rows, columns = parameter.shape
    return prod(outer) * (rows + columns)
