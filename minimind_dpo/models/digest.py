"""What weights a model has: a digest of them, whatever path they came from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash
from transformers import PreTrainedModel

from minimind_dpo.engine.sharding import gathered


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, memoryview]]:
    """Of every tensor in the order of names: name, type and shape in a line, and its bytes.

    Args:
        model: whole or sharded; if sharded, every rank must go through all of them.
        dtype: that all tensors are rounded to first, if any.
    """
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with gathered([tensor]):
            values = tensor.detach().to(dtype or tensor.dtype).cpu().contiguous()
        yield f"{name} {values.dtype} {tuple(values.shape)}\n", values.view(-1).view(torch.uint8).numpy().data


def weights_digest(model: PreTrainedModel) -> str:
    """A model's weights by 128 bits (XXH3), to tell whether they are those that something was trained beside."""
    digest = xxhash.xxh3_128()
    for line, values in weight_bytes(model):
        digest.update(line.encode())
        digest.update(values)
    return digest.hexdigest()
