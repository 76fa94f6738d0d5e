"""What a training run is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import TrainConfig
from minimind_dpo.data.order import PairOrder, StepPlan, plan_steps
from minimind_dpo.data.prompts import Prompt
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.protocol import Engine, unwrap
from minimind_dpo.objective.layout import PairLayout
from minimind_dpo.objective.preference import Preference
from minimind_dpo.reference.following import FollowingReference
from minimind_dpo.reference.sources import Reference


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop needs.

    Attributes:
        config: what the user asked for.
        engine: on what the run goes; the one way to processes, device and precision.
        scorer: of the policy, prepared by the engine, as is `optimizer`.
        optimizer: of what is trained.
        reference: where reference log-probabilities come from.
        following: moves the reference, where it follows the policy.
        layout: of every batch.
        preference: what is minimised.
        train_data: pairs to train on, in the order of `order`.
        eval_sets: sets of held-out pairs, by name; that of a single set is empty.
        order: which pairs each step takes.
        state: what the run knows of itself; its `step` advances.
        tokenizer: saved with every model.
        stop: whether this process was asked to stop.
        end_token_ids: of the tokens that end an answer, on the engine's device.
        prompts: that the policy answers at each evaluation.
    """

    config: TrainConfig
    engine: Engine
    scorer: torch.nn.Module
    optimizer: Optimizer
    reference: Reference
    following: FollowingReference | None
    layout: PairLayout
    preference: Preference
    train_data: TokenizedData
    eval_sets: dict[str, TokenizedData]
    order: PairOrder
    state: TrainerState
    tokenizer: Any
    stop: StopRequest
    end_token_ids: Tensor
    prompts: list[Prompt]

    @property
    def policy(self) -> Any:
        """The language model that is trained."""
        return unwrap(self.scorer).model

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return Path(self.config.output_dir)

    def plans(self) -> Iterator[StepPlan]:
        """This rank's share of every step from the next to the last."""
        return plan_steps(
            self.order,
            range(self.state.step + 1, self.state.total_steps + 1),
            self.train_data.tokens,
            world_size=self.engine.world_size,
            rank=self.engine.rank,
            micro_batch_size=self.config.per_device_train_batch_size,
            max_tokens=self.config.max_tokens_per_micro_batch,
        )
