"""Whether models and loss can take the tokenised data: token ids and lengths, weights and target margins of pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minimind_dpo.config import TrainConfig
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import UserError
from minimind_dpo.losses import LOSSES
from minimind_dpo.models.fast.compiling import check_compiler
from minimind_dpo.models.probe import embedding_rows
from minimind_dpo.models.tokenizer_files import tokenizer_place

logger = logging.getLogger(__name__)

_SIDES = ("chosen_input_ids", "rejected_input_ids")
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_OFFSETS = range(4)  # rows that some position tables have for padding beside those of positions


def check_fits(
    models: Iterable[PreTrainedModel | None], tokenizer: Any, data: Iterable[TokenizedData], max_length: int
) -> None:
    """Refuse token ids that a model does not embed, and sides longer than its table of positions.

    Raises:
        UserError: the data has such.
    """
    tables = [part.dataset.with_format("arrow") for part in data]
    for model in models:
        if model is not None:
            _check_ids(model, tokenizer, tables)
            _check_lengths(model, tables, max_length)


def check_reference_tokenizer(
    reference: str, tokenizer: Any, data: Iterable[TokenizedData], setting: str = "ref_model_name_or_path"
) -> None:
    """Refuse a reference to which the data's token ids mean other tokens than to the policy.

    A reference that comes without a tokenizer is taken to have been trained with the policy's.

    Raises:
        UserError: naming such a token.
    """
    place = tokenizer_place(reference)
    try:
        theirs = load_tokenizer(place) if place is not None else None
    except UserError:
        theirs = None
    if theirs is None or (names := tokenizer.get_vocab()) == (others := theirs.get_vocab()):
        return
    name_there = {number: name for name, number in others.items()}
    differing = [number for name, number in names.items() if name_there.get(number) != name]
    tables = [part.dataset.with_format("arrow") for part in data]
    if differing and (found := _first_used(tables, differing)) is not None:
        here = tokenizer.convert_ids_to_tokens(found)
        raise UserError(
            f"{setting}: {reference} has another tokenizer: to it token {found} is "
            f"{name_there.get(found)!r}, to the policy's {here!r}, and the data has it. A reference must have been "
            "trained with the policy's tokenizer; name another one, or take a loss_type that needs none (simpo)"
        )


def _first_used(tables: Iterable[Any], ids: list[int]) -> int | None:
    """The first of some token ids that the data has."""
    wanted = pa.array(ids, pa.int32())
    for table in tables:
        for batch in table.select_columns(list(_SIDES)).iter(batch_size=4096):
            for side in _SIDES:
                tokens = pc.list_flatten(_column(batch, side))
                if len(used := tokens.filter(pc.is_in(tokens, wanted))):
                    return int(used[0].as_py())
    return None


def check_loss(losses: Iterable[str], data: TokenizedData, name: str) -> bool:
    """Whether the pairs' own target margins are used; weights that a loss has no use for are refused.

    Args:
        losses: of the run.
        data: some of its pairs.
        name: the setting that they come from.

    Raises:
        UserError: pairs have weights, and a loss takes pairs apart.
    """
    wanted = {name: LOSSES[name] for name in losses}
    table = data.dataset.with_format("arrow")
    weighing = [name for name, loss in wanted.items() if not loss.weighs_pairs]
    if weighing and any(_any(batch, "weight", 1.0) for batch in table.select_columns(["weight"]).iter(4096)):
        raise UserError(
            f"loss_type: {', '.join(weighing)} takes pairs apart, so they can't have weights, and {name} has some "
            "(the rows' weight, or that of a source); remove them, or take another loss_type"
        )
    if not any(_any(batch, "margin", 0.0) for batch in table.select_columns(["margin"]).iter(4096)):
        return False
    used = [name for name, loss in wanted.items() if "margins" in loss.names]
    logger.info(
        "%s: pairs have target margins (column margin): %s",
        name,
        f"used by {', '.join(used)}" if used else f"not used, since {', '.join(wanted)} has none",
    )
    return bool(used)


def _any(batch: pa.Table, column: str, usual: float) -> bool:
    """Whether a column has anything but the usual value and nothing."""
    return bool(pc.any(pc.not_equal(_column(batch, column), usual)).as_py())


def _check_ids(model: PreTrainedModel, tokenizer: Any, tables: list[Any]) -> None:
    rows = embedding_rows(model)
    if len(tokenizer) > rows and (largest := _largest(tables, pc.list_flatten)) >= rows:
        raise UserError(
            f"tokenizer_name_or_path: the data has token id {largest} (the tokenizer has {len(tokenizer)} tokens) but "
            f"the model embeds only {rows}; name the tokenizer the model was trained with"
        )


def _check_lengths(model: PreTrainedModel, tables: list[Any], max_length: int) -> None:
    limit = _configured_limit(model)
    if limit is None or max_length - 1 <= limit:
        return
    longest = _largest(tables, pc.list_value_length) - 1  # the last token is a target, never an input
    if longest <= limit:
        return
    if has_position_table(model, limit):
        raise UserError(
            f"max_length: {max_length} lets sides of {longest + 1} tokens through, but {type(model).__name__} has "
            f"learned positions for {limit} only; set max_length to {limit} or less"
        )
    logger.info("sides of up to %d tokens are longer than the %d that the model names as its own", longest + 1, limit)


def has_position_table(model: PreTrainedModel, limit: int) -> bool:
    """Whether a model looks positions up in a table with an end, learned or not; rotary ones are computed."""
    rows = {limit + offset for offset in _OFFSETS}
    tokens = model.get_input_embeddings()
    for module in model.modules():
        kind = type(module).__name__.lower()
        if module is tokens or "rotary" in kind or "rope" in kind:
            continue
        if isinstance(module, nn.Embedding) and module.num_embeddings in rows:
            return True
        if any(
            buffer is not None and buffer.dim() >= 2 and _rows(buffer) in rows for buffer in module._buffers.values()
        ):
            return True
    return False


def _rows(buffer: Any) -> int:
    """Positions in a table [positions, width] or in a causal mask [1, 1, positions, positions]."""
    return int(buffer.shape[-2] if buffer.dim() > 2 else buffer.shape[0])


def _configured_limit(model: PreTrainedModel) -> int | None:
    """The positions that a model's configuration names, by whatever name."""
    config = model.config.get_text_config()
    limits = [value for name in _LIMITS if isinstance(value := getattr(config, name, None), int) and value > 0]
    return min(limits, default=None)


def _largest(tables: Iterable[Any], measure: Any) -> int:
    """The largest of what `measure` makes of the token ids of both sides."""
    largest = [
        pc.max(measure(_column(batch, side))).as_py()
        for table in tables
        for batch in table.select_columns(list(_SIDES)).iter(batch_size=4096)
        for side in _SIDES
    ]
    return max(largest)


def _column(batch: pa.Table, name: str) -> pa.Array:
    return batch.column(name).combine_chunks()


def end_token_ids(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """What ends an answer, by the tokenizer and by the model's settings of generation, ascending."""
    told = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])}
    return torch.tensor(sorted(token for token in ids if token is not None), dtype=torch.long)


def check_compiles(config: TrainConfig, engine: Engine) -> None:
    """Refuse `torch_compile` where there is nothing to compile, or nothing to compile with.

    Raises:
        UserError: with what to change.
    """
    if not config.torch_compile:
        return
    obstacles = {
        "gradient_checkpointing: true": config.gradient_checkpointing,
        "dropout above 0": config.dropout > 0 or config.lora_dropout > 0,
        f"attn_implementation: {config.attn_implementation}": not config.attends_pairs,
        "ZeRO 3, which gathers weights layer by layer": engine.gathers_weights,
    }
    if met := [name for name, is_there in obstacles.items() if is_there]:
        raise UserError(f"torch_compile: does not go with {met[0]}; leave one of the two out")
    check_compiler(engine.device)
