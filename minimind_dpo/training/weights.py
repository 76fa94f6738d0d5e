"""The types of weights that a run begins with: of the policy's start and of its reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from minimind_dpo.checkpoints.state import read_state
from minimind_dpo.config import TrainConfig
from minimind_dpo.config.names import is_raw_weights
from minimind_dpo.engine.launched import HALF_TYPES
from minimind_dpo.engine.optimizers import bitsandbytes
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.models.loading import load_adapted, load_model
from minimind_dpo.models.places import is_adapter, locate_model
from minimind_dpo.models.quantization import quantize
from minimind_dpo.models.raw import raw_layout


def load_configured(config: TrainConfig, path: str, dtype: str = "float32") -> PreTrainedModel:
    """Load a model as the configuration asks for it, with weights of type `dtype`."""
    overrides: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "dtype": dtype}
    if (heads := _heads(config, path)) is not None:
        overrides["num_attention_heads"] = heads
    if not config.attends_pairs:
        overrides["attn_implementation"] = config.attn_implementation
    return load_model(path, **overrides)


def _heads(config: TrainConfig, path: str) -> int | None:
    """The query heads that a model has to be told: each its own, a reference that says nothing the policy's."""
    if path != config.ref_model_name_or_path:
        return config.num_attention_heads
    if config.ref_num_attention_heads is not None:
        return config.ref_num_attention_heads
    return config.num_attention_heads if path == config.model_name_or_path else _heads_of_policy(config, path)


def _heads_of_policy(config: TrainConfig, path: str) -> int | None:
    """The policy's query heads, if a reference is of raw weights as wide that do not tell theirs."""
    location, policy = locate_model(path), locate_model(config.model_name_or_path)
    if location is None or policy is None or not is_raw_weights(location):
        return None
    layout = raw_layout(location)
    if layout.generation != 2:
        return None
    if is_raw_weights(policy):
        return config.num_attention_heads if raw_layout(policy).hidden_size == layout.hidden_size else None
    if not (policy / "config.json").is_file():
        return None
    settings = json.loads((policy / "config.json").read_text("utf-8"))
    return settings.get("num_attention_heads") if settings.get("hidden_size") == layout.hidden_size else None


def load_start(config: TrainConfig, dtype: str, precision: str) -> PreTrainedModel:
    """Load the policy's start, with frozen layers in 4 bits if `quantization` says so.

    Raises:
        UserError: bitsandbytes is needed and not installed.
    """
    if config.quantization == "none":
        location = locate_model(config.model_name_or_path)
        if config.lora_r is None and location is not None and is_adapter(location):
            return _load_adapter(config, location)
        return load_configured(config, config.model_name_or_path, dtype)
    bitsandbytes(f"quantization: {config.quantization}")  # before anything is loaded
    policy = load_configured(config, config.model_name_or_path, dtype)
    # products in fp32 unless the run's are not: their sum with LoRA's would round away its first updates
    quantize(policy, torch.float32 if precision == "no" else policy.dtype)
    return policy


def _load_adapter(config: TrainConfig, location: Path) -> PreTrainedModel:
    """The base and the matrices of an adapter, to be trained on as they are."""
    attention = {} if config.attends_pairs else {"attn_implementation": config.attn_implementation}
    return load_adapted(location, torch.float32, trust_remote_code=config.trust_remote_code, **attention)


def load_reference_start(config: TrainConfig, engine: Engine) -> PreTrainedModel:
    """Load a run's reference on its own: the model named, or the policy's start, in the type it is scored in."""
    own_type = config.ref_dtype != "auto"
    if config.ref_model_name_or_path is None and not own_type:
        return load_start(config, policy_dtype(config, engine), engine.precision)
    path = config.ref_model_name_or_path or config.model_name_or_path
    return load_configured(config, path, config.ref_dtype if own_type else "float32")


def policy_dtype(config: TrainConfig, engine: Engine, checkpoint: Path | None = None) -> str:
    """The type that the policy is loaded in: fp32 where it is trained, for a LoRA base what `dtype` says.

    `auto` is the type of the run's products, so that nothing is kept which they would round away; a run that goes on
    from a checkpoint keeps the type that it began with, fp32 before there was a choice. DeepSpeed rounds them itself.
    """
    if config.dtype != "auto":
        return config.dtype
    if checkpoint is not None:
        return read_state(checkpoint).identity.get("dtype", "float32")
    if config.lora_r is None or engine.weights_dtype is not None:
        return "float32"
    return str(HALF_TYPES.get(engine.precision, torch.float32)).removeprefix("torch.")
