"""Rotary positions whose frequencies depend on how long a sequence is (LongRoPE, dynamic NTK): each row its own length.

transformers takes the longest row of a batch for all of them, and dynamic NTK also what it saw before; a pair's score
would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def length_dependent(model: nn.Module) -> list[Any]:
    """The modules of a model that make rotary frequencies of the length of what they see."""
    return [module for module in model.modules() if _depends(getattr(module, "rope_type", None))]


def _depends(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds if isinstance(kind, str))


@torch.no_grad()
def rows_apart(
    module: Any,
    forward: Callable[..., Any],
    lengths: Sequence[int],
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows, T, D] of `forward`, each row's as if it were alone; padding is 0.

    Args:
        module: whose forward pass it is.
        forward: of `x` and `position_ids`.
        lengths: tokens of each row without its padding.
        x: tells type and device.
        position_ids: [rows, T] or, alike for all rows, [1, T].
        *args: passed on.
        **options: passed on.
    """
    width = position_ids.shape[-1]
    rows = []
    for index, length in enumerate(lengths):
        _forget(module)
        row = position_ids[min(index, len(position_ids) - 1)][None, :length]
        rows.append(
            [nn.functional.pad(part, (0, 0, 0, width - length)) for part in forward(x[:1], row, *args, **options)]
        )
    cosines, sines = zip(*rows, strict=True)
    return torch.cat(cosines), torch.cat(sines)


def _forget(module: Any) -> None:
    """Have dynamic NTK see a sequence as its first."""
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name, buffer in list(module._buffers.items()):
        if name.endswith("original_inv_freq") and name.replace("original_", "") in module._buffers:
            module._buffers[name.replace("original_", "")].copy_(buffer)
