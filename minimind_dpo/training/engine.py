"""Everything that depends on how the run was launched: the Accelerator, gradient synchronisation, clipping.

The one module that may ask which engine drives the model; the loop above it is the same for all.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_dpo.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator that the launcher's environment asks for.

    Without an accelerator device, accelerate has to be told that ranks started by torchrun exchange over gloo:
    left to itself each would believe it is alone. DeepSpeed must not hear of `use_cpu`, which switches it off.
    """
    handlers = []
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out itself
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
            os.environ["ACCELERATE_USE_CPU"] = "true"
    trackers = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(kwargs_handlers=handlers, log_with=trackers, project_dir=config.output_dir)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(_cpu_threads(accelerator))
    return accelerator


def _cpu_threads(accelerator: Accelerator) -> int:
    """The user's OMP_NUM_THREADS, or the machine's cores shared by its ranks.

    `accelerate launch` sets OMP_NUM_THREADS=1 whenever the user said nothing, which would idle the other cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if asked and not (launched and asked == "1"):
        return torch.get_num_threads()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)


def accumulate(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Run a micro-batch; gradients are exchanged between ranks only in the `last` one of an optimizer step."""
    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_grad_norm: float) -> Tensor:
    """Clip the step's gradients to a norm of `max_grad_norm` (0: leave them) and return their norm before."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    assert norm is not None
    return norm.detach()


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW with betas (0.9, 0.999), fused, decay on every trainable parameter as in MiniMind."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)


def can_skip_steps(accelerator: Accelerator) -> bool:
    """Whether a gradient overflow is part of normal life: fp16's loss scaler skips such a step and lowers its scale."""
    return accelerator.scaler is not None
