"""Whether a model can take the tokenised data: its token ids, and its sides' lengths where positions are learned."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.errors import UserError
from minimind_dpo.models.probe import embedding_rows

logger = logging.getLogger(__name__)

_SIDES = ("chosen_input_ids", "rejected_input_ids")
_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_OFFSETS = range(4)  # rows that some position tables have for padding beside those of positions


def check_fits(
    models: Iterable[PreTrainedModel | None], tokenizer: Any, data: Iterable[TokenizedData | None], max_length: int
) -> None:
    """Refuse token ids that a model does not embed, and sides longer than its table of positions.

    Raises:
        UserError: the data has such.
    """
    tables = [part.dataset.with_format("arrow") for part in data if part is not None]
    for model in models:
        if model is not None:
            _check_ids(model, tokenizer, tables)
            _check_lengths(model, tables, max_length)


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
