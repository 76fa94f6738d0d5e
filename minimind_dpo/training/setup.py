"""A run put together from its configuration: data, policy, reference, optimizer, and a checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
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
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.optimizers import make_optimizer
from minimind_dpo.engine.protocol import Engine, unwrap
from minimind_dpo.engine.ranks import decide, main_first, stop_together
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.bases import AdapterBase, note_base
from minimind_dpo.models.digest import weights_digest
from minimind_dpo.models.dropout import set_dropout
from minimind_dpo.models.places import absolute_source
from minimind_dpo.models.tokenizer_files import tokenizer_place
from minimind_dpo.objective.layout import choose_layout
from minimind_dpo.objective.losses import LossSettings
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.cache import Needed
from minimind_dpo.reference.choosing import load_reference, make_reference
from minimind_dpo.training.fitting import check_fits, end_token_ids
from minimind_dpo.training.recipes import name_recipe
from minimind_dpo.training.run import Run
from minimind_dpo.training.settle import DEFAULTS, identity_before, settle, with_former_defaults
from minimind_dpo.training.weights import load_configured, load_start, policy_dtype

logger = logging.getLogger(__name__)


def build_run(config: TrainConfig, engine: Engine, checkpoint: Path | None, stop: StopRequest) -> Run:
    """Everything the loop needs, ready for the step after `checkpoint` (or the first). Collective.

    Nothing is written but the caches of tokens and of reference log-probabilities.

    Raises:
        UserError: data, model, tokenizer and configuration do not go together, or the checkpoint is another run's.
        StoppedEarly: `stop` came before the first step.
    """
    config = settle(with_former_defaults(config, checkpoint), engine, checkpoint)
    tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
    dtype = policy_dtype(config, engine, checkpoint)
    policy = load_start(config, dtype, engine.precision)
    if checkpoint is None:
        name_recipe(config, policy)
    data = load_data(config, engine, tokenizer, stop.signalled)
    # from CPU memory, before the policy moves
    loaded = load_reference(config, engine, policy, load_configured, single_pass=data.is_single_pass())
    check_fits((policy, loaded.model), tokenizer, (data.train, data.eval), config.max_length)
    state = _state(config, engine, data, {"dtype": dtype, "reference_digest": loaded.digest}, checkpoint)
    scorer = _trainable(config, policy, dtype)
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, config.learning_rate, config.weight_decay, config.optim)
    prepared, optimizer = engine.prepare(scorer, optimizer, config.weight_rounding)
    layout = choose_layout(unwrap(prepared), config.attn_implementation, engine.device, engine.autocast, decide)
    reference = make_reference(config, engine, loaded, unwrap(prepared), layout, data.needed(), stop.signalled)
    stop_together(engine, stop.signalled, "before the first step")
    if checkpoint is not None:  # last: up to here the policy is its own start, which a cache may be made of
        load_checkpoint(checkpoint, engine)
        logger.info("resuming after step %d from %s", state.step, checkpoint)
    logger.info("%s on %d process(es)", data, engine.world_size)
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
        end_token_ids=end_token_ids(policy, tokenizer).to(engine.device),
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

    def __str__(self) -> str:
        return f"{self.order.num_pairs} pairs, {self.steps} optimizer steps of {self.order.global_batch} pairs"

    def is_single_pass(self) -> bool:
        """Whether the run comes to no pair a second time."""
        return self.eval is None and self.steps <= self.order.steps_per_epoch

    def needed(self) -> list[Needed]:
        """The pairs that need reference log-probabilities."""
        held_out = [] if self.eval is None else [Needed(self.eval, range(len(self.eval)))]
        return [Needed(self.train, _positions(self.order, self.steps)), *held_out]


def load_data(config: TrainConfig, engine: Engine, tokenizer: Any, stop: Callable[[], bool]) -> RunData:
    """Tokenise the data on the main process, or find it tokenised. Collective.

    Raises:
        StoppedEarly: `stop` said so on any rank.
    """
    with main_first(engine, "tokenize", stop, config.ddp_timeout) as go_on:
        train = _tokenize(config, config.train_data, tokenizer, go_on)
        held_out = _held_out(config, tokenizer, go_on)
    stop_together(engine, stop, "before the first step")
    global_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * engine.world_size
    order = PairOrder(len(train), global_batch, config.seed, config.shuffle)
    steps = total_steps(order.num_pairs, order.global_batch, config.num_train_epochs, config.max_steps)
    return RunData(train, held_out, order, steps)


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
        return dataclasses.replace(state, identity=now | DEFAULTS)
    saved = read_state(checkpoint)
    check_identity(saved, state, checkpoint, defaults=identity_before())
    if saved.step > data.steps:
        raise UserError(
            f"max_steps: {checkpoint} has gone {saved.step} steps, the run would have {data.steps} "
            "(max_steps or num_train_epochs); ask for as many at least, resume an older checkpoint by its path, or "
            "choose another output_dir"
        )
    if saved.total_steps != data.steps:
        logger.warning(
            "the run now has %d steps, not %d: from here on the learning rate follows the new length",
            data.steps,
            saved.total_steps,
        )
    return dataclasses.replace(saved, total_steps=data.steps, identity=saved.identity | now)


def _trainable(config: TrainConfig, policy: PreTrainedModel, dtype: str) -> PairScorer:
    """The policy's scorer in training mode, with what is trained and what is not."""
    if configured := set_dropout(policy, config.dropout):
        own = ", ".join(f"{name} {value:g}" for name, value in configured.items())
        logger.info("dropout: %g, in place of the model's own (%s)", config.dropout, own)
    if config.lora_r is not None:
        base = AdapterBase(
            weights_digest(policy), dtype, config.quantization, getattr(policy.config, "num_attention_heads", None)
        )
        add_adapters(
            policy,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            base=absolute_source(config.model_name_or_path),
            seed=config.seed,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
        note_base(policy, base)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return PairScorer(policy.train(), config.matmul)


def _held_out(config: TrainConfig, tokenizer: Any, go_on: Callable[[], None]) -> TokenizedData | None:
    if config.eval_split is not None:
        return _tokenize(config, config.train_data, tokenizer, go_on, held_out=True)
    return _tokenize(config, config.eval_data, tokenizer, go_on) if config.eval_data else None


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
