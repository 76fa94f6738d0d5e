"""One process, or several under DDP that each hold the whole policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.fragments import Fragment, HeldPart, fragment
from minimind_dpo.engine.launched import HALF_TYPES, Launched, evenly_divided
from minimind_dpo.engine.optimizers import keep_reference, move_reference, set_step_count, skips_not_finite, step_count
from minimind_dpo.engine.protocol import trained_parameters
from minimind_dpo.engine.rounding import HalfWeights, rounded


class Plain(Launched):
    """The `Engine` of accelerate alone."""

    gathers_weights = False
    divides_states = False
    weights_dtype: torch.dtype | None = None

    def __init__(self, accelerator: Accelerator, config: TrainConfig):
        super().__init__(accelerator)
        self._half_weights: HalfWeights | None = None
        self._steps = 0
        if self.precision == "fp16" and self.device.type == "cpu":
            # accelerate computes in fp32 then, without a word
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")

    @staticmethod
    def before_start() -> None:
        """Nothing to do before the processes meet."""

    def prepare(self, scorer: Any, optimizer: Optimizer, weight_rounding: str) -> tuple[nn.Module, Optimizer]:
        """Take over the policy's scorer and its optimizer."""
        scorer.to(self.device)
        if (dtype := HALF_TYPES.get(self.precision)) is not None:
            self._half_weights = HalfWeights(scorer.product_weights(), dtype, weight_rounding)
            scorer.half_weights = self._half_weights.copies
        self._scorer, self._optimizer = self._accelerator.prepare(scorer, optimizer)
        return self._scorer, self._optimizer

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self._scorer)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss."""
        self._accelerator.backward(loss)

    def step(self, max_grad_norm: float) -> Tensor:
        """Clip the accumulated gradients and take the optimizer's step."""
        norm = self._accelerator.clip_grad_norm_(self._scorer.parameters(), max_grad_norm or float("inf"))
        assert norm is not None
        if skips_not_finite(self._inner) and not self.skips_overflows:  # else the scaler says so
            self._inner.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        if skips_not_finite(self._inner) or self.skips_overflows or norm.isfinite():
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        self._refresh()
        return norm

    def _refresh(self) -> None:
        if self._half_weights is not None:
            self._half_weights.refresh(self._steps)

    @property
    def _inner(self) -> Optimizer:
        return self._optimizer.optimizer  # type: ignore[attr-defined]  # inside accelerate's

    def fragments(self) -> Iterator[Fragment]:
        """Every trained parameter, whole."""
        for name, parameter in trained_parameters(self._scorer):
            whole = HeldPart(parameter, 0, 0, parameter.numel())
            yield fragment(name, tuple(parameter.shape), whole, self._inner)

    def shared_fragments(self) -> Iterator[Fragment]:
        """The parameters that this rank writes: all ranks hold all of them and divide them evenly."""
        fragments = list(self.fragments())
        sizes = [held.states["weight"].numel() for held in fragments]
        for held, taken in zip(fragments, evenly_divided(sizes, self.rank, self.world_size), strict=True):
            if taken:
                yield held

    def scalars(self) -> dict[str, Any]:
        """The optimizer's step count and fp16's loss scale."""
        scaler = self._accelerator.scaler
        return {
            "optimizer_step": step_count(self._inner),
            "steps": self._steps,
            "loss_scaler": {} if scaler is None else scaler.state_dict(),
        }

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Undo `scalars`."""
        set_step_count(self._inner, scalars["optimizer_step"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(scalars["loss_scaler"])
        self._steps = scalars.get("steps", 0)
        self._refresh()

    def keep_reference(self) -> None:
        """Begin a reference that follows the policy."""
        keep_reference(self._inner, (parameter for _, parameter in trained_parameters(self._scorer)))

    def move_reference(self, share: float) -> None:
        """Move that reference."""
        move_reference(self._inner, (parameter for _, parameter in trained_parameters(self._scorer)), share)

    def loading_reference(self, offload: bool) -> AbstractContextManager[None]:
        """Around loading a reference, which stays whole."""
        return contextlib.nullcontext()

    def freeze(self, scorer: Any, offload: bool, weight_rounding: str) -> nn.Module:
        """Make a frozen scorer ready: whole on the device, or with `offload` in CPU memory."""
        scorer.eval().requires_grad_(False)
        if (dtype := HALF_TYPES.get(self.precision)) is not None:
            scorer.replace_product_weights(lambda name, weight: rounded(weight, dtype, weight_rounding, name))
        if not offload:
            return scorer.to(self.device)
        # accelerate loses sight of tied weights on a CPU with an index
        cpu_offload(scorer, execution_device=torch.device("cpu") if self.device.type == "cpu" else self.device)
        return scorer

    def release(self, scorer: nn.Module) -> None:
        """A plain module holds nothing beside its memory."""
