"""LoRA's matrices and the weights that they add to, made one: for what is saved, or in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedConfig, PreTrainedModel

from minimind_dpo.engine.sharding import gathered
from minimind_dpo.models.adapters import ADAPTER, is_lora, lora_layers
from minimind_dpo.models.quantization import plain_shape, plain_values


def _plain(name: str) -> str:
    """A name in the adapted model as it is without adapters; layers with several adapted weights are wrapped twice."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _adapted_name(layer: Any) -> str:
    """The attribute of the base layer that the matrices add to."""
    return getattr(layer, "parameter_name", "weight")


class Weight(NamedTuple):
    """One weight of a model as it is saved: with LoRA, the base weight and what its matrices add.

    Attributes:
        name: of the weight in a model without adapters.
        parameter: the base weight.
        layer: the LoRA layer that adds to it, if one does.
    """

    name: str
    parameter: Parameter
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight."""
        return plain_shape(self.parameter)

    def parts(self) -> list[Tensor]:
        """The parameters that `value` reads."""
        return [self.parameter] if self.layer is None else [self.parameter, *self.layer.parameters()]

    def value(self) -> Tensor:
        """The weight to save, whole if its parts are; fp32 with what LoRA's matrices add, which rounding would lose."""
        weight = plain_values(self.parameter)
        if self.layer is None:
            return weight
        if (variant := self.layer.lora_variant.get(ADAPTER)) is not None:
            return variant.merge_safe(self.layer, ADAPTER, weight.float()).detach()
        return weight.float() + self.layer.get_delta_weight(ADAPTER).detach().float()


def _weights(model: PreTrainedModel) -> list[list[Weight]]:
    """The weights of `model` under their plain names; those in one list are one parameter."""
    adapted = {f"{_plain(name)}.{_adapted_name(layer)}": layer for name, layer in lora_layers(model)}
    shared: dict[int, list[Weight]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_lora(name):
            weight = Weight(_plain(name), parameter, adapted.get(_plain(name)))
            shared.setdefault(id(parameter), []).append(weight)
    return list(shared.values())


def _stays_tied(weights: list[Weight]) -> bool:
    """Whether the weights of one parameter are still one after merging."""
    return len({id(weight.layer) for weight in weights}) == 1


def merged_weights(model: PreTrainedModel) -> Iterator[Weight]:
    """Every weight of `model` under its plain name, LoRA matrices merged; a tied one once, unless they untie it."""
    for weights in _weights(model):
        yield from weights[:1] if _stays_tied(weights) else weights


def unties(model: PreTrainedModel) -> bool:
    """Whether LoRA matrices add to one of two weights that were tied (embedding and head), so that they part."""
    return not all(_stays_tied(weights) for weights in _weights(model))


def untie(config: PreTrainedConfig) -> None:
    """Have a configuration say that embedding and head are two weights."""
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Give every weight what LoRA matrices add to it and take them out, in place; all is trainable again."""
    if unties(model):
        untie(model.config)
        model.all_tied_weights_keys = {}
    for weights in _weights(model):
        tied = _stays_tied(weights)
        for weight in weights[:1] if tied else weights:
            if weight.layer is None:
                continue
            with gathered(weight.parts(), modify=True):
                value = weight.value().to(weight.parameter.dtype)
                if tied:
                    weight.parameter.copy_(value)
                else:
                    setattr(weight.layer.get_base_layer(), _adapted_name(weight.layer), Parameter(value))
    for name, layer in list(lora_layers(model)):
        if "base_layer" not in name.split("."):
            model.set_submodule(name, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    model.requires_grad_(True)
