"""What a run says of itself at its start: what is trained, on what, and how."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as arrow
from transformers import PreTrainedModel

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import TrainConfig
from minimind_dpo.config.names import is_raw_weights
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.sharding import full_shape
from minimind_dpo.training.data import RunData
from minimind_dpo.training.recipes import generation

logger = logging.getLogger(__name__)


def introduce(config: TrainConfig, engine: Engine, policy: PreTrainedModel, data: RunData, state: TrainerState) -> None:
    """Say what is trained on what and how; where the reference and the library of products come from is said before."""
    for title, text in (
        ("policy", _policy(config, policy)),
        ("pairs", _pairs(config, data)),
        ("loss", _loss(config)),
        ("steps", _steps(config, engine, data, state)),
        ("precision", _precision(config, engine)),
    ):
        logger.info("%-10s %s", title, text)


def _policy(config: TrainConfig, policy: Any) -> str:
    raw = is_raw_weights(Path(config.model_name_or_path).expanduser())
    kind = f"MiniMind generation {generation(policy)} ({policy.config.model_type})" if raw else policy.config.model_type
    sizes = [(math.prod(full_shape(one)), one.requires_grad) for one in policy.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    parts = [
        kind,
        f"{_million(total)} parameters",
        "all trained" if total == trained else f"{_million(trained)} trained",
    ]
    if heads := getattr(policy.config, "num_attention_heads", None):
        assumed = raw and generation(policy) == "2" and config.num_attention_heads is None
        parts.append(
            f"{heads} heads" + (" (assumed: the weights do not tell; --num_attention_heads)" if assumed else "")
        )
    return ", ".join(parts)


def _million(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"


def _pairs(config: TrainConfig, data: RunData) -> str:
    median, longest, full = side_lengths(data.train, config.max_length)
    cut = f"{full} reach max_length {config.max_length} and are cut there" if full else "none is cut"
    held_out = sum(len(part.positions) for part in data.needed()[1:])
    more = f"; {held_out} held out" if held_out else ""
    return f"{data.order.num_pairs}; a side has {median} tokens (median), {longest} at most; {cut}{more}"


def side_lengths(data: TokenizedData, max_length: int) -> tuple[int, int, int]:
    """Tokens of a side, both sides together: the median, the most; and pairs with a side of `max_length`."""
    table = data.dataset.with_format("arrow")
    sides = [
        arrow.list_value_length(table[:][f"{side}_input_ids"]).to_numpy() for side in ("chosen", "rejected")
    ]  # of offsets alone: no token is read
    both = np.concatenate(sides)
    return int(np.median(both)), int(both.max()), int((np.maximum(*sides) >= max_length).sum())


def _loss(config: TrainConfig) -> str:
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    names = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(config.loss_type, weights, strict=True)
    )
    smoothing = f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""
    return f"{names}, beta {config.beta:g}{smoothing}; tokens that count: {config.completion_mask}"


def _steps(config: TrainConfig, engine: Engine, data: RunData, state: TrainerState) -> str:
    ranks = "1 process" if engine.world_size == 1 else f"{engine.world_size} processes"
    under = " under DeepSpeed" if engine.divides_states else ""
    begun = f", {state.step} of them done" if state.step else ""
    warmup = f", {config.warmup_ratio:.0%} warmup" if config.warmup_ratio else ""
    return (
        f"{data.steps} of {data.order.global_batch} pairs on {ranks}{under}{begun} "
        f"({data.steps / data.order.steps_per_epoch:.3g} epochs); "
        f"{config.optim}, rate {config.learning_rate:g}, {config.lr_scheduler_type}{warmup}"
    )


def _precision(config: TrainConfig, engine: Engine) -> str:
    if engine.precision == "no":
        return "fp32" + (f", products by {config.matmul}" if engine.device.type == "cpu" else "")
    return f"{engine.precision}, weights rounded: {config.weight_rounding}"
