"""What a reference is: a digest of its configuration and weights."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

from minimind_dpo.models.digest import weight_bytes


def reference_digest(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """sha256 of a model's configuration and weights (names, types, shapes, bytes), whatever path they came from.

    Args:
        model: whole or sharded; if sharded, every rank must call this.
        dtype: the type that the engine rounds all weights to before it computes with them, if it does.
    """
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for line, values in weight_bytes(model, dtype):
        digest.update(line.encode())
        digest.update(values)
    return digest.hexdigest()
