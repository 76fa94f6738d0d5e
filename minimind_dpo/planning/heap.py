"""Holes in glibc's heap."""

from __future__ import annotations

from minimind_dpo.engine.cpu import LARGE
from minimind_dpo.planning.allocation import Allocation, allocate
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape

HOLES, LORA_HOLES = 1 / 3, 0.8
LORA_GATHERS = 1.5  # stage 3 gathers every weight for a reference pass and for the policy's; 1 to 2 times them stays
GLOO_THREADS = 2  # that exchange tensors, each with a heap of its own in which the largest copy stays


def heap_holes(shape: ModelShape, run: RunShape, running: dict[str, list[Allocation]]) -> float:
    """Bytes of holes in the heap that the second step's tensors do not fit into."""
    fullest = max(running.values(), key=lambda items: sum(item.heap for item in items))
    activations = [item for item in fullest if item.purpose == "activations"]
    holes = HOLES * sum(item.heap for item in activations)
    if shape.adapters:  # blocks of any size: a large one also settles in a hole that it fits into
        holes = LORA_HOLES * sum(item.bytes for item in activations)
    weights = allocate("weights", (run.weight_bytes * size for size in shape.parameters)).heap
    if run.stage == 3:
        holes += GLOO_THREADS * min(LARGE, run.weight_bytes * max(shape.parameters))
        if shape.adapters:  # LoRA's small tensors also land between frozen weights that are gathered and freed
            holes += LORA_GATHERS * weights
    # a reference that is divided passes whole through the heap first, and its shares stay in between
    if run.stage == 3 and run.reference in ("live", "offload"):
        holes += weights
    elif run.stage and run.reference == "offload":
        holes += weights * (1 - 1 / run.world)
    return holes
