"""Everything that depends on how the run was launched: one process, DDP or DeepSpeed, and on what the device is.

The one module that may ask which engine drives the model; everything after it is the same for all.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, cpu_offload
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_dpo.checkpoints.state import TrainedState
from minimind_dpo.config import TrainConfig
from minimind_dpo.engine import sharding as zero
from minimind_dpo.engine.cpu import set_up_cpu
from minimind_dpo.engine.sharding import full_shape, local_values, whole
from minimind_dpo.errors import UserError

__all__ = ["full_shape", "local_values", "whole"]  # what is true of any engine: without ZeRO they leave things be

# DeepSpeed's name of what the training configuration says, and its name there
_SAID_ELSEWHERE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "per_device_train_batch_size, gradient_accumulation_steps and the number of processes",
    "optimizer": "learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type",
}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator that the launcher's environment asks for.

    Without an accelerator device, accelerate has to be told that ranks started by torchrun exchange over gloo:
    left to itself each would believe it is alone. DeepSpeed must not hear of `use_cpu`, which switches it off.

    Raises:
        UserError: accelerate, DeepSpeed and the training configuration contradict each other.
    """
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))
    on_cpu = not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out itself
    if deepspeed:
        _compile_nothing()
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        group.backend = "gloo"
        if not deepspeed:
            os.environ["ACCELERATE_USE_CPU"] = "true"
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and local_ranks > torch.accelerator.device_count():
        raise UserError(
            f"the launcher starts {local_ranks} processes on this machine, which has "
            f"{torch.accelerator.device_count()} GPU(s): add --num_processes to `accelerate launch`"
        )
    trackers = None if config.report_to == "none" else config.report_to
    try:
        accelerator = Accelerator(kwargs_handlers=[group], log_with=trackers, project_dir=config.output_dir)
    except ValueError as error:
        raise UserError(f"accelerate's configuration ({_deepspeed_file()}): {error}") from None
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16" and not deepspeed:
        # accelerate computes in fp32 then, without a word
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if accelerator.device.type == "cpu":
        set_up_cpu(accelerator.num_processes)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        _check_deepspeed(plugin.deepspeed_config, config)
        # said in the training configuration; the loop itself counts micro-batches
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm,
        }
    return accelerator


def _compile_nothing() -> None:
    """Tell DeepSpeed that no kernel of its own can be built here, before it starts to.

    At start-up on a CPU it compiles an all-reduce for inference, which training never calls, and loads it under a lock
    file in torch's cache of extensions. A process killed in between leaves that file, and every later run on the
    machine would wait for ever for its removal.
    """
    import deepspeed  # late: it looks for its device, named above, when it is imported

    deepspeed.ops.__compatible_ops__ = {}


def _deepspeed_file() -> str:
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "no DeepSpeed file")


def _check_deepspeed(settings: dict[str, Any], config: TrainConfig) -> None:
    """Refuse what the DeepSpeed file says differently from the training configuration, all of it at once."""
    problems = []
    for key, names in _SAID_ELSEWHERE.items():
        said, ours = settings.get(key, "auto"), getattr(config, names, None)
        # accelerate itself fills in an accumulation of 1 where the file is silent
        if said not in ("auto", ours) and (key, said) != ("gradient_accumulation_steps", 1):
            problems.append(
                f"{key}: {said if ours is not None else 'is set'}, but the training configuration decides "
                f"this: {names}" + ("" if ours is None else f" is {ours}") + ". Remove it from this file"
            )
    zero_settings = settings["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if zero_settings.get(part, {}).get("device") == "nvme":
            problems.append(f"zero_optimization.{part}.device: nvme is not supported; use cpu")
    if problems:
        raise UserError(f"{_deepspeed_file()}:\n  " + "\n  ".join(problems))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no rank holds the whole policy (stage 3): each forward pass then needs all ranks together."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def divides_states(accelerator: Accelerator) -> bool:
    """Whether ranks divide the policy's training states among them (any ZeRO stage), so memory is what is scarce."""
    return accelerator.state.deepspeed_plugin is not None


def scoring_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The type DeepSpeed rounds all weights to; None where they stay as loaded and autocast rounds what they meet."""
    if accelerator.state.deepspeed_plugin is None:
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW with betas (0.9, 0.999), fused, decay on every trainable parameter as in MiniMind."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)


def prepare(accelerator: Accelerator, scorer: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Hand the policy and its optimizer to the engine."""
    if is_sharded(accelerator):
        zero.mark_expert_blocks(scorer)
    return accelerator.prepare(scorer, optimizer)


def loading_reference(accelerator: Accelerator, offload: bool) -> AbstractContextManager[None]:
    """Around loading the reference: beside a sharded policy it is sharded from its first weight on."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or not is_sharded(accelerator):
        return contextlib.nullcontext()
    return zero.loading(plugin, zero.frozen_config(plugin.deepspeed_config, offload))


def freeze(accelerator: Accelerator, scorer: nn.Module, offload: bool) -> nn.Module:
    """Make a frozen scorer ready for forward passes beside the policy.

    It lies whole on the device, but beside a sharded policy it is sharded too, and with `offload` it stays in CPU
    memory and streams through the device layer by layer: under DeepSpeed each rank keeps its share of it and layers
    are gathered, else each rank has all of it.
    """
    scorer.eval().requires_grad_(False)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and (offload or is_sharded(accelerator)):
        return zero.frozen_engine(scorer, zero.frozen_config(plugin.deepspeed_config, offload))
    if offload:
        # accelerate loses sight of tied weights on a CPU with an index
        device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
        cpu_offload(scorer, execution_device=device)
        return scorer
    return scorer.to(accelerator.device, dtype=scoring_dtype(accelerator))


def release(model: nn.Module) -> None:
    """Take a frozen engine's hooks off a model that is needed no more, so that its memory is freed."""
    if (destroy := getattr(model, "destroy", None)) is not None:
        destroy()  # type: ignore[operator]


def unwrap(model: nn.Module) -> Any:
    """The module inside an engine; its forward pass still gathers what is sharded."""
    return getattr(model, "module", model)


def accumulate(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Run a micro-batch; gradients are exchanged between ranks only in the `last` one of an optimizer step."""
    return contextlib.nullcontext() if last or _deepspeed(accelerator) else accelerator.no_sync(model)


def backward(accelerator: Accelerator, loss: Tensor, last: bool) -> None:
    """Add the gradient of one micro-batch's loss; `last` ends the optimizer step's accumulation."""
    engine = _deepspeed(accelerator)
    if engine is None:
        accelerator.backward(loss)
    else:
        # told for each micro-batch, since a partial step has fewer of them than the configuration says
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss)


def apply_gradients(accelerator: Accelerator, model: nn.Module, optimizer: Any, max_grad_norm: float) -> Tensor:
    """Clip the accumulated gradients to a norm of `max_grad_norm` (0: leave them) and take the optimizer's step.

    Nothing here waits for the device.

    Returns:
        The gradient norm before clipping, a scalar. If it is not finite the weights are left as they were, but under
        DeepSpeed in fp32 or bf16, which knows the norm only after its step.
    """
    engine = _deepspeed(accelerator)
    if engine is not None:
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm())
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    assert norm is not None
    if not can_skip_steps(accelerator):  # else the scaler says so
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()  # the fused kernel then skips its step
    optimizer.step()
    optimizer.zero_grad()
    return norm


def _deepspeed(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine of the policy, None without DeepSpeed."""
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)


def can_skip_steps(accelerator: Accelerator) -> bool:
    """Whether a gradient overflow is part of normal life: fp16's loss scaler skips such a step and lowers its scale."""
    return accelerator.mixed_precision == "fp16"


def trained_state(accelerator: Accelerator, scorer: nn.Module, optimizer: Any) -> TrainedState:
    """The trained parameters and the optimizer's state, as far as this rank holds them."""
    engine = _deepspeed(accelerator)
    named = [
        (name.removeprefix("model."), parameter)
        for name, parameter in unwrap(scorer).named_parameters()
        if parameter.requires_grad
    ]
    return TrainedState(
        engine.optimizer if engine is not None else optimizer.optimizer,
        named,
        accelerator.scaler,
        accelerator.process_index,
        accelerator.num_processes,
    )
