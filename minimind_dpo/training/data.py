"""The pairs of a run: tokenised, held out, and which of them it trains on when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind_dpo.config import TrainConfig
from minimind_dpo.config.data import named_sets
from minimind_dpo.data.order import PairOrder, total_steps
from minimind_dpo.data.prompts import Prompt, read_prompts
from minimind_dpo.data.sources import Source
from minimind_dpo.data.tokenized import TokenizedData, tokenize_files
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.ranks import main_first, stop_together
from minimind_dpo.errors import UserError
from minimind_dpo.models.tokenizer_files import tokenizer_place
from minimind_dpo.reference.cache import Needed


@dataclass(frozen=True)
class RunData:
    """The tokenised pairs of a run and which of them it trains on, when.

    Attributes:
        train: training pairs.
        eval: sets of held-out pairs, by name; that of a single set is empty.
        order: of the training pairs.
        steps: optimizer steps of the run.
        prompts: that the policy answers at each evaluation.
    """

    train: TokenizedData
    eval: dict[str, TokenizedData]
    order: PairOrder
    steps: int
    prompts: list[Prompt]

    def is_single_pass(self) -> bool:
        """Whether the run comes to no pair a second time."""
        return not self.eval and self.steps <= self.order.steps_per_epoch

    def parts(self) -> list[TokenizedData]:
        """All pairs that the run reads."""
        return [self.train, *self.eval.values()]

    def needed(self) -> list[Needed]:
        """The pairs that need reference log-probabilities."""
        held_out = (Needed(part, range(len(part))) for part in self.eval.values())
        return [Needed(self.train, _positions(self.order, self.steps)), *held_out]


def load_data(config: TrainConfig, engine: Engine, tokenizer: Any, stop: Callable[[], bool]) -> RunData:
    """Tokenise the data on the main process, or find it tokenised. Collective.

    Raises:
        StoppedEarly: `stop` said so on any rank.
    """
    with main_first(engine, "tokenize", stop, config.ddp_timeout) as go_on:
        train = _tokenize(config, config.train_data, tokenizer, go_on)
        held_out = held_out_sets(config, tokenizer, go_on)
    stop_together(engine, stop, "before the first step")
    global_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * engine.world_size
    order = PairOrder(len(train), global_batch, config.seed, config.shuffle)
    steps = total_steps(order.num_pairs, order.global_batch, config.num_train_epochs, config.max_steps)
    return RunData(train, held_out, order, steps, configured_prompts(config, held_out, tokenizer))


def tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer named, or the one that lies with the model (for raw weights: beside them, or in ../model).

    Raises:
        UserError: raw weights without a tokenizer.
    """
    if config.tokenizer_name_or_path:
        return config.tokenizer_name_or_path
    if (place := tokenizer_place(config.model_name_or_path)) is None:
        raise UserError(
            f"tokenizer_name_or_path: missing; raw weights ({config.model_name_or_path}) carry no tokenizer, and none "
            "lies beside them or in ../model. Name the directory with MiniMind's tokenizer.json"
        )
    return place


def held_out_sets(config: TrainConfig, tokenizer: Any, go_on: Callable[[], None]) -> dict[str, TokenizedData]:
    """The sets of held-out pairs, by name; that of a single set is empty. `go_on` as in `tokenize_files`."""
    if config.eval_split is not None:
        return {"": _tokenize(config, config.train_data, tokenizer, go_on, held_out=True)}
    return {name: _tokenize(config, data, tokenizer, go_on) for name, data in named_sets(config.eval_data).items()}


def configured_prompts(config: TrainConfig, sets: Mapping[str, TokenizedData], tokenizer: Any) -> list[Prompt]:
    """The prompts that `generate_prompts` names, of a file or of the held-out sets.

    Raises:
        UserError: there is no such file, or a row of it has no prompt.
    """
    if config.generate_prompts is None:
        return []
    sources = named_sets(config.eval_data)
    made_of = [(sources.get(name, config.train_data), data) for name, data in sets.items()]
    return read_prompts(config.generate_prompts, made_of, tokenizer, config.columns, config.template_date)


def _tokenize(
    config: TrainConfig, source: Sequence[Source], tokenizer: Any, go_on: Callable[[], None], held_out: bool = False
) -> TokenizedData:
    return tokenize_files(
        source,
        tokenizer,
        max_length=config.max_length,
        completion_mask=config.completion_mask,
        on_bad_row=config.on_bad_row,
        template_date=config.template_date,
        columns=config.columns,
        eval_split=config.eval_split,
        held_out=held_out,
        go_on=go_on,
    )


def _positions(order: PairOrder, steps: int) -> Sequence[int]:
    """Dataset positions that a run of `steps` will train on, ascending."""
    if steps >= order.steps_per_epoch:
        return range(order.num_pairs)
    trained_on = np.concatenate([order.step_pairs(step) for step in range(1, steps + 1)])
    return np.unique(trained_on)  # type: ignore[return-value]
