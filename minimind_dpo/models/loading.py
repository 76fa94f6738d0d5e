"""One way in for every model: `load_model`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from minimind_dpo.checkpoints.directory import checkpoint_problem
from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.checkpoints.state import read_state
from minimind_dpo.config.names import is_raw_weights
from minimind_dpo.engine.sharding import gathered, local_values
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import ADAPTER, attach_adapter, restore_adapters
from minimind_dpo.models.bases import AdapterBase, note_base, read_base
from minimind_dpo.models.digest import weights_digest
from minimind_dpo.models.merging import merge_adapters
from minimind_dpo.models.overrides import apply_overrides, check_overrides, parse_dtype
from minimind_dpo.models.places import (
    ADAPTER_CONFIG,
    absolute_source,
    adapter_base,
    is_adapter,
    is_checkpoint,
    locate_model,
)
from minimind_dpo.models.quantization import dequantize, quantize
from minimind_dpo.models.raw import load_raw
from minimind_dpo.models.saving import check_sealed
from minimind_dpo.models.weights import summarize


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    num_attention_heads: int | None = None,
    trust_remote_code: bool = False,
    **overrides,
) -> PreTrainedModel:
    """Load a causal language model from any source, strictly and on the CPU, in eval mode.

    Args:
        path: a run directory of `minimind-dpo train` (its `model/` is taken), one of its checkpoints, a directory
            with LoRA matrices (merged into their base), a `save_pretrained` directory, a hub id, MiniMind's raw
            weights (`*.pth`, either generation, dense or mixture of experts) or a `.gguf` file.
        dtype: of the weights: `float32`, `float16`, `bfloat16` or `auto` (the source's own).
        attn_implementation: a name known to transformers or registered with its AttentionInterface.
        num_attention_heads: raw weights only. Generation 2 does not tell its heads; MiniMind's default is 8.
        trust_remote_code: run model code that comes with a directory or hub id.
        **overrides: settings of the configuration, those of `CONFIG_OVERRIDES`.

    Returns:
        The model. MiniMind's raw weights become Llama (generation 2), Qwen3 or Qwen3-MoE (generation 3) or
        `MiniMindMoeForCausalLM` (generation 2 mixture of experts), and `config.minimind_generation` keeps the
        generation, also when the model is saved and loaded again.

    Raises:
        UserError: nothing is there, a weight is missing, unexpected, of a wrong shape or not finite, an
            override is unknown or does not fit the model.
    """
    check_overrides(overrides)
    wanted = parse_dtype(dtype)
    location = locate_model(str(path))
    if location is not None and is_checkpoint(location):
        model = _load_checkpoint(location, wanted, attn_implementation, trust_remote_code, overrides)
    elif location is not None and is_adapter(location):
        model = _load_merged(location, wanted, attn_implementation, trust_remote_code, overrides)
    elif location is not None and is_raw_weights(location):
        model = load_raw(location, wanted, attn_implementation, num_attention_heads, overrides)
    elif num_attention_heads is not None:
        raise UserError(
            f"{path}: num_attention_heads is for MiniMind's raw weights (*.pth) only; this model's "
            "configuration has its own. Leave the setting out."
        )
    else:
        options = {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
        model = _load_pretrained(str(location or path), wanted, options, overrides)
    _check_finite(model, str(path))
    return model.eval()


def checkpoint_config(location: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the model in a checkpoint."""
    return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)


def load_adapted(location: Path, dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    """Load a base with its LoRA matrices beside it, from a checkpoint or from what peft or a run wrote.

    Args:
        location: the directory.
        dtype: of the base if nothing says in which type it was trained beside; None for its own.
        **options: of `load_model`.

    Raises:
        UserError: the base is not there, or is not the one that the matrices were trained beside.
    """
    check_sealed(location)
    name, noted = adapter_base(location), read_base(location)
    base = noted or _base_before(location)
    if is_raw_weights(Path(name)) and base.num_attention_heads is not None:
        options["num_attention_heads"] = base.num_attention_heads
    model = load_model(name, dtype=base.dtype or dtype or "auto", **options)
    if base.quantization != "none":  # LoRA's matrices were trained beside the rounded weights
        quantize(model, model.dtype)
    digest = weights_digest(model)
    if base.digest not in (None, digest):
        raise UserError(
            f"{location}: its LoRA matrices were trained beside other weights than {name} has now. Bring those back, "
            "or take the run's model/, which has both"
        )
    dequantize(model)
    if base.dtype is not None:
        model.float()
    if is_checkpoint(location):
        restore_adapters(model, location, FragmentReader(location))
    else:
        attach_adapter(model, location)
    model.peft_config[ADAPTER].base_model_name_or_path = absolute_source(name)
    note_base(model, dataclasses.replace(base, digest=digest))
    return model


def _load_merged(
    location: Path, dtype: torch.dtype | None, attn_implementation: str | None, trust_remote_code: bool, overrides: dict
) -> PreTrainedModel:
    """Load a base with the LoRA matrices of a directory merged into it."""
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    model = load_adapted(location, dtype, **options, **overrides)
    merge_adapters(model)
    return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]


def _base_before(location: Path) -> AdapterBase:
    """What can be known of a base that nothing was noted of."""
    if not is_checkpoint(location):
        return AdapterBase()
    run = read_state(location).identity
    heads = getattr(checkpoint_config(location), "num_attention_heads", None)
    return AdapterBase(None, run.get("dtype"), run.get("quantization", "none"), heads)


def _load_checkpoint(
    location: Path, dtype: torch.dtype | None, attn_implementation: str | None, trust_remote_code: bool, overrides: dict
) -> PreTrainedModel:
    """Build the policy as a run had it at a step, LoRA merged, from the fragments its ranks wrote."""
    if problem := checkpoint_problem(location):
        raise UserError(f"{location}: {problem}")
    reader = FragmentReader(location)
    config = checkpoint_config(location, trust_remote_code)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    if (location / ADAPTER_CONFIG).is_file():
        return _load_merged(location, dtype, attn_implementation, trust_remote_code, overrides)
    apply_overrides(config, overrides, str(location))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype, **options)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if name not in reader.shapes:
            raise UserError(f"{location}: this checkpoint holds no {name}; was a file of it removed?")
        with torch.no_grad(), gathered([parameter], modify=True):
            parameter.copy_(reader.weight(name))
    return model


def _load_pretrained(source: str, dtype: torch.dtype | None, options: dict, overrides: dict) -> PreTrainedModel:
    """Load a directory, a hub id or a GGUF file through transformers, and let no key pass unnoticed."""
    is_gguf = source.endswith(".gguf")
    check_sealed(Path(source))
    name = str(Path(source).parent) if is_gguf else source
    files = {"gguf_file": Path(source).name} if is_gguf else {}
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=options["trust_remote_code"], **files)
        apply_overrides(config, overrides, source)
        options = options | files | {"config": config, "dtype": dtype or "auto"}
        if is_gguf:  # plain weights: packed ones can neither be trained nor saved
            options["quantization_config"] = GgufConfig(dequantize=True)
        model, info = load(name, output_loading_info=True, **options)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{source}: transformers can't load this model: {error}") from error
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [f"wrong shape {key}" for key in sorted(info["mismatched_keys"])]
    problems += list(info.get("error_msgs") or ())
    if problems:
        raise UserError(f"{source}: weights and configuration don't fit together: {summarize(problems)}")
    return model


def _is_finite(tensor: Tensor) -> bool:
    """Whether every element is a finite number; takes no memory of the tensor's size."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _check_finite(model: PreTrainedModel, source: str) -> None:
    """Refuse weights that are infinite or not a number."""
    tensors = [
        (key, local_values(tensor))
        for key, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
    ]
    bad = [key for key, tensor in tensors if tensor.numel() and not _is_finite(tensor.detach())]
    if bad:
        raise UserError(f"{source}: weights that are infinite or not a number: {summarize(bad)}")
