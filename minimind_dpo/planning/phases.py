"""The phases of a run and what is alive in each."""

from __future__ import annotations

from minimind_dpo.models.quantization import BYTES
from minimind_dpo.planning.activations import (
    dequantized_weight,
    head_logits,
    kept_activations,
    kept_softmax,
    working_activations,
)
from minimind_dpo.planning.allocation import Allocation, allocate
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape
from minimind_dpo.planning.states import (
    base_blocks,
    ddp_buckets,
    followed_reference,
    fp32_gradients,
    gathered_weights,
    gradient_norm,
    gradient_partition,
    half_weights,
    offload_buffers,
    optimizer_states,
    overlapped_buckets,
    reduce_buckets,
    reference_blocks,
    reference_weights,
    rounded_masters,
    weights,
    whole_gradients,
)

LOADING = "loading"


def phases(shape: ModelShape, run: RunShape) -> dict[str, list[Allocation]]:
    """What is alive while a run is loaded, and in each phase of its second optimizer step."""
    states = standing_states(shape, run) + reference_weights(shape, run)
    gathered = gathered_weights(shape, run)
    exchange = gradient_exchange(shape, run)
    saved = kept_activations(shape, run) + kept_softmax(shape, run)
    working = working_activations(shape, run) + dequantized_weight(shape, run)
    logits = head_logits(shape, run)
    # DeepSpeed makes its buckets at the first gradient; on the CPU they become memory as they are written to
    buckets = [] if run.cpu else [item for item in exchange if item.purpose == "communication"]
    # the bucket is full, and exchanged, when this share of the backward pass still lies ahead
    ahead = max(0.0, 1 - run.zero.reduce_bucket_size / sum(shape.trained)) if run.stage else 0.0
    return {
        LOADING: loading(shape, run),
        "reference forward": states + gathered + working + logits,
        "start of backward": states + gathered + saved + working + buckets + logits,
        "gradient exchange": states + gathered + [item.scaled(ahead) for item in saved + working] + exchange,
        "optimizer step": states + optimizer_step(shape, run),
    }


def standing_states(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What exists as long as the engine: model states, and the buffers that it makes once."""
    states = weights(shape, run) + optimizer_states(shape, run) + ddp_buckets(shape, run) + offload_buffers(shape, run)
    states += half_weights(shape, run) + followed_reference(shape, run)
    if run.stage == 3:
        states += gradient_partition(shape, run) + reduce_buckets(shape, run, 1)
    return states + (fp32_gradients(shape, run) if run.offloads else [])


def gradient_exchange(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """Gradients and buckets while a bucket is exchanged: the filled ones and a flat copy, in stage 3 two copies."""
    if run.stage == 3:
        return reduce_buckets(shape, run, 2)
    filled = overlapped_buckets(run)
    return reduce_buckets(shape, run, filled + 1) + gradient_partition(shape, run) + whole_gradients(shape, run)


def optimizer_step(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """Gradients and buckets while the optimizer steps."""
    if run.stage == 0:
        return whole_gradients(shape, run)
    step = (
        gradient_norm(shape, run) + rounded_masters(shape, run) + ([] if run.offloads else fp32_gradients(shape, run))
    )
    if run.stage < 3:
        step += reduce_buckets(shape, run, overlapped_buckets(run)) + gradient_partition(shape, run)
    return step


def loading(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The weights' file, the model read from it, its quantised form, a reference's copy and the engine's flat one."""
    return [
        *weights_file(shape, run),
        *loaded_model(shape, run),
        *quantized_model(shape, run),
        *loaded_reference(shape, run),
        *flat_copy(shape, run),
    ]


def weights_file(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What of the file is in the host's memory.

    CPU: s P, the mapped file, s bytes an element (2 or 4)        GPU: the model on its way, 4 P (a LoRA base b P), or
    in stage 3 4 x largest weight

    Beside GPUs the file's own pages are not counted: the system shares them between ranks and drops them when it needs
    room.
    """
    if run.cpu:
        return [allocate("weights", [shape.stored * shape.total])]
    if run.stage == 3:
        return [allocate("weights", [4 * max(shape.parameters)], on_host=True)]
    return [allocate("weights", (loaded_bytes(shape, run) * size for size in shape.parameters), on_host=True)]


def loaded_bytes(shape: ModelShape, run: RunShape) -> int:
    """Bytes of an element as it is loaded: 4, of a LoRA base without DeepSpeed b."""
    return run.frozen_bytes if shape.adapters and not run.stage else 4


def quantized_model(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What a base is quantised to, layer by layer beside the loaded one, on the host."""
    if run.quantization == "none":
        return []
    return [allocate("weights", [BYTES * size for size in shape.linear], on_host=not run.cpu)]


def loaded_model(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The model in fp32: 4 P (a LoRA base: b P); stage 3: a share e P / N and one weight whole, 4 x largest.

    A file that is mapped and in that type already stays the model; what is quantised reaches a GPU in 4 bits.
    """
    if run.stage == 3:
        share = allocate("weights", (run.weight_bytes * size / run.world for size in shape.parameters))
        return [share, allocate("weights", [4 * max(shape.parameters)])]
    size_bytes = loaded_bytes(shape, run)
    if run.cpu and shape.stored == size_bytes:
        return []
    if run.quantization != "none" and not run.cpu:
        return [allocate("weights", base_blocks(shape, run))]
    return [allocate("weights", (size_bytes * size for size in shape.parameters))]


def loaded_reference(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The reference's copy of the model: live, offload: 4 P, in stage 3 e P / N        cache, adapter: none.

    Without DeepSpeed as `reference_blocks` says.
    """
    if run.reference not in ("live", "offload"):
        return []
    if not run.stage:
        return [allocate("reference", reference_blocks(shape, run))]
    size_bytes = run.weight_bytes / run.world if run.stage == 3 else 4
    return [allocate("reference", (size_bytes * size for size in shape.parameters))]


def flat_copy(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """A flat copy of trained weights while they are laid out, 4 T: stages 1 and 2 in fp32, and DDP over gloo."""
    made = run.stage in (1, 2) and run.weight_bytes == 4 or run.stage == 0 and run.world > 1 and run.cpu
    return [allocate("weights", [4 * sum(shape.trained)])] if made else []
