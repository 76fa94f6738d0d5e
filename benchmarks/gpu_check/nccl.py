"""NCCL's collectives on a group of one rank, and a step of DDP beside one without it."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_check.notes import Notes, Place


def run(notes: Notes, place: Place) -> None:
    """Each collective gives what one rank put in; DDP's gradients are the model's own."""
    backend = "nccl" if place.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place.scratch / 'store'}", rank=0, world_size=1)
    try:
        _collectives(notes, place.device)
        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(place.device)
        together = DistributedDataParallel(copy.deepcopy(alone))
        inputs = torch.randn(8, 64, device=place.device)
        for model in (alone, together):
            model(inputs).sum().backward()
        pairs = zip(alone.parameters(), together.module.parameters(), strict=True)
        notes.check("DDP's gradients", all(torch.equal(own.grad, other.grad) for own, other in pairs))
    finally:
        dist.destroy_process_group()


def _collectives(notes: Notes, device: str) -> None:
    """In the types that a run exchanges."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        values = torch.arange(1 << 10, device=device).to(dtype)
        reduced, gathered, scattered = values.clone(), torch.empty_like(values), torch.empty_like(values)
        dist.all_reduce(reduced)
        dist.all_gather_into_tensor(gathered, values)
        if device == "cuda":  # gloo has none
            dist.reduce_scatter_tensor(scattered, values)
        else:
            scattered.copy_(values)
        dist.broadcast(reduced, 0)
        right = all(torch.equal(found, values) for found in (reduced, gathered, scattered))
        notes.check(f"collectives of {str(dtype).removeprefix('torch.')}", right)
    objects: list[object] = [{"rank": 0}]
    dist.broadcast_object_list(objects)
    notes.check("objects", objects == [{"rank": 0}])
