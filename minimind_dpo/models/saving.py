"""Models written as `save_pretrained` writes them, but a shard at a time, so that no rank ever holds a whole one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from minimind_dpo.engine.sharding import gathered
from minimind_dpo.errors import UserError
from minimind_dpo.files import checksum, read_sealed, sealed
from minimind_dpo.models.adapters import ADAPTER, has_adapters
from minimind_dpo.models.bases import write_base
from minimind_dpo.models.merging import merged_weights, untie, unties

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
SHARD_BYTES = 4 << 30
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name
Sized = TypeVar("Sized")


def save_model(model: PreTrainedModel, directory: Path | None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write configuration and weights; if the model is sharded between ranks, all of them must call it.

    LoRA is merged, and then all weights are plain fp32 ones, whatever the type of the base.

    Args:
        model: to write.
        directory: existing; None on ranks that only help to gather.
        shard_bytes: about the size of a file.
    """
    merged = torch.float32 if has_adapters(model) else None
    weights = list(merged_weights(model))
    sized = [(w, prod(w.shape) * (merged or w.parameter.dtype).itemsize) for w in weights]
    shards = split_shards(sized, shard_bytes)

    def shard_tensors() -> Iterator[dict[str, Tensor]]:
        for shard in shards:
            tensors = {}
            for weight in shard:
                with gathered(weight.parts()):
                    if directory is not None:
                        value = weight.value()
                        tensors[weight.name] = value.to("cpu", merged or value.dtype, copy=True).contiguous()
            yield tensors

    write_shards(model, shard_tensors(), len(shards), directory)
    if directory is not None:
        describe_model(model, directory)


def split_shards(sized: Iterable[tuple[Sized, int]], shard_bytes: int) -> list[list[Sized]]:
    """Group items, in order, so that a group's bytes pass `shard_bytes` by less than its last item."""
    shards: list[list[Sized]] = [[]]
    total = 0
    for item, size in sized:
        if total >= shard_bytes:
            shards.append([])
            total = 0
        shards[-1].append(item)
        total += size
    return shards


def write_shards(
    model: PreTrainedModel, shards: Iterable[dict[str, Tensor]], count: int, directory: Path | None
) -> None:
    """Write `count` safetensors files under the hub's names, with an index if there are several.

    Args:
        model: whose class tells how its tensors are laid out on disk.
        shards: named tensors of each file; only one is alive at a time.
        count: of the files.
        directory: existing; None only walks through `shards`.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        if directory is None:
            continue
        name = SAFE_WEIGHTS_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        on_disk = {key: tensor.contiguous() for key, tensor in revert_weight_conversion(model, tensors).items()}
        save_file(on_disk, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(on_disk, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in on_disk.values())
    if directory is not None and count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def seal_model(directory: Path) -> None:
    """Write down the checksum of every file of a saved model, for `check_sealed`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {path.relative_to(directory).as_posix(): checksum(path) for path in files}
    (directory / CHECKSUMS).write_text(sealed(sums), "utf-8")


def check_sealed(directory: Path) -> None:
    """Compare a saved model with its checksums, where it has them; settings that differ may be meant, and are told.

    Raises:
        UserError: weights are missing, or not what was written.
    """
    if not (directory / CHECKSUMS).is_file():
        return
    remedy = f"write it again, or remove {directory / CHECKSUMS} if you changed it yourself"
    try:
        sums = read_sealed(directory / CHECKSUMS)
        wrong = [name for name, found in sums.items() if not (directory / name).is_file()]
        wrong += [name for name, found in sums.items() if name not in wrong and checksum(directory / name) != found]
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: its checksums can't be read ({error}); {remedy}") from None
    if weights := [name for name in wrong if name.endswith((".safetensors", SAFE_WEIGHTS_INDEX_NAME))]:
        raise UserError(f"{directory}: {', '.join(weights)}: damaged, or missing; {remedy}")
    if wrong:
        logger.warning("%s: %s: not what was written; %s", directory, ", ".join(wrong), remedy)


def describe_model(model: PreTrainedModel, directory: Path) -> None:
    """Write all that a saved model has beside its weights: configurations, and code that came with it."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32 if has_adapters(model) else model.dtype  # as `save_model` writes them
    if unties(model):
        untie(config)
    if model._auto_class is not None:
        custom_object_save(model, directory, config=config)  # type: ignore[arg-type]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def save_adapter(model: PreTrainedModel, directory: Path | None) -> None:
    """Write the LoRA matrices alone, as peft opens them; ranks that only help to gather give no directory."""
    from peft import get_peft_model_state_dict  # late: a second, for runs with LoRA only

    with gathered([parameter for name, parameter in model.named_parameters() if "lora_" in name]):
        if directory is not None:
            # without the base's embeddings, which peft would add where they are adapted, and which may be tied
            state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
            tensors = {f"base_model.model.{name}": tensor.to("cpu").contiguous() for name, tensor in state.items()}
            save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            describe_adapter(model, directory)


def describe_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Write what LoRA matrices a model has, if it has any, as peft's configuration."""
    if has_adapters(model):
        model.peft_config[ADAPTER].save_pretrained(directory)
        write_base(model, directory)
