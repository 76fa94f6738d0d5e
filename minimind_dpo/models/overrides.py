"""What `load_model` can be asked for beside a path: types and settings, checked by name."""

from __future__ import annotations

import difflib

import torch
from transformers import PreTrainedConfig

from minimind_dpo.config import DTYPES
from minimind_dpo.errors import UserError

CONFIG_OVERRIDES = ("attention_dropout", "max_position_embeddings", "router_aux_loss_coef", "use_cache")
LOAD_OVERRIDES = ("dtype", "attn_implementation", "num_attention_heads", "trust_remote_code")


def check_overrides(overrides: dict) -> None:
    """Name every override that does not exist, with its nearest relative."""
    for name in overrides:
        if name not in CONFIG_OVERRIDES:
            known = (*LOAD_OVERRIDES, *CONFIG_OVERRIDES)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"load_model: unknown override {name!r}.{hint} Known: {', '.join(known)}.")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype, None for `auto`."""
    if dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; use {', '.join(DTYPES)} or auto.")
    return getattr(torch, name)


def apply_overrides(config: PreTrainedConfig, overrides: dict, source: str) -> None:
    """Set configuration fields that the model must already have."""
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise UserError(f"{source}: {type(config).__name__} has no setting {name}. Leave it out.")
        setattr(config, name, value)
