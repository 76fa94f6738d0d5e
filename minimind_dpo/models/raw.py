"""MiniMind's raw weight files, read and made into the transformers models that they are."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from minimind_dpo.engine.sharding import gathered
from minimind_dpo.errors import UserError
from minimind_dpo.models.overrides import apply_overrides
from minimind_dpo.models.weights import (
    EMBEDDING_KEYS,
    MODEL_CLASSES,
    WeightLayout,
    minimind_config,
    minimind_view,
    read_layout,
    summarize,
)

logger = logging.getLogger(__name__)

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DDP = "module."


def read_raw_weights(path: Path) -> dict[str, Tensor]:
    """Read a `.pth` file of tensors, mapped into memory where its format allows it; no code of it is run.

    Raises:
        UserError: damaged, or something else than a mapping of names to floating-point tensors.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 can't be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: not a readable file of weights: damaged, cut short, or it holds more than tensors. "
            "Copy it again, or save it anew with torch.save of a state_dict."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        raise UserError(f"{path}: a training checkpoint; use the weight file, such as out/full_sft_512.pth.")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a file of named tensors, as MiniMind's training scripts save it.")
    state = _unwrapped(state, path)
    wrong = [f"{key} is {value.dtype}" for key, value in state.items() if not value.is_floating_point()]
    if wrong:
        raise UserError(f"{path}: weights must be floating-point numbers: {summarize(wrong)}")
    return state


def _unwrapped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under the model's own keys, without what `torch.compile`, DDP or checkpointing put into them."""
    plain = {".".join(part for part in key.split(".") if part not in _WRAPPERS): value for key, value in state.items()}
    while plain and all(key.startswith(_DDP) for key in plain):
        plain = {key.removeprefix(_DDP): value for key, value in plain.items()}
    if len(plain) < len(state):
        raise UserError(f"{path}: some weights are there twice, with and without the prefix of a wrapper.")
    if plain.keys() != state.keys():
        logger.warning("%s: keys such as %s are read without the prefixes of wrappers", path, next(iter(state)))
    return plain


def raw_layout(path: Path) -> WeightLayout:
    """What the keys and shapes of a raw weight file tell."""
    return read_layout({key: tuple(tensor.shape) for key, tensor in read_raw_weights(path).items()}, str(path))


def load_raw(
    path: Path,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    num_attention_heads: int | None,
    overrides: dict,
) -> PreTrainedModel:
    """Build the transformers model that MiniMind's raw weights are, and copy them into it."""
    state = read_raw_weights(path)
    layout = read_layout({key: tuple(tensor.shape) for key, tensor in state.items()}, str(path))
    config = minimind_config(layout, num_attention_heads, str(path))
    config.tie_word_embeddings = _embeddings_tied(state, layout, path)
    config.dtype = dtype or state[EMBEDDING_KEYS[0]].dtype
    config._attn_implementation = attn_implementation
    apply_overrides(config, overrides, str(path))
    model_class = MODEL_CLASSES[layout.generation, layout.is_moe][1]
    try:
        with no_init_weights():
            model = model_class._from_config(config, dtype=config.dtype)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: {error}") from error
    model.tie_weights()
    # Every parameter is written once, in place: no second copy of the model, whatever the file's dtype.
    for name, parameter in model.state_dict(keep_vars=True).items():
        with torch.no_grad(), gathered([parameter], modify=True):
            for key, target in minimind_view({name: parameter}).items():
                target.copy_(state[key])
    model.generation_config.pad_token_id = 0
    return model


def _embeddings_tied(state: dict[str, Tensor], layout: WeightLayout, path: Path) -> bool:
    """Whether input and output embeddings are one matrix: always in generation 2, mostly in generation 3."""
    tied = torch.equal(state[EMBEDDING_KEYS[0]], state[EMBEDDING_KEYS[1]])
    if not tied and layout.generation == 2:
        raise UserError(
            f"{path}: {' and '.join(EMBEDDING_KEYS)} differ, but MiniMind's generation 2 has one matrix for "
            "both: the file is damaged or not MiniMind's."
        )
    return tied
