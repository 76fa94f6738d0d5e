"""DeepSpeed with any ZeRO stage (Rajbhandari et al. 2020, arXiv:1910.02054), from one CPU process to many nodes.

DeepSpeed takes seconds to import, so this module is imported where the launcher names DeepSpeed only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations import HfDeepSpeedConfig

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.cpu import set_up_host_steps
from minimind_dpo.engine.fragments import Fragment, HeldPart, fragment
from minimind_dpo.engine.launched import HALF_TYPES, Launched
from minimind_dpo.engine.optimizers import keep_reference, move_reference, set_step_count, step_count
from minimind_dpo.engine.protocol import trained_parameters
from minimind_dpo.engine.rounding import RoundedParts
from minimind_dpo.engine.sharding import full_shape
from minimind_dpo.engine.zero import (
    frozen_config,
    held_part,
    limit_waiting,
    loss_scaler,
    mark_expert_blocks,
    refresh_weights,
)
from minimind_dpo.errors import UserError

# DeepSpeed's name of what the training configuration says, and its name there
_SAID_ELSEWHERE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "train_batch_size": "per_device_train_batch_size, gradient_accumulation_steps and the number of processes",
    "optimizer": "learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type",
}


class DeepSpeed(Launched):
    """The `Engine` of accelerate's DeepSpeed integration."""

    divides_states = True

    def __init__(self, accelerator: Accelerator, config: TrainConfig):
        super().__init__(accelerator)
        self._plugin: Any = accelerator.state.deepspeed_plugin
        self.gathers_weights: bool = self._plugin.zero_stage == 3
        self.weights_dtype = HALF_TYPES.get(self.precision)
        self._rounded: RoundedParts | None = None
        self._steps, self._patience = 0, config.ddp_timeout
        if self.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise UserError(
                "--mixed_precision fp16: DeepSpeed finds no fp16 arithmetic in this device; use bf16, or no DeepSpeed"
            )
        _check_settings(self._plugin.deepspeed_config, config)
        _check_weights(config, self.weights_dtype)
        offload = self._plugin.deepspeed_config["zero_optimization"].get("offload_optimizer") or {}
        if self.device.type != "cpu" and offload.get("device", "none") != "none":
            set_up_host_steps(self.world_size)
        # said in the training configuration; the loop itself counts micro-batches
        self._plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm,
        }
        accumulates = config.gradient_accumulation_steps > 1 or config.max_tokens_per_micro_batch
        if self.precision == "bf16" and accumulates:
            # in bf16 the sum of micro-batches loses what is small beside it
            self._plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")

    @staticmethod
    def before_start() -> None:
        """Tell DeepSpeed that no kernel of its own can be built here, before it starts to.

        At start-up on a CPU it compiles an all-reduce for inference, which training never calls, and loads it under a
        lock file in torch's cache of extensions. A process killed in between leaves that file, and every later run on
        the machine would wait for ever for its removal.
        """
        deepspeed.ops.__compatible_ops__ = {}

    def prepare(self, scorer: nn.Module, optimizer: Optimizer, weight_rounding: str) -> tuple[nn.Module, Optimizer]:
        """Take over the policy's scorer and its optimizer; DeepSpeed's masters start as the nearest half values."""
        if self.gathers_weights:
            mark_expert_blocks(scorer)
        else:
            scorer.to(self.device)
        self._scorer, prepared = self._accelerator.prepare(scorer, optimizer)
        self._engine: Any = self._accelerator.deepspeed_engine_wrapped.engine  # type: ignore[union-attr]
        limit_waiting(self._engine, self._patience)
        if self.weights_dtype is not None and weight_rounding != "nearest":
            self._rounded = RoundedParts(self._adamw, self._held_parts(), self.weights_dtype, weight_rounding)
        return self._scorer, prepared

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch; `backward` tells DeepSpeed which one is the last."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss."""
        # told for each micro-batch, since a partial step has fewer of them than the configuration says
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, max_grad_norm: float) -> Tensor:
        """Take the step; DeepSpeed clips to the norm that it was told at the start."""
        self._engine.step()
        self._steps += 1
        if self._rounded is not None:
            self._rounded.put_back(self._steps)
        return torch.as_tensor(self._engine.get_global_grad_norm())

    @property
    def _zero_optimizer(self) -> Any:
        return self._engine.optimizer

    @property
    def _adamw(self) -> Optimizer:
        return self._zero_optimizer.optimizer

    def fragments(self) -> Iterator[Fragment]:
        """The parts of the fp32 copies that this rank steps."""
        shapes = {name: full_shape(parameter) for name, parameter in trained_parameters(self._scorer)}
        for name, part in self._held_parts():
            yield fragment(name, shapes[name], part, self._adamw)

    def _held_parts(self) -> Iterator[tuple[str, HeldPart]]:
        for name, parameter in trained_parameters(self._scorer):
            if (part := held_part(self._zero_optimizer, parameter)) is not None:
                yield name, part

    def shared_fragments(self) -> Iterator[Fragment]:
        """All of them: no two ranks hold the same part."""
        return self.fragments()

    def scalars(self) -> dict[str, Any]:
        """The optimizer's step count and fp16's loss scale."""
        scaler = loss_scaler(self._zero_optimizer)
        return {
            "optimizer_step": step_count(self._adamw),
            "steps": self._steps,
            "loss_scaler": {name: value for name, value in scaler.items() if isinstance(value, (int, float))},
        }

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Undo `scalars`, and bring the weights that products use in line with their fp32 copies. Collective."""
        set_step_count(self._adamw, scalars["optimizer_step"])
        loss_scaler(self._zero_optimizer).update(scalars["loss_scaler"])
        self._steps = scalars.get("steps", 0)
        with contextlib.nullcontext() if self._rounded is None else self._rounded.handed_out(self._steps):
            refresh_weights(self._zero_optimizer)

    def keep_reference(self) -> None:
        """Begin a reference that follows the policy, divided as the optimizer's states are."""
        keep_reference(self._adamw, self._flats())

    def move_reference(self, share: float) -> None:
        """Move that reference."""
        move_reference(self._adamw, self._flats(), share)

    def _flats(self) -> list[Tensor]:
        """What the optimizer steps, each once."""
        return list({id(part.flat): part.flat for _, part in self._held_parts()}.values())

    @contextmanager
    def loading_reference(self, offload: bool) -> Iterator[None]:
        """Around loading a reference: beside a stage 3 policy it is divided from its first weight on."""
        if not self.gathers_weights:
            yield
            return
        live = HfDeepSpeedConfig(self._frozen_config(offload))  # transformers keeps a weak reference to the newest one
        try:
            yield
        finally:
            del live
            self._plugin.set_deepspeed_weakref()

    def freeze(self, scorer: nn.Module, offload: bool, weight_rounding: str) -> nn.Module:
        """Make a frozen scorer ready: whole beside stages 0 to 2, else a stage 3 engine without an optimizer.

        Its weights are the nearest half values, as the policy's are at its start under any rounding.
        """
        scorer.eval().requires_grad_(False)
        if not offload and not self.gathers_weights:
            scorer.to(self.device)
            for parameter in scorer.parameters():  # and no buffers: rotary frequencies stay fp32, as the policy's do
                parameter.data = parameter.data.to(self.weights_dtype or parameter.dtype)
            return scorer
        mark_expert_blocks(scorer)
        engine, *_ = deepspeed.initialize(model=scorer, config=self._frozen_config(offload))
        engine.eval()  # DeepSpeed's returns nothing
        return engine

    def release(self, scorer: nn.Module) -> None:
        """Take a frozen engine's hooks off its model."""
        if (destroy := getattr(scorer, "destroy", None)) is not None:
            destroy()

    def _frozen_config(self, offload: bool) -> dict[str, Any]:
        return frozen_config(self._plugin.deepspeed_config, offload)


def _check_settings(settings: dict[str, Any], config: TrainConfig) -> None:
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
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "the DeepSpeed settings")
        raise UserError(f"{file}:\n  " + "\n  ".join(problems))


def _check_weights(config: TrainConfig, weights_dtype: torch.dtype | None) -> None:
    """Refuse what the training configuration says of weights and DeepSpeed cannot do."""
    own = str(weights_dtype or torch.float32).removeprefix("torch.")
    problems = [
        f"{name}: is {said}, but under DeepSpeed weights have the type of its products, here {own}; leave it at auto"
        for name, said in (("dtype", config.dtype), ("ref_dtype", config.ref_dtype))
        if said not in ("auto", own)
    ]
    if config.quantization != "none":
        problems.append(f"quantization: is {config.quantization}, for one process or DDP; remove it, or DeepSpeed")
    if config.optim != "adamw":
        problems.append(f"optim: is {config.optim}, but DeepSpeed divides the states of adamw only; use adamw here")
    if problems:
        raise UserError("the configuration has problems:\n  " + "\n  ".join(problems))
