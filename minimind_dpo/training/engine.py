"""Everything that depends on how the run was launched: the Accelerator, gradient synchronisation, clipping.

The one module that may ask which engine drives the model; the loop above it is the same for all.
"""

from __future__ import annotations

import contextlib
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
    # DeepSpeed compiles its kernels at first use and looks for ninja in PATH, which a .venv may not be in
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
            os.environ["ACCELERATE_USE_CPU"] = "true"
    trackers = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(kwargs_handlers=handlers, log_with=trackers, project_dir=config.output_dir)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(_cpu_threads(accelerator))
    if accelerator.state.deepspeed_plugin is not None:
        # said in the training configuration; DeepSpeed's own must not repeat them
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.per_device_train_batch_size, "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm}
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


def apply_gradients(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, max_grad_norm: float
) -> float:
    """Clip the accumulated gradients to a norm of `max_grad_norm` (0: leave them) and take the optimizer's step.

    Returns:
        The gradient norm before clipping. If it is not finite the weights are left as they were, but under DeepSpeed
        in fp32 or bf16, which knows the norm only after its step.
    """
    engine = _deepspeed(accelerator)
    if engine is not None:
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if torch.isfinite(norm) or can_skip_steps(accelerator):
        optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def _deepspeed(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine of the policy, None without DeepSpeed."""
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """AdamW with betas (0.9, 0.999), fused, decay on every trainable parameter as in MiniMind."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)


def can_skip_steps(accelerator: Accelerator) -> bool:
    """Whether a gradient overflow is part of normal life: fp16's loss scaler skips such a step and lowers its scale."""
    return accelerator.mixed_precision == "fp16"
