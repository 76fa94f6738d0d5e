"""MiniMind's raw weight files: what their keys and shapes say, and the transformers model each one is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind_dpo.errors import UserError
from minimind_dpo.models.minimind import MiniMindMoeConfig, MiniMindMoeForCausalLM

MODEL_CLASSES: dict[tuple[int, bool], tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    (2, False): (LlamaConfig, LlamaForCausalLM),
    (2, True): (MiniMindMoeConfig, MiniMindMoeForCausalLM),
    (3, False): (Qwen3Config, Qwen3ForCausalLM),
    (3, True): (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
DEFAULT_HEADS = 8  # generation 2: not in the weights, MiniMind's own default
RMS_NORM_EPS = {2: 1e-5, 3: 1e-6}
ROUTING: dict[int, dict] = {
    2: {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01},
    3: {"num_experts_per_tok": 1, "router_aux_loss_coef": 5e-4, "norm_topk_prob": True},
}
EMBEDDING_KEYS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class WeightLayout:
    """Everything that keys and shapes of a MiniMind weight file tell; sizes are numbers of elements.

    Attributes:
        generation: 2, or 3 where queries and keys are normalised.
        query_size: rows of `q_proj`, heads times head dimension.
        key_value_size: rows of `k_proj`.
        head_dim: None in generation 2, whose weights don't tell.
        num_experts: routed experts a layer, 0 in a dense model.
        num_shared_experts: experts that every token passes.
    """

    generation: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    query_size: int
    key_value_size: int
    head_dim: int | None
    num_experts: int
    num_shared_experts: int

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.num_experts > 0


def _count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest index that `pattern` captures among the keys, 0 without a match."""
    return max((int(match[1]) + 1 for key in keys if (match := re.match(pattern, key))), default=0)


def read_layout(shapes: Mapping[str, tuple[int, ...]], source: str) -> WeightLayout:
    """Tell generation, kind and sizes from keys and shapes, and check every single one of them.

    Args:
        shapes: the shape of each tensor by its key in the file.
        source: the file's name, for messages.

    Raises:
        UserError: the file is not MiniMind's, or a key is missing, unexpected or of a wrong shape.
    """
    layer = "model.layers.0."
    norms = [shape for name, shape in shapes.items() if re.search(r"\.[qk]_norm\.weight$", name)]
    head_dim = norms[0][0] if norms and norms[0] else None
    generation = 2 if head_dim is None else 3
    num_experts = _count(shapes, r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.")
    shared_experts = _count(shapes, r"model\.layers\.\d+\.mlp\.shared_experts\.(\d+)\.")
    telling = (
        "model.embed_tokens.weight",
        f"{layer}self_attn.q_proj.weight",
        f"{layer}self_attn.k_proj.weight",
        f"{layer}mlp.{'experts.0.' if num_experts else ''}gate_proj.weight",
    )
    absent = [key for key in telling if len(shapes.get(key, ())) != 2]
    if absent:
        raise UserError(
            f"{source}: not MiniMind weights: missing or not a matrix: {', '.join(absent)}. Expected is a "
            "file such as out/full_sft_512.pth, as MiniMind's training scripts save it."
        )
    embedding, query, key, gate = (shapes[name] for name in telling)
    layout = WeightLayout(
        generation=generation,
        vocab_size=embedding[0],
        hidden_size=embedding[1],
        intermediate_size=gate[0],
        num_hidden_layers=_count(shapes, r"model\.layers\.(\d+)\."),
        query_size=query[0] if generation == 3 else embedding[1],
        key_value_size=key[0],
        head_dim=head_dim,
        num_experts=num_experts,
        num_shared_experts=shared_experts if generation == 2 and num_experts else 0,
    )
    _check_shapes(shapes, expected_shapes(layout), source)
    return layout


def expected_shapes(layout: WeightLayout) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a complete MiniMind weight file."""
    hidden, intermediate = layout.hidden_size, layout.intermediate_size
    wide, narrow = (intermediate, hidden), (hidden, intermediate)
    swiglu = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (layout.query_size, hidden),
        "self_attn.k_proj": (layout.key_value_size, hidden),
        "self_attn.v_proj": (layout.key_value_size, hidden),
        "self_attn.o_proj": (hidden, layout.query_size),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if layout.head_dim is not None:
        layer |= {"self_attn.q_norm": (layout.head_dim,), "self_attn.k_norm": (layout.head_dim,)}
    blocks = [f"experts.{index}." for index in range(layout.num_experts)]
    blocks += [f"shared_experts.{index}." for index in range(layout.num_shared_experts)]
    if layout.is_moe:
        layer["mlp.gate"] = (layout.num_experts, hidden)
    layer |= {f"mlp.{block}{name}": shape for block in blocks or [""] for name, shape in swiglu.items()}
    shapes = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(layout.num_hidden_layers)
        for name, shape in layer.items()
    }
    embeddings = dict.fromkeys(EMBEDDING_KEYS, (layout.vocab_size, hidden))
    return shapes | embeddings | {"model.norm.weight": (hidden,)}


def _check_shapes(shapes: Mapping[str, tuple], expected: Mapping[str, tuple], source: str) -> None:
    """Raise a UserError that names every missing and unexpected key and every wrong shape."""
    problems = [f"missing {key}" for key in expected if key not in shapes]
    problems += [f"unexpected {key}" for key in shapes if key not in expected]
    problems += [
        f"{key} has shape {tuple(shapes[key])} where {tuple(shape)} fits the rest"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != tuple(shape)
    ]
    if problems:
        raise UserError(f"{source}: not a complete MiniMind weight file: {summarize(problems)}")


def summarize(problems: list[str], limit: int = 12) -> str:
    """Join problems into one message and count what goes beyond `limit`."""
    rest = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def minimind_config(layout: WeightLayout, num_attention_heads: int | None, source: str) -> PreTrainedConfig:
    """Build the complete transformers configuration of a MiniMind weight file.

    `pad_token_id` stays None on purpose: transformers would make it the embedding's `padding_idx` and drop
    that token's gradient, which MiniMind does not. `generate` finds it in `generation_config`.

    Args:
        layout: what the file tells.
        num_attention_heads: needed in generation 2 where the model hasn't 8; generation 3 tells it itself.
        source: the file's name, for messages.

    Raises:
        UserError: the number of heads does not fit the weights.
    """
    heads = _attention_heads(layout, num_attention_heads, source)
    head_dim = layout.query_size // heads
    options: dict = {
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_hidden_layers": layout.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": layout.key_value_size // head_dim,
        "head_dim": head_dim,
        "rms_norm_eps": RMS_NORM_EPS[layout.generation],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "minimind_generation": layout.generation,
    }
    if layout.is_moe:
        sizes = {"num_experts": layout.num_experts}
        if layout.generation == 2:
            sizes["num_shared_experts"] = layout.num_shared_experts
        else:
            sizes["moe_intermediate_size"] = layout.intermediate_size
        options |= sizes | ROUTING[layout.generation]
    return MODEL_CLASSES[layout.generation, layout.is_moe][0](**options)


def _attention_heads(layout: WeightLayout, requested: int | None, source: str) -> int:
    """The number of query heads, checked against the shapes."""
    heads = DEFAULT_HEADS if requested is None else requested
    if layout.head_dim is not None:
        heads = layout.query_size // layout.head_dim
        if requested not in (None, heads):
            raise UserError(
                f"{source}: num_attention_heads is {requested}, but these generation-3 weights have {heads} "
                f"heads of dimension {layout.head_dim}. Leave the setting out."
            )
    head_dim = layout.query_size // heads if heads > 0 else 0
    key_value_heads = layout.key_value_size // head_dim if head_dim else 0
    fits = heads * head_dim == layout.query_size and key_value_heads * head_dim == layout.key_value_size
    if not fits or not key_value_heads or heads % key_value_heads or head_dim % 2:
        raise UserError(
            f"{source}: {heads} attention heads don't fit weights with {layout.query_size} query and "
            f"{layout.key_value_size} key rows. Set num_attention_heads to what the model was trained with "
            f"(MiniMind's default is {DEFAULT_HEADS})."
        )
    return heads


def minimind_view(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state under MiniMind's keys: stacked experts become one set of matrices an expert.

    The tensors are views of the model's own memory, so they can be read to save and written to load.
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        prefix, _, name = key.rpartition(".")
        if name == "gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2, dim=0) for matrix in tensor):
                result[f"{prefix}.{expert}.gate_proj.weight"] = gate
                result[f"{prefix}.{expert}.up_proj.weight"] = up
        elif name == "down_proj":
            result |= {f"{prefix}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            result[key] = tensor
    return result
