"""What autograd keeps of a packed batch, and the short-lived tensors beside it: one function a term, bytes.

In the formulas h is the hidden size, q and k the rows of all query and of all key heads, f the inner size of a
feed-forward block, c the bytes of an element that a linear layer puts out (`RunShape.output_bytes`). The terms are the
tensors that `models/fast/nodes.py`, `models/fast/attention.py` and transformers' Llama and Qwen blocks save for the
backward pass.
"""

from __future__ import annotations

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.engine.cpu import has_bf16_units
from minimind_dpo.models.fast.attention_cpu import keeps_weights, query_blocks
from minimind_dpo.models.fast.head import MOST_LOGITS
from minimind_dpo.planning.allocation import Allocation, allocate
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import ModelShape


def fuses_norms(shape: ModelShape, run: RunShape) -> bool:
    """Whether norms are nodes that keep their input only; on the CPU these are for fp32 weights."""
    return shape.fused and (run.weight_bytes == 4 or not run.cpu)


def norm_input(shape: ModelShape, run: RunShape) -> int:
    """Bytes of an element of a norm's input, as it is kept: what torch's own operations compute with is fp32."""
    return run.output_bytes if fuses_norms(shape, run) and not run.autocast else 4


def keeps_normalised(shape: ModelShape, run: RunShape) -> bool:
    """Whether a norm keeps its normalised input: for its weight's gradient, unless it is a node."""
    return not shape.adapters and not fuses_norms(shape, run)


def norm_bytes(shape: ModelShape, run: RunShape) -> float:
    """A layer's two norms, bytes a token: inputs, the outputs that linear layers keep, and normalised inputs.

    2 (i h + c h), and 2 c h where normalised inputs are kept; i is 4 or, of nodes and half-precision weights, c
    autocast: 2 x 4 h + 2 c h; without nodes, or with experts on a CPU, 5 c h, since each linear layer rounds its input
    for itself, and 2 x 4 h where they are kept
    """
    hidden, inputs = shape.hidden, 2 * norm_input(shape, run) * shape.hidden
    if run.autocast:
        apart = run.cpu and shape.routed > 0
        kept = keeps_normalised(shape, run) or apart
        rounded = 2 if shape.fused and not apart else 5
        return inputs + kept * 2 * 4 * hidden + rounded * run.output_bytes * hidden
    return inputs + (keeps_normalised(shape, run) + 1) * 2 * run.output_bytes * hidden


def attention_bytes(shape: ModelShape, run: RunShape) -> float:
    """A layer's attention without its softmax, bytes a token: rotated queries, keys, values and the outputs.

    a (q + 2 k) + c q, where a is the bytes of an element that attention keeps (`attended_bytes`)
    GPU: c (2 q + k) + 4 a query head, and the keys and values gathered for one call: 2 c k (1 + prefix share of the
    tokens), in fp32 2 c q (1 + the same), since each query head gets keys of its own there
    normed heads: also 4 (q + k), c (q + k) of a fused norm, and c (q + k) where normalised inputs are kept
    """
    queries, keys, size = shape.query, shape.key_value, run.output_bytes
    kept: float = attended_bytes(run) * (queries + 2 * keys) + size * queries
    if not run.cpu:
        gathered = keys if size == 2 else queries
        kept = size * (2 * queries + keys) + 4 * shape.heads
        kept += size * 2 * gathered * (1 + run.prefix * run.pairs / run.tokens)
    if shape.normed_heads:
        normed = (size if fuses_norms(shape, run) else 4) + keeps_normalised(shape, run) * size
        kept += normed * (queries + keys)
    return kept


def attended_bytes(run: RunShape) -> int:
    """Bytes of an element that attention keeps: a CPU without units for bf16 attends in fp32 only."""
    return 4 if run.cpu and not has_bf16_units() else run.output_bytes


def feed_forward_bytes(shape: ModelShape, run: RunShape) -> float:
    """A layer's feed-forward blocks, bytes a token.

    c f (3 gated and fused: gate, the other branch, their product; 4 gated: also the activation; 2 without a gate)
    an expert that a token is sent to: also 3 c h
    GPU: such an expert c (4 f + 2 h) and 24 for the order of the tokens; where experts take all tokens, each of them
    as a block of its own and 4 h
    """
    size, inner = run.output_bytes, inner_tensors(shape) * shape.intermediate
    if run.cpu or not shape.routed:
        return size * (shape.dense_blocks * inner + shape.routed * (inner + 3 * shape.hidden))
    if shape.whole_experts:
        return size * (shape.dense_blocks + shape.whole_experts) * inner + 4 * shape.whole_experts * shape.hidden
    chosen = size * (4 * shape.intermediate + 2 * shape.hidden) + 24
    return size * shape.dense_blocks * inner + shape.routed * chosen


def inner_tensors(shape: ModelShape) -> int:
    """Tensors of the inner size that a feed-forward block keeps."""
    return 4 - shape.fused if shape.gated else 2


def lora_bytes(shape: ModelShape, run: RunShape) -> float:
    """A layer's LoRA matrices, bytes a token: c r for each pair of them."""
    return run.output_bytes * shape.lora_r * len(shape.adapters) / 2 / shape.layers


def layer_bytes(shape: ModelShape, run: RunShape, rows: int | None = None) -> float:
    """What one decoder layer keeps: tokens (norms + attention + LoRA) + rows x feed-forward.

    Args:
        shape: of the model.
        run: of the run.
        rows: tokens that the feed-forward block works on; all unless given.
    """
    tokens = run.tokens
    token_bytes = norm_bytes(shape, run) + attention_bytes(shape, run) + lora_bytes(shape, run)
    return tokens * token_bytes + (tokens if rows is None else rows) * feed_forward_bytes(shape, run)


def decoder_bytes(shape: ModelShape, run: RunShape) -> float:
    """What all layers keep, and the last norm's input with four tensors of the states that are scored.

    layers x layer + h (i tokens + 4 c scored), i as in `norm_bytes`; the last layer's feed-forward block works on
    scored tokens only
    checkpointing: layers x tokens c h (fp32 under autocast), and one layer that is computed again
    """
    tokens, layer = run.tokens, layer_bytes(shape, run)
    scored = min(tokens, run.scored)
    last = layer if shape.routed else layer_bytes(shape, run, scored)
    inputs = (4 if run.autocast else run.output_bytes) * tokens * shape.hidden
    layers = shape.layers * inputs + layer if run.checkpointing else (shape.layers - 1) * layer + last
    return layers + (norm_input(shape, run) * tokens + 4 * run.output_bytes * scored) * shape.hidden


def mapped_bytes(shape: ModelShape, run: RunShape) -> float:
    """What of `decoder_bytes` lies in mapped blocks: the inner tensors of feed-forward blocks where these are so large.

    (layers - 1) x inner tensors x tokens c f
    """
    widest = run.output_bytes * run.tokens * max(shape.intermediate * max(shape.dense_blocks, 1), shape.hidden)
    if run.checkpointing or not allocate("activations", [widest]).mapped:
        return 0
    return (shape.layers - 1) * inner_tensors(shape) * widest


def kept_activations(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """What autograd keeps when the forward pass ends, without attention's softmax and the output layer."""
    mapped = mapped_bytes(shape, run)
    return [Allocation("activations", max(decoder_bytes(shape, run) - mapped, 0.0), mapped)]


def working_activations(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The widest tensors that only an operation needs, two of them: 2 x tokens c f."""
    return [allocate("activations", [run.output_bytes * run.tokens * shape.intermediate], times=2)]


def dequantized_weight(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The 4-bit layer that a product is made with: b x largest."""
    if run.quantization == "none" or not shape.linear:
        return []
    return [allocate("activations", [run.frozen_bytes * max(shape.linear)])]


def kept_softmax(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The softmax of attention, as far as the CPU keeps it: a heads x queries x keys of each block of queries.

    a: `attended_bytes`. Source: `models/fast/attention_cpu.py`. GPUs keep none; with checkpointing one layer's exists
    at a time.
    """
    if not run.cpu:
        return []
    pair = PairSegment(start=0, prefix=run.prefix, chosen=run.branch, rejected=run.branch)
    blocks = [block for block in query_blocks([pair]) if keeps_weights(block)]
    layers = 1 if run.checkpointing else shape.layers
    sizes = (attended_bytes(run) * shape.heads * (block.end - block.start) * block.keys for block in blocks)
    return [allocate("softmax", sizes, times=run.pairs * layers)]


def head_logits(shape: ModelShape, run: RunShape) -> list[Allocation]:
    """The output layer's logits in fp32, which become their softmax and its gradient, and a bf16 copy under bf16.

    4 x min(scored x vocabulary, 2^25), and 2 x the same under bf16; there a CPU also multiplies a copy of the weight in
    fp32, 4 x vocabulary x h

    Source: `models/fast/head.py`, which makes no more of them at a time.
    """
    elements = min(run.scored * shape.vocab, MOST_LOGITS)
    copies = [2 * elements] if run.bf16 else []
    copies += [4 * shape.vocab * shape.hidden] if run.bf16 and run.cpu else []
    return [allocate("logits head", [4 * elements, *copies])]
