"""What autocast does for torch's own functions, for autograd nodes written here."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast, if it is on, gives the inputs of matrix products."""
    return tuple(tensor.to(product_type(tensor)) for tensor in tensors)


def product_type(tensor: Tensor) -> torch.dtype:
    """The type in which a product takes `tensor`: autocast's if that is on, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
