"""Model states of a rank and what exchanging them takes: one function a term, bytes.

In the formulas P is the number of parameters, T of those that are trained, N of ranks, e the bytes of a weight
(`RunShape.weight_bytes`). They follow ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3 and figure 1: 2 + 2 +
12 bytes a parameter in mixed precision) and the tensors that DeepSpeed 0.19 makes (runtime/zero/stage_1_and_2.py and
stage3.py).
"""

from __future__ import annotations

from collections import Counter

from minimind_dpo.models.quantization import BYTES
from minimind_dpo.planning.allocation import Allocation, allocate
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape


def weights(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The weights that the forward pass reads, of which stage 3 keeps a rank's share.

    stage 0: 4 P; with LoRA those of `base_blocks` and 4 T        stages 1, 2: e P        stage 3: e P / N

    DeepSpeed lays those that are trained into one flat tensor; LoRA's matrices count beside the frozen P.
    """
    if run.stage == 0:
        return [allocate("weights", (*base_blocks(shape, run), *(4 * size for size in shape.adapters)))]
    ranks = run.world if run.stage == 3 else 1
    frozen = shape.parameters if shape.adapters else ()
    return [
        allocate("weights", (run.weight_bytes * size / ranks for size in frozen), on_host=run.weights_on_host),
        allocate("weights", [run.weight_bytes * sum(shape.trained) / ranks], on_host=run.weights_on_host),
    ]


def base_blocks(shape: ModelShape, run: RunShape) -> list[float]:
    """The bytes of each weight of the policy's start without DeepSpeed.

    trained: 4 P        frozen: b P        nf4: 4.127 / 8 Q + b (P - Q), Q in linear layers but the output layer
    """
    if not shape.adapters:
        return [4 * size for size in shape.parameters]
    quantized = Counter(shape.linear if run.quantization == "nf4" else ())
    plain = Counter(shape.parameters) - quantized
    return [run.frozen_bytes * size for size in plain.elements()] + [BYTES * size for size in quantized.elements()]


def half_weights(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The bf16 copies of fp32 weights that products use, without DeepSpeed: 2 Q, 2 T beside a bf16 LoRA base.

    Q is P without norms, and without embeddings that are not tied. Source: `engine/rounding.py`.
    """
    if not run.autocast:
        return []
    fp32 = shape.adapters if shape.adapters and run.frozen_bytes == 2 else (*shape.products, *shape.adapters)
    return [allocate("weights", (2 * size for size in fp32))]


def rounded_masters(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What DeepSpeed's optimizer shows of its masters under bf16 until they are copied: 4 T / N."""
    if not run.stage or not run.bf16:
        return []
    return [allocate("optimizer", [4 * sum(shape.trained) / run.world], on_host=run.optimizer_on_host)]


def gathered_weights(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """Weights that stage 3 has gathered when the forward pass turns into the backward pass.

    e min(P, max_reuse_distance / 2 + prefetch_bucket_size + largest weight)

    What is used again within the reuse distance is kept: the last layers, counted once forward and once backward.
    Weights under `stage3_param_persistence_threshold`, which are whole all the time, are among them.
    """
    if run.stage != 3:
        return []
    window = run.zero.max_reuse_distance // 2 + run.zero.prefetch_bucket_size + max(shape.parameters)
    return [allocate("weights", [run.weight_bytes * min(shape.total, window)])]


def optimizer_states(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What the optimizer keeps and, under DeepSpeed, the fp32 masters of the weights, in flat tensors.

    stage 0: 8 T        adamw_8bit, paged_adamw_8bit: (2 + 8 / 256) T, and 8 of a weight below 4096 elements
    adafactor: 4 (rows + columns) of a matrix, 4 of an element else        stages 1 to 3: 12 T / N

    DeepSpeed makes the masters in fp32 runs too. Paged states count on the device, where they are while it has room.
    """
    if run.stage == 0 and run.optim == "adafactor":
        return [allocate("optimizer", (4 * size for size in shape.factors))]
    if run.stage == 0 and run.optim != "adamw":
        moments = (size * (1 + 4 / 256 if size >= 4096 else 4) for size in shape.trained)
        return [allocate("optimizer", moments, times=2)]
    if run.stage == 0:
        return [allocate("optimizer", (4 * size for size in shape.trained), times=2)]
    share = sum(shape.trained) / run.world
    return [allocate("optimizer", [4 * share], times=3, on_host=run.optimizer_on_host)]


def followed_reference(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """fp32 values of a reference that follows the policy: 4 T / N, in stage 0 4 T; beside the model that scores."""
    if not run.follows:
        return []
    if run.stage == 0:
        return [allocate("reference", (4 * size for size in shape.trained))]
    return [allocate("reference", [4 * sum(shape.trained) / run.world], on_host=run.optimizer_on_host)]


def whole_gradients(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """Gradients of all trained weights, until they are exchanged.

    stage 0: 4 T        stage 1: e T, on the CPU less what the bucket holds        stages 2, 3: none
    """
    if run.stage == 0:
        return [allocate("gradients", (4 * size for size in shape.trained))]
    if run.stage > 1:
        return []
    whole = run.weight_bytes * sum(shape.trained)
    left = 1 - reduce_bucket_bytes(shape, run) / whole if run.cpu else 1.0  # each leaves as the bucket is written to
    return [allocate("gradients", (run.weight_bytes * size for size in shape.trained), times=left)]


def gradient_partition(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The reduced gradients of a rank's share.

    stages 1 to 3: e T / N        none where stage 1 or 2 offloads: there they go to the host as they come
    """
    if run.stage == 0 or run.stage < 3 and run.offloads:
        return []
    share = run.weight_bytes * sum(shape.trained) / run.world
    return [allocate("gradients", [share], on_host=run.optimizer_on_host)]


def fp32_gradients(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The fp32 copy of a rank's gradients that the optimizer steps on.

    4 T / N        none without DeepSpeed, or where stage 1 or 2 reads the fp32 partition itself
    """
    if run.stage == 0 or run.stage < 3 and run.weight_bytes == 4 and not run.offloads:
        return []
    return [allocate("gradients", [4 * sum(shape.trained) / run.world], on_host=run.optimizer_on_host)]


def gradient_norm(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The fp64 copy of a gradient whose norm DeepSpeed takes, the largest: 8 min(T / N, largest trained weight)."""
    if run.stage == 0:
        return []
    return [allocate("gradients", [8 * max(min(sum(shape.trained) / run.world, max(shape.trained)), 1)])]


def ddp_buckets(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """DDP's buckets, in which every gradient has its place: 4 T; none for one process.

    Source: torch's Reducer; a bucket has 25 MiB (bucket_cap_mb), so all are in the heap.
    """
    if run.stage or run.world == 1:
        return []
    return [Allocation("communication", 4 * sum(shape.trained))]


def reduce_bucket_bytes(shape: ModelShape, run: RunShape) -> float:
    """One of DeepSpeed's buckets of gradients: e reduce_bucket_size.

    On the CPU e min(T, reduce_bucket_size): only what is written to becomes memory.
    """
    size = run.zero.reduce_bucket_size
    return run.weight_bytes * (min(sum(shape.trained), size) if run.cpu else size)


def reduce_buckets(shape: ModelShape, run: RunShape, count: int) -> list[Allocation]:
    """So many of DeepSpeed's buckets of gradients."""
    return [allocate("communication", [reduce_bucket_bytes(shape, run)], times=count)] if run.stage else []


def overlapped_buckets(run: RunShape) -> int:
    """Buckets that stages 1 and 2 fill: with `overlap_comm` one is filled while the other is exchanged."""
    return 2 if run.zero.overlap_comm else 1


def offload_buffers(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What stages 1 and 2 need to step on the host.

    host: e T / N, the updated weights on their way back, and e x largest weight; device: e x largest weight
    """
    if run.stage == 3 or not run.offloads:
        return []
    share, largest = run.weight_bytes * sum(shape.trained) / run.world, run.weight_bytes * max(shape.trained)
    return [
        allocate("communication", [share, largest], on_host=run.optimizer_on_host),
        allocate("communication", [largest]),
    ]


def reference_weights(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What a reference model holds all the time, and what of it is on the device while it scores.

    live: e P, beside stage 3 e P / N        offload: e P on the host (a share e P / N under DeepSpeed), and the
    largest weight on the device        cache, adapter: none
    without DeepSpeed e is that of `ref_dtype`, or the policy's start is copied as it is: `base_blocks`
    """
    if run.reference not in ("live", "offload"):
        return []
    offloaded = run.reference == "offload"
    ranks = run.world if run.stage == 3 or offloaded and run.stage else 1
    shares = [size / ranks for size in reference_blocks(shape, run)]
    held = [allocate("reference", shares, on_host=offloaded and not run.cpu)]
    if offloaded and (run.stage or not run.cpu):
        held.append(allocate("reference", [max(reference_blocks(shape, run))]))
    return held


def reference_blocks(shape: ModelShape, run: RunShape) -> list[float]:
    """The bytes of each weight of a reference, whole: e P, or without DeepSpeed 4 or 2 P by its own type.

    By itself it has what the policy starts with: under autocast 2 Q and 4 for every other element, tied or not.
    """
    if run.stage:
        return [run.weight_bytes * size for size in shape.parameters]
    if run.reference_bytes is not None:
        return [run.reference_bytes * size for size in shape.parameters]
    if not run.autocast or shape.adapters:
        return base_blocks(shape, run)
    others = list((Counter(shape.parameters) - Counter(shape.products)).elements())
    embedding = shape.vocab * shape.hidden
    tied = [] if embedding in others else [embedding]  # the head's has gone its own way
    return [*(2 * size for size in shape.products), *(4 * size for size in (*others, *tied))]
