"""A run put together from its configuration: data, policy, reference, optimizer, and a checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from minimind_dpo.checkpoints.directory import load_checkpoint
from minimind_dpo.checkpoints.state import TrainerState, check_identity, read_state
from minimind_dpo.config import TrainConfig, identity
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.data.order import PairOrder, total_steps
from minimind_dpo.data.sources import Source
from minimind_dpo.data.tokenized import TokenizedData, tokenize_files
from minimind_dpo.engine.optimizers import make_optimizer
from minimind_dpo.engine.protocol import Engine, unwrap
from minimind_dpo.engine.ranks import decide, main_first
from minimind_dpo.errors import UserError
from minimind_dpo.files import is_raw_weights
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.loading import locate_model
from minimind_dpo.objective.layout import choose_layout
from minimind_dpo.objective.losses import LossSettings
from minimind_dpo.objective.scoring import PairScorer, embedding_rows
from minimind_dpo.reference.cache import Needed
from minimind_dpo.reference.choosing import load_reference, make_reference
from minimind_dpo.training.run import Run
from minimind_dpo.training.settle import identity_before, settle
from minimind_dpo.training.signals import StopRequest
from minimind_dpo.training.weights import load_configured, load_start, policy_dtype

logger = logging.getLogger(__name__)


def build_run(config: TrainConfig, engine: Engine, checkpoint: Path | None, stop: StopRequest) -> Run:
    """Everything the loop needs, ready for the step after `checkpoint` (or the first). Collective.

    Nothing is written but the caches of tokens and of reference log-probabilities.

    Raises:
        UserError: data, model, tokenizer and configuration do not go together, or the checkpoint is another run's.
        StoppedEarly: `stop` came while reference log-probabilities were computed.
    """
    config = settle(config, engine, checkpoint)
    tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
    dtype = policy_dtype(config, engine, checkpoint)
    policy = load_start(config, dtype, engine.precision)
    check_vocabulary(policy, tokenizer)
    data = load_data(config, engine, tokenizer)
    stop.listen()
    # from CPU memory, before the policy moves
    loaded = load_reference(config, engine, policy, load_configured, single_pass=data.is_single_pass())
    state = _state(config, engine, data, {"dtype": dtype, "reference_digest": loaded.digest}, checkpoint)
    scorer = _trainable(config, policy)
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, config.learning_rate, config.weight_decay, config.optim)
    prepared, optimizer = engine.prepare(scorer, optimizer, config.weight_rounding)
    layout = choose_layout(unwrap(prepared), config.attn_implementation, engine.device, engine.autocast, decide)
    reference = make_reference(config, engine, loaded, unwrap(prepared), layout, data.needed(), stop.__bool__)
    if checkpoint is not None:  # last: up to here the policy is its own start, which a cache may be made of
        load_checkpoint(checkpoint, engine)
        logger.info("resuming after step %d from %s", state.step, checkpoint)
    logger.info(
        "%d pairs, %d optimizer steps of %d pairs on %d process(es)",
        data.order.num_pairs,
        state.total_steps,
        data.order.global_batch,
        engine.world_size,
    )
    return Run(
        config=config,
        engine=engine,
        scorer=prepared,
        optimizer=optimizer,
        reference=reference,
        layout=layout,
        loss=LossSettings(config.loss_type, config.beta, config.label_smoothing),
        train_data=data.train,
        eval_data=data.eval,
        order=data.order,
        state=state,
        tokenizer=tokenizer,
        stop=stop,
    )


@dataclass(frozen=True)
class RunData:
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

    def is_single_pass(self) -> bool:
        """Whether the run comes to no pair a second time."""
        return self.eval is None and self.steps <= self.order.steps_per_epoch

    def needed(self) -> list[Needed]:
        """The pairs that need reference log-probabilities."""
        held_out = [] if self.eval is None else [Needed(self.eval, range(len(self.eval)))]
        return [Needed(self.train, _positions(self.order, self.steps)), *held_out]


def load_data(config: TrainConfig, engine: Engine, tokenizer: Any) -> RunData:
    """Tokenise the data on the main process, or find it tokenised. Collective."""
    with main_first(engine, "tokenize"):
        train = _tokenize(config, config.train_data, tokenizer)
        held_out = _held_out(config, tokenizer)
    global_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * engine.world_size
    order = PairOrder(len(train), global_batch, config.seed, config.shuffle)
    steps = total_steps(order.num_pairs, order.global_batch, config.num_train_epochs, config.max_steps)
    return RunData(train, held_out, order, steps)


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a tokenizer with more tokens than the model embeds."""
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise UserError(
            f"tokenizer_name_or_path: the tokenizer has {len(tokenizer)} tokens but the model "
            f"embeds only {rows}; name the tokenizer the model was trained with"
        )


def tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer named, or the one that lies with the model (for raw weights: beside them, or in ../model).

    Raises:
        UserError: raw weights without a tokenizer.
    """
    if config.tokenizer_name_or_path:
        return config.tokenizer_name_or_path
    path = locate_model(config.model_name_or_path)
    if path is None or not is_raw_weights(path):
        return str(path or config.model_name_or_path)
    for candidate in (path.parent, path.parent.parent / "model"):
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    raise UserError(
        f"tokenizer_name_or_path: missing; raw weights ({path}) carry no tokenizer, and none lies beside "
        "them or in ../model. Name the directory with MiniMind's tokenizer.json"
    )


def _state(
    config: TrainConfig, engine: Engine, data: RunData, weights: dict[str, str], checkpoint: Path | None
) -> TrainerState:
    """The state of the run: of its start, or as `checkpoint` left it, if that is this run's.

    `weights` is what the run knows of its weights: the type of the policy's start, and the reference's digest.
    """
    now = identity(config) | {
        "global_batch": data.order.global_batch,
        "mixed_precision": engine.precision,
        "train_data_digest": data.train.digest,
        **weights,
    }
    state = TrainerState(total_steps=data.steps, identity=now)
    if checkpoint is None:
        return state
    saved = read_state(checkpoint)
    check_identity(saved, state, checkpoint, defaults=identity_before())
    if saved.total_steps != data.steps:
        logger.warning(
            "the run now has %d steps, not %d: from here on the learning rate follows the new length",
            data.steps,
            saved.total_steps,
        )
    return dataclasses.replace(saved, total_steps=data.steps, identity=saved.identity | now)


def _trainable(config: TrainConfig, policy: PreTrainedModel) -> PairScorer:
    """The policy's scorer in training mode, with what is trained and what is not."""
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
    return PairScorer(policy.train(), config.matmul)


def _held_out(config: TrainConfig, tokenizer: Any) -> TokenizedData | None:
    if config.eval_split is not None:
        return _tokenize(config, config.train_data, tokenizer, held_out=True)
    return _tokenize(config, config.eval_data, tokenizer) if config.eval_data else None


def _tokenize(config: TrainConfig, source: Sequence[Source], tokenizer: Any, held_out: bool = False) -> TokenizedData:
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
    )


def _positions(order: PairOrder, steps: int) -> Sequence[int]:
    """Dataset positions that a run of `steps` will train on, ascending."""
    if steps >= order.steps_per_epoch:
        return range(order.num_pairs)
    trained_on = np.concatenate([order.step_pairs(step) for step in range(1, steps + 1)])
    return np.unique(trained_on)  # type: ignore[return-value]
