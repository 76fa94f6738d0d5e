"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: small trained matrices beside frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.engine.sharding import gathered, is_partitioned
from minimind_dpo.errors import UserError
from minimind_dpo.models.quantization import plain_shape, plain_values

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"


def add_adapters(
    model: PreTrainedModel, *, r: int, alpha: float, dropout: float, target_modules: Sequence[str], base: str, seed: int
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

    Raises:
        UserError: no layer of the model has such a name.
    """
    from peft import LoraConfig  # late: a second, for runs with LoRA only

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        target_modules=list(target_modules) or "all-linear",
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"lora_target_modules: {error}") from None
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return  # DeepSpeed steps fp32 copies of what it trains
    for name, parameter in model.named_parameters():
        if _is_lora(name):  # peft gives them the type of their layer
            parameter.data = parameter.data.float()


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether LoRA matrices were added."""
    return any(_is_lora(name) for name, _ in model.named_parameters())


def _is_lora(name: str) -> bool:
    """Whether a parameter is one of LoRA's matrices; told by peft's name, since most runs never import peft."""
    return any(part.startswith("lora_") for part in name.split("."))


class Weight(NamedTuple):
    """One weight of a model as it is saved: with LoRA, the base weight and what its matrices add.

    Attributes:
        name: of the weight in a model without adapters.
        parameter: the base weight.
        layer: the LoRA layer that adds to it, if one does.
    """

    name: str
    parameter: Parameter
    layer: LoraLayer | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight."""
        return plain_shape(self.parameter)

    def parts(self) -> list[Tensor]:
        """The parameters that `value` reads."""
        if self.layer is None:
            return [self.parameter]
        return [self.parameter, *self.layer.lora_A.parameters(), *self.layer.lora_B.parameters()]

    def value(self) -> Tensor:
        """The weight to save, whole if its parts are; fp32 with what LoRA's matrices add, which rounding would lose."""
        weight = plain_values(self.parameter)
        if self.layer is None:
            return weight
        delta = self.layer.get_delta_weight(ADAPTER).detach()  # type: ignore[attr-defined]
        return weight.float() + delta.float()


def merged_weights(model: PreTrainedModel) -> Iterator[Weight]:
    """Every weight of `model` under its plain name, a tied one once; LoRA matrices are merged into theirs."""
    adapted = {
        f"{name}.base_layer.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    for name, parameter in model.named_parameters():
        if not _is_lora(name):
            yield Weight(name.replace(".base_layer.", "."), parameter, adapted.get(name))  # type: ignore[arg-type]


def merge_adapters(model: PreTrainedModel, reader: FragmentReader, scaling: float) -> None:
    """Add the LoRA matrices of a checkpoint to the weights of the base model they were trained beside, in place.

    Args:
        model: the base model.
        reader: of the checkpoint.
        scaling: of the matrices' product: alpha / r.
    """
    ends = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")
    for name in reader.shapes:
        if name.endswith(ends[0]):
            layer = name.removesuffix(ends[0])
            weight = model.get_parameter(f"{layer}.weight")
            delta = reader.weight(layer + ends[1]) @ reader.weight(name) * scaling
            with torch.no_grad(), gathered([weight], modify=True):
                weight.copy_(weight.float() + delta)
