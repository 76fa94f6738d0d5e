"""A model written for others: as a transformers directory or as MiniMind's raw weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from minimind_dpo.checkpoints.directory import checkpoint_problem
from minimind_dpo.checkpoints.files import FragmentReader
from minimind_dpo.errors import TrainingError, UserError
from minimind_dpo.files import replacing, writing
from minimind_dpo.models.card import write_card
from minimind_dpo.models.gguf import convert, find_converter
from minimind_dpo.models.loading import checkpoint_config, load_model
from minimind_dpo.models.overrides import parse_dtype
from minimind_dpo.models.places import ADAPTER_CONFIG, is_checkpoint, locate_model
from minimind_dpo.models.portable import make_portable
from minimind_dpo.models.probe import check_written, probe
from minimind_dpo.models.saving import SHARD_BYTES, describe_model, seal_model, split_shards, write_shards
from minimind_dpo.models.tokenizer_files import copy_tokenizer
from minimind_dpo.models.weights import (
    MODEL_CLASSES,
    WeightLayout,
    minimind_config,
    minimind_view,
    read_layout,
    summarize,
)

FORMATS = ("hf", "minimind", "gguf")

# What MiniMind's code has built in, by the names that transformers' configurations give it.
BUILT_IN = (
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "head_dim",
    "num_key_value_heads",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


def export_model(
    model_path: str | Path,
    format: str,
    output: str | Path,
    dtype: str | None = None,
    num_attention_heads: int | None = None,
    llama_cpp: str | None = None,
) -> Path:
    """Write a model for others to use; whole or not at all, and never over something that is there.

    Args:
        model_path: whatever `load_model` opens; a run directory gives its final model, a checkpoint the policy of
            its step in fp32, put together without the training job however many ranks wrote it.
        format: `hf` (a `save_pretrained` directory, with the tokenizer where the source has one, and for a model
            of a run with a model card), `minimind` (one `.pth` file with MiniMind's keys, which its own code loads
            strictly) or `gguf` (one `.gguf` file, by llama.cpp's converter).
        output: the directory to create; for `minimind` also a directory to put `dpo_<hidden_size>[_moe].pth`
            into, or a path that ends in `.pth`; for `gguf` a directory to put `model.gguf` into, or the file.
        dtype: `float32`, `float16` or `bfloat16`; by default, or with `auto`, the source's for `hf` and `gguf`, and
            float16 for `minimind`.
        num_attention_heads: of generation-2 raw weights, see `load_model`.
        llama_cpp: for `gguf`, a checkout of llama.cpp; by default its converter is looked for on PATH.

    Returns:
        The directory or file that was written.

    Raises:
        UserError: the source can't be loaded or isn't shaped like MiniMind, a weight doesn't fit into `dtype`,
            the output exists, or the converter is absent or fails.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; use {', '.join(FORMATS)}.")
    wanted = None if dtype is None else parse_dtype(dtype)
    target = Path(output).expanduser()
    if format == "gguf":
        return _export_gguf(model_path, target, dtype, num_attention_heads, find_converter(llama_cpp))
    if format == "hf":
        _refuse_existing(target)
    location = locate_model(str(model_path))
    if location is not None and is_checkpoint(location) and format == "hf":
        if not (location / ADAPTER_CONFIG).is_file():
            return _export_checkpoint(location, target, wanted or torch.float32)
    model = load_model(model_path, dtype="auto", num_attention_heads=num_attention_heads)
    if format == "hf":
        return _export_hf(model, str(model_path), target, wanted)
    layout = minimind_layout(model, str(model_path))
    if target.suffix != ".pth":
        target = target / f"dpo_{layout.hidden_size}{'_moe' if layout.is_moe else ''}.pth"
    _refuse_existing(target)
    return _export_minimind(model, str(model_path), target, wanted or torch.float16)


def minimind_layout(model: PreTrainedModel, source: str) -> WeightLayout:
    """Check that MiniMind's own code would compute what this model computes.

    Raises:
        UserError: another architecture, extra weights, or settings that MiniMind's code has built in otherwise.
    """
    classes = [model_class for _, model_class in MODEL_CLASSES.values()]
    if type(model) not in classes:
        names = ", ".join(model_class.__name__ for model_class in classes)
        raise UserError(
            f"{source}: a {type(model).__name__} can't be written as MiniMind weights, only {names} can. "
            "Use --format hf."
        )
    state = minimind_view(model.state_dict())
    layout = read_layout({key: tuple(tensor.shape) for key, tensor in state.items()}, source)
    expected = minimind_config(layout, model.config.num_attention_heads, source)
    settings = BUILT_IN if layout.generation == 3 else (*BUILT_IN, "tie_word_embeddings")
    differences = [
        f"{name} is {getattr(model.config, name, None)} where MiniMind has {getattr(expected, name, None)}"
        for name in settings
        if getattr(model.config, name, None) != getattr(expected, name, None)
    ]
    if differences:
        raise UserError(
            f"{source}: MiniMind's code would compute something else with these weights: {summarize(differences)}. "
            "Use --format hf."
        )
    return layout


def _export_minimind(model: PreTrainedModel, source: str, target: Path, dtype: torch.dtype) -> Path:
    """Write one file of contiguous, separate tensors under MiniMind's keys."""
    _cast(model, dtype)
    state = {key: tensor.clone().contiguous() for key, tensor in minimind_view(model.state_dict()).items()}
    _check_overflow(state, dtype, source)
    with writing(target, "--output"), replacing(target) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
        check_written(
            temporary, probe(_cast(model, torch.float32)), num_attention_heads=model.config.num_attention_heads
        )
    return target


def _export_gguf(source: str | Path, target: Path, dtype: str | None, heads: int | None, converter: Path) -> Path:
    """Write a directory as `hf` does, and have it converted."""
    target = target if target.suffix == ".gguf" else target / "model.gguf"
    _refuse_existing(target)
    with writing(target, "--output"), replacing(target) as temporary:
        model = export_model(source, "hf", temporary.parent / target.stem, dtype, heads)
        if not (model / "tokenizer_config.json").is_file():
            raise UserError(
                f"{source}: no tokenizer beside it, which a .gguf file holds too; export a directory with one"
            )
        convert(converter, model, temporary, None if dtype == "auto" else dtype)
    return target


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give all parameters another type, in place; what a model computes for itself (rotary frequencies) stays."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _export_hf(model: PreTrainedModel, source: str, target: Path, dtype: torch.dtype | None) -> Path:
    """Write a `save_pretrained` directory, with the source's tokenizer files as they are."""
    if dtype is not None:
        _cast(model, dtype)
        _check_overflow(model.state_dict(), dtype, source)
    with writing(target, "--output"), replacing(target) as temporary:
        model.save_pretrained(temporary)
        copy_tokenizer(source, temporary)
        make_portable(temporary)
        seal_model(temporary)
        write_card(source, temporary)
        check_written(temporary, probe(_cast(model, torch.float32)))
    return target


def _export_checkpoint(checkpoint: Path, target: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> Path:
    """Put the fragments of a checkpoint together, a file at a time: the whole model is never in memory."""
    if problem := checkpoint_problem(checkpoint):
        raise UserError(f"{checkpoint}: {problem}")
    reader = FragmentReader(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint_config(checkpoint), dtype=dtype)
    sized = [(name, parameter.numel() * parameter.element_size()) for name, parameter in model.named_parameters()]
    shards = split_shards(sized, shard_bytes)

    def tensors() -> Iterator[dict[str, Tensor]]:
        for names in shards:
            shard = {name: reader.weight(name).to(dtype) for name in names}
            _check_overflow(shard, dtype, str(checkpoint))
            yield shard

    with writing(target, "--output"), replacing(target) as temporary:
        temporary.mkdir()
        write_shards(model, tensors(), len(shards), temporary)
        describe_model(model, temporary)
        copy_tokenizer(str(checkpoint), temporary)
        make_portable(temporary)
        seal_model(temporary)
        write_card(str(checkpoint), temporary)
        _check_weights(temporary, reader, dtype)
    return target


def _check_weights(written: Path, reader: FragmentReader, dtype: torch.dtype) -> None:
    """Compare what was written, as it is read, with a checkpoint, one weight at a time.

    Raises:
        TrainingError: they differ.
    """
    parameters = load_model(written, dtype=dtype).named_parameters()
    wrong = [name for name, parameter in parameters if not torch.equal(parameter, reader.weight(name).to(dtype))]
    if wrong:
        raise TrainingError(f"{written.name}: not what the checkpoint holds: {summarize(wrong)}. Please report this.")


def _check_overflow(state: dict[str, Tensor], dtype: torch.dtype, source: str) -> None:
    """Refuse weights that were finite before the conversion and are not after it."""
    bad = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(
            f"{source}: weights beyond the range of {dtype}: {summarize(bad)}. Use --dtype float32 or bfloat16."
        )


def _refuse_existing(target: Path) -> None:
    """Raise unless the target is absent or an empty directory."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: already there and not empty; give another --output or remove it first.")
