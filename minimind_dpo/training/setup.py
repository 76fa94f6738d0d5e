"""A run put together from its configuration: data, policy, reference, optimizer, and a checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from minimind_dpo.checkpoints.directory import load_checkpoint
from minimind_dpo.checkpoints.state import TrainerState, check_identity, read_state
from minimind_dpo.config import TrainConfig, identity
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.optimizers import make_optimizer
from minimind_dpo.engine.protocol import Engine, unwrap
from minimind_dpo.engine.ranks import decide, stop_together
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters, has_adapters
from minimind_dpo.models.bases import AdapterBase, check_base, note_base
from minimind_dpo.models.digest import weights_digest
from minimind_dpo.models.dropout import set_dropout
from minimind_dpo.models.fast.compiling import CompiledDecoder
from minimind_dpo.models.places import absolute_source
from minimind_dpo.objective.layout import PairLayout, choose_layout
from minimind_dpo.objective.preference import Preference
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.choosing import load_reference, make_following, make_reference
from minimind_dpo.reference.following import FollowingReference
from minimind_dpo.training.data import RunData, load_data, tokenizer_path
from minimind_dpo.training.fitting import (
    check_compiles,
    check_fits,
    check_loss,
    check_reference_tokenizer,
    end_token_ids,
)
from minimind_dpo.training.introduction import introduce
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
    config = _settled(config, engine, checkpoint)
    tokenizer = load_tokenizer(tokenizer_path(config), config.trust_remote_code)
    dtype = policy_dtype(config, engine, checkpoint)
    policy = load_start(config, dtype, engine.precision)
    if checkpoint is None:
        name_recipe(config, policy)
    data = load_data(config, engine, tokenizer, stop.signalled)
    # from CPU memory, before the policy moves
    loaded = load_reference(config, engine, policy, load_configured, single_pass=data.is_single_pass())
    known = _known(config, (policy, loaded.model), tokenizer, data)
    state = _state(config, engine, data, known | {"dtype": dtype, "reference_digest": loaded.digest}, checkpoint)
    scorer = _trainable(config, policy, dtype, checkpoint)
    introduce(config, engine, policy, data, state)
    trained = (parameter for parameter in scorer.parameters() if parameter.requires_grad)
    optimizer = make_optimizer(trained, config.learning_rate, config.weight_decay, config.optim)
    prepared, optimizer = engine.prepare(scorer, optimizer, config.weight_rounding)
    layout = _layout(config, engine, unwrap(prepared))
    reference = make_reference(config, engine, loaded, unwrap(prepared), layout, data.needed(), stop.signalled)
    following = make_following(config, engine, loaded, prepared)
    unwrap(prepared).squares = config.use_weighting  # from here on: no reference has a use for them
    stop_together(engine, stop.signalled, "before the first step")
    if checkpoint is not None:  # last: up to here the policy is its own start, which a cache may be made of
        _go_on(checkpoint, engine, following)
    return Run(
        config=config,
        engine=engine,
        scorer=prepared,
        optimizer=optimizer,
        reference=reference,
        following=following,
        layout=layout,
        preference=configured_preference(config),
        train_data=data.train,
        eval_sets=data.eval,
        order=data.order,
        state=state,
        tokenizer=tokenizer,
        stop=stop,
        end_token_ids=end_token_ids(policy, tokenizer).to(engine.device),
        prompts=data.prompts,
    )


def _settled(config: TrainConfig, engine: Engine, checkpoint: Path | None) -> TrainConfig:
    config = settle(with_former_defaults(config, checkpoint), engine, checkpoint)
    check_compiles(config, engine)
    return config


def _layout(config: TrainConfig, engine: Engine, scorer: PairScorer) -> PairLayout:
    """How pairs are laid out; from here on a scorer that is to be compiled is, in training passes over packed pairs."""
    layout = choose_layout(scorer, config.attn_implementation, engine.device, engine.autocast, decide)
    if config.torch_compile:
        scorer.compiled = CompiledDecoder()
    return layout


def configured_preference(config: TrainConfig) -> Preference:
    """The preference loss that a configuration asks for."""
    return Preference(
        dict(zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True)),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        divergence=config.f_divergence_type,
        divergence_alpha=config.f_alpha_divergence_coef,
        ld_alpha=1.0 if config.ld_alpha is None else config.ld_alpha,
        weighs_by_policy=config.use_weighting,
        settings=config.loss_settings,
    )


def _known(
    config: TrainConfig, models: tuple[PreTrainedModel | None, ...], tokenizer: Any, data: RunData
) -> dict[str, str]:
    """Refuse what does not go together; whether the pairs' margins are used, for the run's identity."""
    check_fits(models, tokenizer, data.parts(), config.max_length)
    if config.ref_model_name_or_path is not None:
        check_reference_tokenizer(config.ref_model_name_or_path, tokenizer, data.parts())
    for held_out in data.eval.values():
        check_loss(config.loss_type, held_out, "eval_data" if config.eval_data else "eval_split")
    return {"margins": "used"} if check_loss(config.loss_type, data.train, "train_data") else {}


def _go_on(checkpoint: Path, engine: Engine, following: FollowingReference | None) -> None:
    state = load_checkpoint(checkpoint, engine)
    if following is not None:
        following.bring_up(state.step)
    logger.info("resuming after step %d from %s", state.step, checkpoint)


def _state(
    config: TrainConfig, engine: Engine, data: RunData, known: dict[str, str], checkpoint: Path | None
) -> TrainerState:
    """The state of the run: of its start, or as `checkpoint` left it, if that is this run's.

    `known` is what the run knows of its models and data: the type of the policy's start, the reference's digest, and
    whether the pairs' margins are used.
    """
    now = identity(config) | {
        "global_batch": data.order.global_batch,
        "mixed_precision": engine.precision,
        "train_data_digest": data.train.digest,
        **known,
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


def _trainable(config: TrainConfig, policy: PreTrainedModel, dtype: str, checkpoint: Path | None) -> PairScorer:
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
    if checkpoint is not None and has_adapters(policy):
        check_base(policy, checkpoint)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return PairScorer(policy.train(), config.matmul)
