"""The phases of a run, what is alive in each, and the peak that follows on the device and on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minimind_dpo.engine.cpu import LARGE
from minimind_dpo.planning.memory import (
    BUCKET,
    Part,
    Setup,
    activation_parts,
    gathered_weights,
    gradient_parts,
    head_part,
    model_states,
    part,
    reference_parts,
    softmax_part,
)
from minimind_dpo.planning.shape import ModelShape

PARTS = (
    "process",
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "activations",
    "softmax",
    "logits head",
    "communication",
    "allocator",
)

# Measured on models of 26M to 135M parameters (docs/planning.md). In the first step the activations fill the heap
# without holes; then moments, gradients or buckets of other sizes settle in what is freed, and of the second step's
# activations about a third no longer fits in between. LoRA leaves holes in the first forward pass already: each small
# [tokens, r] tensor that is kept lands in the freed output of a layer, which then is too small for the next output.
HOLES, LORA_HOLES = 1 / 3, 0.8
LORA_GATHERS = 1.5  # stage 3 gathers every weight for a reference pass and for the policy's; 1 to 2 times them stays
GLOO_THREADS = 2  # that exchange tensors, each with a heap of its own in which the largest copy stays


@dataclass(frozen=True)
class Memory:
    """The predicted peak of one memory for one rank.

    Attributes:
        phase: when it is reached.
        parts: bytes by the names of `PARTS`.
    """

    phase: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def phases(shape: ModelShape, setup: Setup) -> dict[str, list[Part]]:
    """What is alive in each phase of a run's second optimizer step, and while it is loaded."""
    states = model_states(shape, setup) + reference_parts(shape, setup)
    gathered = gathered_weights(shape, setup)
    exchange, step = gradient_parts(shape, setup)
    activations = activation_parts(shape, setup)
    # the bucket is full, and exchanged, when this share of the backward pass still lies ahead
    trained = sum(shape.trained)
    ahead = max(0.0, 1 - BUCKET / trained) if setup.stage else 0.0
    kept = [*activations, softmax_part(shape, setup)]
    left = [Part(item.name, item.small * ahead, item.large * ahead) for item in kept]
    # DeepSpeed makes its buckets at the first gradient; on the CPU they become memory as they are written to
    buckets = [] if setup.cpu else [item for item in exchange if item.name == "communication"]
    scoring = activations[1:] + [head_part(shape, setup)]
    return {
        "loading": loading_parts(shape, setup),
        "reference forward": states + gathered + scoring,
        "start of backward": states + gathered + kept + buckets + [head_part(shape, setup)],
        "gradient exchange": states + gathered + left + exchange,
        "optimizer step": states + step,
    }


def loading_parts(shape: ModelShape, setup: Setup) -> list[Part]:
    """The model in fp32, a copy for the reference and the engine's flat one.

    On the CPU the weights file is mapped beside them; a file that already is in fp32 stays the model. Beside GPUs its
    pages are not counted: the system shares them between ranks and drops them when it needs room.
    """
    largest = part("weights", [4 * max(shape.parameters)])
    whole = part("weights", (4 * size for size in shape.parameters))
    copies = [Part("reference", whole.small, whole.large)] if setup.reference in ("live", "offload") else []
    if setup.stage == 3:
        share = part("weights", (setup.element * size / setup.world for size in shape.parameters))
        loaded = [share, largest, *(Part("reference", share.small, share.large) for _ in copies)]
    else:
        fresh = setup.stage > 0 and setup.element == 4 or setup.world > 1 and setup.cpu
        flat = [part("weights", [4 * sum(shape.trained)])] if fresh else []
        loaded = [*([] if setup.cpu and shape.stored == 4 else [whole]), *copies, *flat]
    if setup.cpu:
        return [part("weights", [shape.stored * shape.total]), *loaded]
    return [*loaded, (largest if setup.stage == 3 else whole)._replace(on_host=True)]


def predict(shape: ModelShape, setup: Setup, process: float, device_process: float = 0.0) -> tuple[Memory, Memory]:
    """The peak of one rank on the device and on the host, bytes; on the CPU both are the host's.

    Args:
        shape: of the model.
        setup: what is planned.
        process: resident bytes of a Python process that has the stack at work on a tiny model.
        device_process: what the device's own runtime takes.
    """
    alive = phases(shape, setup)
    if setup.cpu:
        memory = _cpu_peak(shape, setup, alive, process)
        return memory, memory
    device = _peak(alive, on_host=False, process=device_process)
    return device, _peak(alive, on_host=True, process=process)


def _sums(parts: Iterable[Part]) -> dict[str, float]:
    sums = dict.fromkeys(PARTS, 0.0)
    for item in parts:
        sums[item.name] += item.bytes
    return sums


def _peak(alive: dict[str, list[Part]], on_host: bool, process: float) -> Memory:
    """The largest phase, counting what is alive: what torch's CUDA allocator reports as allocated."""

    def size(phase: str) -> float:
        return sum(item.bytes for item in alive[phase] if item.on_host == on_host)

    phase = max(alive, key=size)
    parts = _sums(item for item in alive[phase] if item.on_host == on_host)
    return Memory(phase, parts | {"process": process})


def _cpu_peak(shape: ModelShape, setup: Setup, alive: dict[str, list[Part]], process: float) -> Memory:
    """The resident peak under glibc.

    Blocks below `LARGE` come from a heap that keeps its high-water mark, larger ones are given back when freed. So the
    largest small memory of any phase and the largest large memory of any phase add up.
    """
    running = {name: parts for name, parts in alive.items() if name != "loading"}
    small = max(running, key=lambda name: sum(item.small for item in running[name]))
    large = max(running, key=lambda name: sum(item.large for item in running[name]))
    phase = max(running, key=lambda name: sum(item.bytes for item in running[name]))
    own = _sums(running[phase])
    together = sum(item.small for item in running[small]) + sum(item.large for item in running[large])
    own["allocator"] = together - sum(own.values()) + fragmentation(shape, setup, running[small])
    own["process"] = process
    peak = Memory(phase, own)
    load = Memory("loading", _sums(alive["loading"]) | {"process": process})
    return max(peak, load, key=lambda memory: memory.total)


def fragmentation(shape: ModelShape, setup: Setup, heap: list[Part]) -> float:
    """Bytes of holes in the heap that the second step's tensors do not fit into.

    Args:
        shape: of the model.
        setup: what is planned.
        heap: the phase with the largest small memory.
    """
    activations = [item for item in heap if item.name == "activations"]
    holes = HOLES * sum(item.small for item in activations)
    if shape.adapters:  # blocks of any size: a large one also settles in a hole that it fits into
        holes = LORA_HOLES * sum(item.bytes for item in activations)
    weights = part("weights", (setup.element * size for size in shape.parameters)).small
    if setup.stage == 3:
        holes += GLOO_THREADS * min(LARGE, setup.element * max(shape.parameters))
        if shape.adapters:  # LoRA's small tensors also land between frozen weights that are gathered and freed
            holes += LORA_GATHERS * weights
    # a reference that is divided passes whole through the heap first, and its shares stay in between
    if setup.stage == 3 and setup.reference in ("live", "offload"):
        holes += weights
    elif setup.stage and setup.reference == "offload":
        holes += weights * (1 - 1 / setup.world)
    return holes
