"""A run put together from its configuration: data, policy, reference, optimizer, and a checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel

from minimind_dpo.checkpoints.directory import TrainerState, load_checkpoint, read_state, set_aside_later
from minimind_dpo.config import TrainConfig
from minimind_dpo.data.order import PairOrder, total_steps
from minimind_dpo.data.tokenized import TokenizedData, tokenize_files
from minimind_dpo.engine.launcher import is_sharded, make_optimizer, prepare, trained_state, unwrap
from minimind_dpo.engine.ranks import decide, main_first
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.loading import load_model
from minimind_dpo.objective.layout import choose_layout
from minimind_dpo.objective.scoring import PairScorer, embedding_rows
from minimind_dpo.reference.cache import Needed
from minimind_dpo.reference.choosing import load_reference, make_reference
from minimind_dpo.training.loop import Run
from minimind_dpo.training.run_directory import open_run
from minimind_dpo.training.signals import StopRequest

logger = logging.getLogger(__name__)

# what makes two sessions the same run, beside the digests of data and reference
_IDENTITY = (
    "loss_type",
    "beta",
    "label_smoothing",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "shuffle",
    "seed",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
)


def build_run(
    config: TrainConfig, accelerator: Accelerator, tokenizer: Any, checkpoint: Path | None, stop: StopRequest
) -> Run:
    """Everything the loop needs, ready for the step after `checkpoint` (or the first).

    Raises:
        UserError: data, model, tokenizer and configuration do not go together, or the checkpoint is another run's.
        StoppedEarly: `stop` came while reference log-probabilities were computed.
    """
    policy = load(config, config.model_name_or_path)
    check_vocabulary(policy, tokenizer)
    data = load_data(config, accelerator, tokenizer)
    order, steps = data.order, data.steps
    stop.listen()
    # from CPU memory, before the policy moves
    loaded = load_reference(config, accelerator, policy, load, once=data.scored_once())
    if not is_sharded(accelerator):
        policy.to(accelerator.device)  # type: ignore[arg-type]
    scorer, optimizer = prepare(accelerator, *_trainable(config, policy))
    layout = choose_layout(unwrap(scorer), config.attn_implementation, accelerator.device, accelerator.autocast, decide)
    reference = make_reference(config, accelerator, loaded, unwrap(scorer), layout, data.needed(), stop.__bool__)
    identity = {name: getattr(config, name) for name in _IDENTITY} | {
        "global_batch": order.global_batch,
        "mixed_precision": accelerator.mixed_precision,
        "train_data_digest": data.train.digest,
        "reference_digest": loaded.digest,
    }
    state = TrainerState(total_steps=steps, identity=identity)
    if checkpoint is not None:
        state = _resume(accelerator, checkpoint, state, Path(config.output_dir) / "checkpoints", scorer, optimizer)
    metrics = open_run(config, accelerator, state, resumed=checkpoint is not None)
    logger.info(
        "%d pairs, %d optimizer steps of %d pairs on %d process(es)",
        order.num_pairs,
        steps,
        order.global_batch,
        accelerator.num_processes,
    )
    return Run(
        config,
        accelerator,
        scorer,
        optimizer,
        reference,
        layout,
        data.train,
        data.eval,
        order,
        metrics,
        state,
        stop,
        tokenizer,
    )


@dataclass(frozen=True)
class Data:
    """The tokenised pairs of a run and which of them it trains on, when.

    Attributes:
        train: training pairs.
        eval: held-out pairs, if there are any.
        order: of the training pairs.
        steps: optimizer steps of the run.
    """

    train: TokenizedData
    eval: TokenizedData | None
    order: PairOrder
    steps: int

    def scored_once(self) -> bool:
        """Whether the run comes to no pair a second time."""
        return self.eval is None and self.steps <= self.order.steps_per_epoch

    def needed(self) -> list[Needed]:
        """The pairs that need reference log-probabilities."""
        held_out = [] if self.eval is None else [Needed(self.eval, range(len(self.eval)))]
        return [Needed(self.train, _positions(self.order, self.steps)), *held_out]


def load_data(config: TrainConfig, accelerator: Accelerator, tokenizer: Any) -> Data:
    """Tokenise the data on the main process, or find it tokenised. Collective."""
    with main_first(accelerator, "tokenize"):
        train = _tokenize(config, config.train_data, tokenizer)
        held_out = _tokenize(config, config.eval_data, tokenizer) if config.eval_data else None
    order = PairOrder(
        len(train),
        config.per_device_train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        config.seed,
        config.shuffle,
    )
    steps = total_steps(order.num_pairs, order.global_batch, config.num_train_epochs, config.max_steps)
    return Data(train, held_out, order, steps)


def load(config: TrainConfig, path: str) -> PreTrainedModel:
    """Load a model as the configuration asks for it."""
    overrides: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.num_attention_heads is not None:
        overrides["num_attention_heads"] = config.num_attention_heads
    if not config.attends_pairs:
        overrides["attn_implementation"] = config.attn_implementation
    return load_model(path, **overrides)


def _trainable(config: TrainConfig, policy: PreTrainedModel) -> tuple[PairScorer, Any]:
    """The policy's scorer in training mode, and an optimizer of what is trained."""
    if config.lora_r is not None:
        add_adapters(
            policy,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            base=config.model_name_or_path,
            seed=config.seed,
        )
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    scorer = PairScorer(policy.train())
    return scorer, make_optimizer(scorer, config.learning_rate, config.weight_decay)


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer with more tokens than the model embeds."""
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise UserError(
            f"tokenizer_name_or_path: the tokenizer has {len(tokenizer)} tokens but the model "
            f"embeds only {rows}; name the tokenizer the model was trained with"
        )


def _tokenize(config: TrainConfig, source: list[str], tokenizer: Any) -> TokenizedData:
    return tokenize_files(
        source,
        tokenizer,
        max_length=config.max_length,
        completion_mask=config.completion_mask,
        on_bad_row=config.on_bad_row,
    )


def _positions(order: PairOrder, steps: int) -> Sequence[int]:
    """Dataset positions that a run of `steps` will train on, ascending."""
    if steps >= order.steps_per_epoch:
        return range(order.num_pairs)
    chosen = np.concatenate([order.step_pairs(step) for step in range(1, steps + 1)])
    return np.unique(chosen)  # type: ignore[return-value]


def _resume(
    accelerator: Accelerator, checkpoint: Path, fresh: TrainerState, directory: Path, scorer: Any, optimizer: Any
) -> TrainerState:
    """Continue from `checkpoint` if it belongs to the run that `fresh` describes."""
    saved = read_state(checkpoint)
    changed = [
        f"{name}: was {saved.identity.get(name)}, is {value}"
        for name, value in fresh.identity.items()
        if saved.identity.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to another run:\n  "
            + "\n  ".join(changed)
            + "\nUse the run's own settings, model and data, or another output_dir"
        )
    if saved.total_steps != fresh.total_steps:
        logger.warning(
            "the run now has %d steps, not %d: from here on the learning rate follows the new length",
            fresh.total_steps,
            saved.total_steps,
        )
    state = load_checkpoint(checkpoint, trained_state(accelerator, scorer, optimizer))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        set_aside_later(directory, state.step)
    logger.info("resuming after step %d from %s", state.step, checkpoint)
    return dataclasses.replace(state, total_steps=fresh.total_steps)
