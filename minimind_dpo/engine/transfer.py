"""Tensors on their way to a GPU, and whether one is there: the kernels to use for it are others than a CPU's."""

from __future__ import annotations

import torch
from torch import Tensor

from minimind_dpo.engine.devices import held_dtype


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU, so that launches and waits count."""
    return tensor.is_cuda


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; to a GPU through pinned memory, so that the host need not wait for it.

    float64 becomes float32 on a device that has none.
    """
    tensor = tensor.to(held_dtype(tensor.dtype, device))
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
