"""How much memory a rank of a run needs, part by part and phase by phase: arithmetic on sizes alone.

Model states follow ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) and the buffers DeepSpeed 0.19 holds; activations
are the tensors that autograd keeps for a packed batch (`data/batch.py`, `models/fast/attention.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.engine.cpu import LARGE
from minimind_dpo.models.fast.attention_cpu import keeps_weights, query_blocks
from minimind_dpo.models.fast.head import CHUNK_ELEMENTS
from minimind_dpo.planning.shape import ModelShape

DDP_BUCKET = 25 << 20  # bytes of gradients that DDP exchanges at once
BUCKET = 50_000_000  # elements of the reduce and prefetch buckets in configs/deepspeed
REUSE_DISTANCE = 1_000_000_000  # elements; stage 3 keeps what it needs again within this many (DeepSpeed's default)
PERSISTENT = 100_000  # elements; stage 3 on GPUs keeps smaller weights whole (configs/deepspeed/zero3.json)


@dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
        world: ranks, `per_node` of them on one machine.
        stage: ZeRO stage; 0 is one process or DDP.
        offload: none, optimizer, or all (parameters too).
        bf16: mixed precision; bf16 weights under DeepSpeed, autocast over fp32 weights without.
        reference: live, offload, cache or adapter.
        pairs: of a micro-batch on each rank.
        length: tokens a side.
        prompt_share: share of the length that the two sides of a pair have in common.
        checkpointing: whether activations are recomputed in the backward pass.
        cpu: whether the device is the host's own memory.
    """

    world: int = 1
    per_node: int = 1
    stage: int = 0
    offload: str = "none"
    bf16: bool = False
    reference: str = "cache"
    pairs: int = 4
    length: int = 1024
    prompt_share: float = 0.0
    checkpointing: bool = False
    cpu: bool = False

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are rounded as they are used."""
        return self.bf16 and self.stage == 0

    @property
    def element(self) -> int:
        """Bytes of a weight that the forward pass reads."""
        return 2 if self.bf16 and self.stage else 4

    @property
    def computed(self) -> int:
        """Bytes of an element of what linear layers put out."""
        return 2 if self.bf16 else 4

    @property
    def prefix(self) -> int:
        """Input tokens that the two sides of a pair share."""
        return int(self.length * self.prompt_share)

    @property
    def branch(self) -> int:
        """Input tokens of one side beyond the shared ones; its last token is a target only."""
        return self.length - 1 - self.prefix

    @property
    def positions(self) -> int:
        """Input tokens of a micro-batch."""
        return self.pairs * (self.prefix + 2 * self.branch)

    @property
    def counted(self) -> int:
        """Positions that the output layer scores: each token after the shared ones."""
        return self.pairs * 2 * (self.length - self.prefix)


class Part(NamedTuple):
    """Memory of one purpose, bytes.

    `large` is what lies in blocks of `LARGE` and more, `small` the rest; `on_host` of two memories says which.
    """

    name: str
    small: float
    large: float = 0.0
    on_host: bool = False

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.small + self.large


def part(name: str, blocks: Iterable[float], times: float = 1.0, on_host: bool = False) -> Part:
    """`times` every block of the given sizes in bytes."""
    sizes = list(blocks)
    large = sum(size for size in sizes if size >= LARGE)
    return Part(name, (sum(sizes) - large) * times, large * times, on_host)


def model_states(shape: ModelShape, setup: Setup) -> list[Part]:
    """Weights, fp32 copies and AdamW's two moments a rank, and the buffers that exist as long as the engine.

    ZeRO, section 3 and figure 1: with mixed precision 2 + 2 + 12 bytes a parameter, of which the stages divide the 12,
    the second 2 and the first 2 by the number of ranks. In fp32 DeepSpeed makes the same copies of 4 bytes.
    """
    trained, frozen = sum(shape.trained), shape.parameters if shape.adapters else ()
    share, element = trained / setup.world, setup.element
    if setup.stage == 0:
        weights = [part("weights", (4 * size for size in (*shape.parameters, *shape.adapters)))]
        moments = part("optimizer", (4 * size for size in shape.trained), times=2)
        buckets = [min(4 * trained, DDP_BUCKET)] * max(1, round(4 * trained / DDP_BUCKET))
        exchange = [Part("communication", min(4 * trained, sum(buckets)))] if setup.world > 1 else []
        return [*weights, moments, *exchange]
    optimizer_there, weights_there = setup.offload != "none" and not setup.cpu, setup.offload == "all" and not setup.cpu
    states = [part("optimizer", [4 * share], times=3, on_host=optimizer_there)]
    if setup.stage < 3:
        states += [part("weights", (element * size for size in frozen)), part("weights", [element * trained])]
        if setup.offload != "none":  # the fp32 gradient, a 16-bit copy on its way back, and one gradient each way
            largest = element * max(shape.trained)
            states += [
                part("gradients", [4 * share], on_host=optimizer_there),
                part("communication", [element * share, largest], on_host=optimizer_there),
                part("communication", [largest]),
            ]
        return states
    states += [
        part("weights", (element * size / setup.world for size in frozen), on_host=weights_there),
        part("weights", [element * share], on_host=weights_there),
        part("gradients", [element * share], on_host=optimizer_there),
        part("communication", [element * bucket_elements(trained, setup)]),
    ]
    if setup.offload != "none":
        states.append(part("gradients", [4 * share], on_host=optimizer_there))
    return states


def bucket_elements(trained: int, setup: Setup) -> int:
    """Elements of DeepSpeed's reduce bucket: on the CPU only what is written to becomes memory."""
    return min(trained, BUCKET) if setup.cpu else BUCKET


def gathered_weights(shape: ModelShape, setup: Setup) -> list[Part]:
    """Weights that stage 3 has gathered when the forward pass turns into the backward pass."""
    if setup.stage != 3:
        return []
    # what is used again within REUSE_DISTANCE is kept: the last layers, counted once forward and once backward
    kept = min(shape.total, REUSE_DISTANCE // 2 + BUCKET + max(shape.parameters))
    return [part("weights", [setup.element * kept])]


def reference_parts(shape: ModelShape, setup: Setup) -> list[Part]:
    """What a reference model holds all the time, and what of it is on the device while it scores."""
    element, there = setup.element, not setup.cpu
    if setup.reference == "live" and setup.stage < 3:
        return [part("reference", (element * size for size in shape.parameters))]
    if setup.reference == "live":
        return [part("reference", (element * size / setup.world for size in shape.parameters))]
    if setup.reference == "offload":
        parts = setup.world if setup.stage else 1
        held = [part("reference", (element * size / parts for size in shape.parameters), on_host=there)]
        return held + ([part("reference", [element * max(shape.parameters)])] if setup.stage or there else [])
    return []


def layer_bytes(shape: ModelShape, setup: Setup, rows: int | None = None) -> float:
    """Bytes that autograd keeps of one decoder layer.

    A norm keeps its input and what linear layers take from it, and where it is not fused its normalised input (unless
    its weight is frozen); attention keeps rotated queries and keys, values, outputs, and on a GPU a number a query and
    the keys gathered for one call; a gated block keeps gate, the other branch and their product, and where it is not
    fused the gate's activation.

    Args:
        shape: of the model.
        setup: what is planned.
        rows: on which the token-wise parts work; all positions unless given.
    """
    tokens, wide, hidden = setup.positions, setup.computed, shape.hidden
    fused = shape.fused and setup.element == 4  # fp32 weights, so fp32 norms
    trains_all = not shape.adapters and not fused
    residual = 2 * 4 * hidden  # fp32 in every mode: norms compute in it
    if setup.autocast:  # each linear layer rounds its input for itself
        norms = residual + (trains_all or shape.routed > 0) * 2 * 4 * hidden + 5 * wide * hidden
    else:
        norms = residual + (trains_all + 1) * 2 * wide * hidden
    inputs = 4 if setup.cpu else wide
    attention: float = inputs * (shape.query + 2 * shape.key_value) + wide * shape.query
    if shape.normed_heads:
        attention += (4 + trains_all * wide) * (shape.query + shape.key_value)
    if not setup.cpu:
        attention += 4 * shape.heads + wide * 2 * shape.key_value * (1 + setup.prefix * setup.pairs / tokens)
    inner = (4 - shape.fused if shape.gated else 2) * shape.intermediate
    blocks = wide * (shape.dense_blocks * inner + shape.routed * (inner + 3 * hidden))
    adapters = wide * shape.lora_r * len(shape.adapters) / 2 / shape.layers
    return tokens * (norms + attention + adapters) + (tokens if rows is None else rows) * blocks


def activation_parts(shape: ModelShape, setup: Setup) -> list[Part]:
    """What autograd keeps when the forward pass ends, without the output layer; and the widest short-lived tensors.

    With checkpointing each layer keeps its input, and one layer at a time is computed again.
    """
    tokens, layer = setup.positions, layer_bytes(shape, setup)
    wanted = min(tokens, setup.counted)  # the last layer's feed-forward block works on what is scored
    last = layer_bytes(shape, setup, wanted) if not shape.routed else layer
    inputs = (4 if setup.autocast else setup.computed) * tokens * shape.hidden
    total = shape.layers * inputs + layer if setup.checkpointing else (shape.layers - 1) * layer + last
    ends = (4 * tokens + 4 * setup.computed * wanted) * shape.hidden  # the last norm's input; what is scored
    widest = setup.computed * tokens * max(shape.intermediate * max(shape.dense_blocks, 1), shape.hidden)
    blocks = part("activations", [widest]).large > 0  # the inner tensors of a block are that large
    inner = (shape.layers - 1) * (4 - shape.fused) * widest if blocks and not setup.checkpointing else 0
    kept = Part("activations", max(total + ends - inner, 0.0), inner)
    rounded = [part("activations", (2 * size for size in shape.parameters))] if setup.autocast else []
    return [kept, part("activations", [setup.computed * tokens * shape.intermediate], times=2), *rounded]


def softmax_part(shape: ModelShape, setup: Setup) -> Part:
    """The softmax of attention, as far as it is kept on the CPU (`models/fast/attention_cpu.py`), fp32."""
    pair = PairSegment(start=0, prefix=setup.prefix, chosen=setup.branch, rejected=setup.branch)
    blocks = [block for block in query_blocks([pair]) if setup.cpu and keeps_weights(block)]
    layers = 1 if setup.checkpointing else shape.layers
    sizes = (4 * shape.heads * (block.end - block.start) * block.keys for block in blocks)
    return part("softmax", sizes, times=setup.pairs * layers)


def head_part(shape: ModelShape, setup: Setup) -> Part:
    """The output layer's logits in fp32, a chunk of them at a time, which become their softmax and its gradient."""
    elements = min(setup.counted * shape.vocab, CHUNK_ELEMENTS)
    return part("logits head", [4 * elements, *([2 * elements] if setup.bf16 else [])])


def gradient_parts(shape: ModelShape, setup: Setup) -> tuple[list[Part], list[Part]]:
    """Gradients and buffers while they are exchanged, and in the optimizer's step."""
    trained, element = sum(shape.trained), setup.element
    share = trained / setup.world
    norm = part("gradients", [8 * max(min(share, max(shape.trained)), 1)])  # DeepSpeed takes norms in fp64
    if setup.stage == 0:
        gradients = [part("gradients", (4 * size for size in shape.trained))]
        return gradients, gradients
    bucket = element * bucket_elements(trained, setup)
    overlapped = 2 if setup.stage == 2 and not setup.cpu else 1
    if setup.stage == 3:  # the bucket itself and the partition live with the engine; an exchange takes two copies
        step = [part("gradients", [4 * share]), norm] if setup.offload == "none" else [norm]
        return [part("communication", [bucket], times=2)], step
    exchange = [part("communication", [bucket], times=overlapped + 1)]
    partition = [part("gradients", [element * share])] if setup.offload == "none" else []
    if setup.stage == 1:  # whole gradients; on the CPU they leave as the bucket is written to
        left = 1 - bucket / (element * trained) if setup.cpu else 1.0
        exchange.append(part("gradients", (element * size for size in shape.trained), times=left))
    step = [part("communication", [bucket], times=overlapped), norm, *partition]
    if element == 2 and setup.offload == "none":
        step.append(part("gradients", [4 * share]))
    return exchange + partition, step
