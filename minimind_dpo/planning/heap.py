"""Holes in glibc's heap: what its blocks (below `LARGE`) take beyond their sum. One function a term, bytes.

Two numbers here are no arithmetic: measured corrections for glibc 2.36 on one x86-64 machine. The table of
docs/planning.md has a column without them: down to 0.64 of the measured peak, with LoRA to 0.56. Another allocator
needs others. How holes come about is the same everywhere: in the first step the activations fill the heap without any;
then moments, gradients or buckets of other sizes settle in what is freed, and a part of the second step's activations
no longer fits in between. LoRA leaves holes in the first forward pass already: each small [tokens, r] tensor that is
kept lands in the freed output of a layer, which then is too small for the next output.
"""

from __future__ import annotations

from dataclasses import replace

from minimind_dpo.planning.activations import kept_activations, working_activations
from minimind_dpo.planning.allocation import allocate
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape

MEASURED_HOLES = 1 / 3  # share of the activations in the heap for which the second step finds no room
MEASURED_LORA_HOLES = 0.8  # with LoRA: of all activations, since a large block settles in a hole that it fits into


def heap_holes(shape: ModelShape, run: RunShape) -> float:
    """All holes in the second step."""
    return activation_holes(shape, run) + gathering_holes(shape, run) + reference_holes(shape, run)


def activation_holes(shape: ModelShape, run: RunShape) -> float:
    """Room that activations leave: 1/3 of those in the heap, with LoRA 0.8 of all (measured).

    With checkpointing those of every layer count too: each is made again in the backward pass, and gradients settle in
    what it frees before the next one is made.
    """
    made = replace(run, checkpointing=False)
    activations = kept_activations(shape, made) + working_activations(shape, made)
    if shape.adapters:
        return MEASURED_LORA_HOLES * sum(item.bytes for item in activations)
    return MEASURED_HOLES * sum(item.heap for item in activations)


def gathering_holes(shape: ModelShape, run: RunShape) -> float:
    """Room of frozen weights that stage 3 has gathered and freed, between which LoRA's small tensors landed: 2 e P.

    They are gathered twice, for the reference's pass and for the policy's. Weights of `LARGE` and more leave none.
    """
    return 2 * _heap_weights(shape, run) if run.stage == 3 and shape.adapters else 0.0


def reference_holes(shape: ModelShape, run: RunShape) -> float:
    """Room of a reference that passed through the heap whole, and whose shares stay in between.

    stage 3, live or offload: e P        stages 1 and 2, offload: e P (1 - 1 / N)        else none

    Weights of `LARGE` and more leave none.
    """
    if run.stage == 3 and run.reference in ("live", "offload"):
        return _heap_weights(shape, run)
    if run.stage and run.reference == "offload":
        return _heap_weights(shape, run) * (1 - 1 / run.world)
    return 0.0


def _heap_weights(shape: ModelShape, run: RunShape) -> float:
    return allocate("weights", (run.weight_bytes * size for size in shape.parameters)).heap
