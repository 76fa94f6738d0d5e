"""The entry point of training: build everything from a configuration, run the loop, leave a run directory.

`python -m minimind_dpo.train` equals `minimind-dpo train`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.data.order import PairOrder, total_steps
from minimind_dpo.data.tokenized import TokenizedData, load_tokenizer, tokenize_files
from minimind_dpo.errors import EXIT_DONE, EXIT_STOPPED, StoppedEarly, UserError, exit_code
from minimind_dpo.models.loading import load_model, locate_model
from minimind_dpo.reference import (
    CachedReference,
    LiveReference,
    Reference,
    ReferenceCache,
    cache_directory,
    fill_cache,
    reference_digest,
)
from minimind_dpo.scoring import PairLayout, PairScorer, choose_layout, embedding_rows
from minimind_dpo.training.checkpoint import (
    TrainerState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    set_aside_later,
)
from minimind_dpo.training.engine import make_accelerator, make_optimizer
from minimind_dpo.training.loop import Run, train
from minimind_dpo.training.run_directory import finish_run, open_run
from minimind_dpo.training.signals import StopRequest

logger = logging.getLogger("minimind_dpo.train")  # not __name__: the module also runs as __main__

# what makes two sessions the same run, beside the digests of data and reference
_IDENTITY = ("loss_type", "beta", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_ratio",
             "weight_decay", "max_grad_norm", "shuffle", "seed")


def run(config: TrainConfig) -> int:
    """Train as `config` says; 0 when the run is done, 75 when a signal stopped it with a checkpoint written.

    Raises:
        UserError: a mistake in the configuration, the data or the files named.
    """
    accelerator = make_accelerator(config)
    logging.basicConfig(level=logging.WARNING if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    if accelerator.is_main_process:
        logging.getLogger("minimind_dpo").setLevel(logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every tied weight at every checkpoint
    disable_progress_bar()  # transformers' own, of shards read and written
    set_seed(config.seed, device_specific=True)
    try:
        checkpoint = find_checkpoint(Path(config.output_dir) / "checkpoints", config.resume)
        accelerator.wait_for_everyone()
        with StopRequest() as stop:
            tokenizer = load_tokenizer(_tokenizer_path(config), config.trust_remote_code)
            training = _build(config, accelerator, tokenizer, checkpoint, stop)
            train(training)
            finish_run(training, tokenizer)
        return EXIT_DONE
    except StoppedEarly as where:
        logger.info("stopped early %s; the same command continues there", where)
        return EXIT_STOPPED
    finally:
        accelerator.end_training()


def _build(
    config: TrainConfig, accelerator: Accelerator, tokenizer: Any, checkpoint: Path | None, stop: StopRequest
) -> Run:
    policy = _load(config, config.model_name_or_path)
    _check_vocabulary(policy, tokenizer)
    with accelerator.main_process_first():
        train_data = _tokenize(config, config.train_data, tokenizer)
        eval_data = _tokenize(config, config.eval_data, tokenizer) if config.eval_data else None
    layout = choose_layout(policy, config.attn_implementation)
    order = PairOrder(len(train_data.dataset), config.per_device_train_batch_size
                      * config.gradient_accumulation_steps * accelerator.num_processes, config.seed, config.shuffle)
    steps = total_steps(order.num_pairs, order.global_batch, config.num_train_epochs, config.max_steps)
    policy.to(accelerator.device)
    stop.listen()
    reference, digest = _reference(config, accelerator, policy, layout, [
        (train_data.dataset, _positions(order, steps)),
        *([(eval_data.dataset, range(len(eval_data.dataset)))] if eval_data else [])], stop.__bool__)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    scorer = PairScorer(policy.train())
    scorer, optimizer = accelerator.prepare(
        scorer, make_optimizer(scorer, config.learning_rate, config.weight_decay))
    identity = {name: getattr(config, name) for name in _IDENTITY} | {
        "global_batch": order.global_batch, "mixed_precision": accelerator.mixed_precision,
        "train_data_digest": train_data.digest, "reference_digest": digest}
    state = TrainerState(total_steps=steps, identity=identity)
    if checkpoint is not None:
        state = _resume(accelerator, checkpoint, state, Path(config.output_dir) / "checkpoints")
    metrics = open_run(config, accelerator, state, resumed=checkpoint is not None)
    logger.info("%d pairs, %d optimizer steps of %d pairs on %d process(es)",
                order.num_pairs, steps, order.global_batch, accelerator.num_processes)
    return Run(config, accelerator, scorer, optimizer, reference, layout, train_data, eval_data, order, metrics, state,
               stop)


def _tokenizer_path(config: TrainConfig) -> str:
    """The tokenizer named, or the one that lies with the model (for a raw .pth: beside it, or in ../model)."""
    if config.tokenizer_name_or_path:
        return config.tokenizer_name_or_path
    path = locate_model(config.model_name_or_path)
    if path is None or path.suffix != ".pth":
        return str(path or config.model_name_or_path)
    for candidate in (path.parent, path.parent.parent / "model"):
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    raise UserError(f"tokenizer_name_or_path: missing; raw weights ({path}) carry no tokenizer, and none lies beside "
                    "them or in ../model. Name the directory with MiniMind's tokenizer.json")


def _load(config: TrainConfig, path: str) -> PreTrainedModel:
    overrides: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.num_attention_heads is not None:
        overrides["num_attention_heads"] = config.num_attention_heads
    if not config.attends_pairs:
        overrides["attn_implementation"] = config.attn_implementation
    return load_model(path, **overrides)


def _check_vocabulary(policy: PreTrainedModel, tokenizer: Any) -> None:
    rows = embedding_rows(policy)
    if len(tokenizer) > rows:
        raise UserError(f"tokenizer_name_or_path: the tokenizer has {len(tokenizer)} tokens but the model "
                        f"embeds only {rows}; name the tokenizer the model was trained with")


def _tokenize(config: TrainConfig, source: list[str], tokenizer: Any) -> TokenizedData:
    return tokenize_files(source, tokenizer, max_length=config.max_length, completion_mask=config.completion_mask,
                          on_bad_row=config.on_bad_row)


def _positions(order: PairOrder, steps: int) -> np.ndarray:
    """Dataset positions that a run of `steps` will train on, ascending."""
    if steps >= order.steps_per_epoch:
        return np.arange(order.num_pairs)
    return np.unique(np.concatenate([order.step_pairs(step) for step in range(1, steps + 1)]))


def _reference(
    config: TrainConfig, accelerator: Accelerator, policy: PreTrainedModel, layout: PairLayout,
    needed: list[tuple[Any, Any]], stop: Callable[[], bool],
) -> tuple[Reference, str]:
    """The reference that `config.reference` asks for, and the digest of its weights."""
    mode = "cache" if config.reference == "auto" else config.reference
    if config.reference == "auto":
        logger.info("reference: cache (log-probabilities are computed once; no second model stays in memory)")
    model = policy
    if config.ref_model_name_or_path is not None:
        model = _load(config, config.ref_model_name_or_path).to(accelerator.device)
        if choose_layout(model, config.attn_implementation) is not layout:
            raise UserError("ref_model_name_or_path: this model cannot use the policy's batch layout; "
                            "set attn_implementation: sdpa")
    digest = reference_digest(model)
    if mode == "live":
        frozen = copy.deepcopy(model) if model is policy else model
        return LiveReference(PairScorer(frozen), accelerator.autocast), digest
    cache = ReferenceCache(cache_directory(digest, {
        "precision": accelerator.mixed_precision, "attention": config.attn_implementation,
        "layout": layout.__name__, "device": accelerator.device.type}))
    fill_cache(cache, accelerator, PairScorer(model.eval()), layout, needed, config.per_device_train_batch_size, stop)
    return CachedReference(cache), digest


def _resume(accelerator: Accelerator, checkpoint: Path, fresh: TrainerState, directory: Path) -> TrainerState:
    """Continue from `checkpoint` if it belongs to the run that `fresh` describes."""
    saved = read_state(checkpoint)
    changed = [f"{name}: was {saved.identity.get(name)}, is {value}" for name, value in fresh.identity.items()
               if saved.identity.get(name) != value]
    if changed:
        raise UserError(f"{checkpoint} belongs to another run:\n  " + "\n  ".join(changed)
                        + "\nUse the run's own settings, model and data, or another output_dir")
    if saved.total_steps != fresh.total_steps:
        logger.warning("the run now has %d steps, not %d: from here on the learning rate follows the new length",
                       fresh.total_steps, saved.total_steps)
    state = load_checkpoint(accelerator, checkpoint)
    if accelerator.is_main_process:
        set_aside_later(directory, state.step)
    logger.info("resuming after step %d from %s", state.step, checkpoint)
    return dataclasses.replace(state, total_steps=fresh.total_steps)


def main(argv: list[str]) -> int:
    """`minimind-dpo train`."""
    return run(load_config(argv))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
