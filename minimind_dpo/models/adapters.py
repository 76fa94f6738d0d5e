"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: small trained matrices beside frozen weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.engine.sharding import gathered, is_partitioned
from minimind_dpo.errors import UserError

ADAPTER = "default"
# peft's classes whose matrices add to one weight of the layer they stand beside
_LENGTHS = "lora_magnitude_vector"  # DoRA's, by peft's name
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
        if type(module).__name__ not in _MERGEABLE
        or module.lora_bias[ADAPTER]
        or _computes_more(module.get_base_layer())
    ]
    if wrong:
        raise UserError(
            f"lora_target_modules: LoRA matrices beside {', '.join(wrong)} could not be merged into model/ at the end. "
            "Name linear layers, embeddings or experts."
        )


def _computes_more(layer: nn.Module) -> bool:
    """Whether a kind of embedding does more than look its rows up: OPT's positions, beside which LoRA's are others.

    A scale, which Gemma 3 has, peft applies too.
    """
    is_own = isinstance(layer, nn.Embedding) and type(layer).forward is not nn.Embedding.forward
    return is_own and not hasattr(layer, "embed_scale")


def _widen(model: PreTrainedModel) -> None:
    """Make what is trained fp32: peft gives it the type of its layer, and measures DoRA's lengths in it."""
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return  # DeepSpeed steps fp32 copies of what it trains
    halves = False
    for name, parameter in model.named_parameters():
        if is_lora(name) and parameter.dtype != torch.float32:
            parameter.data, halves = parameter.data.float(), True
    for _, layer in lora_layers(model) if halves else ():
        if (variant := layer.lora_variant.get(ADAPTER)) is not None:
            variant.init(layer, adapter_name=ADAPTER)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether LoRA matrices were added."""
    return any(is_lora(name) for name, _ in model.named_parameters())


def lora_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Every layer that LoRA matrices were put beside, by its name in the adapted model, shared ones once a name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "lora_A"):
            yield name, module


def is_lora(name: str) -> bool:
    """Whether a parameter is one of LoRA's matrices; told by peft's name, since most runs never import peft."""
    return any(part.startswith("lora_") for part in name.split("."))


def attach_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Put the LoRA matrices of a directory that peft or a run wrote beside the weights of their base, in place.

    Raises:
        UserError: it is no LoRA, trains whole modules beside it, or does not fit the base.
    """
    from peft import PeftConfig  # late: see above

    config: Any = PeftConfig.from_pretrained(str(directory))
    if config.peft_type != "LORA" or config.modules_to_save:
        kind = f"modules_to_save {config.modules_to_save}" if config.peft_type == "LORA" else str(config.peft_type)
        raise UserError(
            f"{directory}: an adapter with {kind}; only LoRA matrices are read. Merge it into its base with peft "
            "(merge_and_unload, save_pretrained) and name that model"
        )
    layout_on_disk: Any = getattr(model, "_weight_conversions", None)
    try:
        info = model.load_adapter(str(directory), adapter_name=ADAPTER, is_trainable=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{directory}: this adapter cannot be put beside its base: {error}") from None
    model._weight_conversions = layout_on_disk  # of the base; it has the adapter file's now
    _check_mergeable(model)
    _widen(model)
    absent = _read_again(model, directory)
    named = [*info.missing_keys, *(key for key in info.unexpected_keys if "base_layer" not in key)]
    wrong = absent + [key for key in map(str, named) if _LENGTHS not in key]
    if wrong or info.mismatched_keys:
        raise UserError(f"{directory}: this adapter does not fit its base: {sorted(wrong)[:6]}")


def _read_again(model: PreTrainedModel, directory: Path) -> list[str]:
    """Take the values of an adapter's file as they are; the names of DoRA's lengths that are not in it.

    transformers rounds them to the base's type, and does not find those of DoRA.
    """
    from peft import load_peft_weights, set_peft_model_state_dict  # late: see above

    values = load_peft_weights(str(directory), device="cpu")
    plain = {name.removeprefix("base_model.model."): value for name, value in values.items()}
    with gathered([parameter for name, parameter in model.named_parameters() if is_lora(name)], modify=True):
        found: Any = set_peft_model_state_dict(model, plain, adapter_name=ADAPTER)
    return [name for name in found.missing_keys if _LENGTHS in name]


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
        if is_lora(name):
            with gathered([parameter], modify=True):
                parameter.copy_(reader.weight(name))
