"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: small trained matrices beside frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedConfig, PreTrainedModel

from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.engine.sharding import gathered, is_partitioned
from minimind_dpo.errors import UserError
from minimind_dpo.models.quantization import plain_shape, plain_values

ADAPTER = "default"
# peft's classes whose matrices add to one weight of the layer they stand beside
_MERGEABLE = ("Linear", "Linear4bit", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")


def add_adapters(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    base: str,
    seed: int,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> None:
    """Freeze `model` and put trainable fp32 LoRA matrices beside its linear layers, in place.

    Args:
        model: to adapt.
        r: rank of the matrices.
        alpha: their product is scaled by `alpha / r`.
        dropout: probability of dropping an input of theirs.
        target_modules: names of the linear layers, or the ends of their names; all except the output layer by default.
        base: where the model came from, noted for those who open the adapter.
        seed: of their start, the same on every rank.
        use_dora: train the length of each weight's rows apart from their direction (DoRA, arXiv:2402.09353).
        use_rslora: scale by `alpha / sqrt(r)` instead (rsLoRA, arXiv:2312.03732).

    Raises:
        UserError: no layer of the model has such a name, or what was added could not be merged into the weights.
    """
    from peft import LoraConfig  # late: a second, for runs with LoRA only

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        target_modules=list(target_modules) or "all-linear",
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            stacked = "; stacked experts have neither lora_dropout nor use_dora" if "ParamWrapper" in str(error) else ""
            raise UserError(f"lora_target_modules: {error}{stacked}") from None
    config.base_model_name_or_path = base  # `add_adapter` has put its own there
    _check_mergeable(model)
    _widen(model)


def _check_mergeable(model: PreTrainedModel) -> None:
    """Refuse layers whose weight and what is added to it cannot become one weight."""
    wrong = [
        f"{name} ({type(module.get_base_layer()).__name__})"
        for name, module in lora_layers(model)
        if type(module).__name__ not in _MERGEABLE or module.lora_bias[ADAPTER]
    ]
    if wrong:
        raise UserError(
            f"lora_target_modules: LoRA matrices beside {', '.join(wrong)} could not be merged into model/ at the end. "
            "Name linear layers, embeddings or experts."
        )


def _widen(model: PreTrainedModel) -> None:
    """Make what is trained fp32: peft gives it the type of its layer, and measures DoRA's lengths in it."""
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return  # DeepSpeed steps fp32 copies of what it trains
    halves = False
    for name, parameter in model.named_parameters():
        if _is_lora(name) and parameter.dtype != torch.float32:
            parameter.data, halves = parameter.data.float(), True
    for _, layer in lora_layers(model) if halves else ():
        if (variant := layer.lora_variant.get(ADAPTER)) is not None:
            variant.init(layer, adapter_name=ADAPTER)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether LoRA matrices were added."""
    return any(_is_lora(name) for name, _ in model.named_parameters())


def lora_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Every layer that LoRA matrices were put beside, by its name in the adapted model, shared ones once a name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "lora_A"):
            yield name, module


def _is_lora(name: str) -> bool:
    """Whether a parameter is one of LoRA's matrices; told by peft's name, since most runs never import peft."""
    return any(part.startswith("lora_") for part in name.split("."))


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
        if not _is_lora(name):
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


@torch.no_grad()
def restore_adapters(model: PreTrainedModel, directory: Path, reader: FragmentReader) -> None:
    """Put the LoRA matrices of a checkpoint beside the weights of the base model they were trained beside, in place.

    Args:
        model: the base model.
        directory: of the checkpoint, with the configuration of its matrices.
        reader: of the checkpoint.
    """
    from peft import LoraConfig  # late: see above

    model.add_adapter(LoraConfig.from_pretrained(str(directory)), adapter_name=ADAPTER)
    _widen(model)
    for name, parameter in model.named_parameters():
        if _is_lora(name):
            with gathered([parameter], modify=True):
                parameter.copy_(reader.weight(name))
