"""What a run asks of the engine that it goes on; `launcher.py` starts the one that the launcher names.

Everything outside this room is the same for one process, DDP and DeepSpeed. Another engine is a class with these
methods and one line in `launcher.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minimind_dpo.engine.fragments import Fragment
from minimind_dpo.engine.trackers import Guarded


class Engine(Protocol):
    """Processes, their device, and how a policy is trained on them.

    Attributes:
        device: of this rank.
        rank: of this process, out of `world_size`.
        is_main: whether this is the process that writes and speaks.
        precision: of products: `no` (fp32), `bf16` or `fp16`.
        gathers_weights: no rank holds the whole policy (ZeRO 3), so each forward pass needs all ranks together.
        divides_states: ranks divide the training states among them (any ZeRO stage): memory is what is scarce.
        weights_dtype: the type that all weights are rounded to before a run; None where they stay as loaded, and
            autocast rounds what products meet.
        skips_overflows: a gradient overflow is part of normal life: fp16's loss scaler skips such a step and lowers
            its scale.
    """

    device: torch.device
    rank: int
    world_size: int
    is_main: bool
    precision: str
    gathers_weights: bool
    divides_states: bool
    weights_dtype: torch.dtype | None
    skips_overflows: bool

    # the policy

    def prepare(self, scorer: nn.Module, optimizer: Optimizer, weight_rounding: str) -> tuple[nn.Module, Optimizer]:
        """Take over the policy's scorer and its optimizer; what is returned takes their places. Once a run.

        In half precision, `weight_rounding` says how the weights that products use come of the fp32 masters
        (`engine/rounding.py`).
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch; gradients are exchanged between ranks in the `last` one of an optimizer step only."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss; `last` ends the optimizer step's accumulation."""
        ...

    def step(self, max_grad_norm: float) -> Tensor:
        """Clip the accumulated gradients to a norm of `max_grad_norm` (0: leave them) and take the optimizer's step.

        Nothing here waits for the device, but with other optimizers than AdamW.

        Returns:
            The gradient norm before clipping, a scalar. If it is not finite the weights are left as they were,
            except under DeepSpeed in fp32 or bf16, which knows the norm only after its step.
        """
        ...

    def fragments(self) -> Iterator[Fragment]:
        """Every part of the training state that this rank holds."""
        ...

    def shared_fragments(self) -> Iterator[Fragment]:
        """`fragments` without repetition between ranks: what this one writes to a checkpoint."""
        ...

    def scalars(self) -> dict[str, Any]:
        """What of the training state no parameter has for itself: the optimizer's step count and fp16's loss scale."""
        ...

    def restore_scalars(self, scalars: dict[str, Any]) -> None:
        """Undo `scalars`, once every fragment has its values again. Collective."""
        ...

    def keep_reference(self) -> None:
        """Begin a reference that follows the policy: a state "reference" in every fragment, now the policy's values."""
        ...

    def move_reference(self, share: float) -> None:
        """Move that reference by a `share` of its way to the policy."""
        ...

    # a frozen model beside it

    def loading_reference(self, offload: bool) -> AbstractContextManager[None]:
        """Around loading a reference: beside a divided policy it is divided from its first weight on."""
        ...

    def freeze(self, scorer: nn.Module, offload: bool, weight_rounding: str) -> nn.Module:
        """Make a frozen scorer ready for forward passes beside the policy.

        It lies whole on the device, or is divided as the policy is. With `offload` it stays in CPU memory and streams
        through the device layer by layer: under DeepSpeed each rank keeps its share of it and layers are gathered,
        else each rank has all of it. Its weights are rounded as the policy's are before its first step.
        """
        ...

    def release(self, scorer: nn.Module) -> None:
        """Let go of a frozen scorer that is needed no more, so that its memory is freed."""
        ...

    # the ranks together: each of these is collective

    def wait(self) -> None:
        """Until every rank has come here."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values."""
        ...

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        ...

    # trackers

    def start_trackers(self, project: str, starting: dict[str, dict[str, Any]]) -> list[Guarded]:
        """Start what `report_to` names, each with what `starting` has for it; none on other than the main process."""
        ...

    def end(self) -> None:
        """End trackers and the group of processes."""
        ...


def unwrap(scorer: nn.Module) -> Any:
    """The scorer inside what an engine made of it; its forward pass still gathers what is divided."""
    return getattr(scorer, "module", scorer)


def trained_parameters(scorer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is trained of a scorer's model, under the model's own names."""
    named: Sequence[tuple[str, nn.Parameter]] = list(unwrap(scorer).named_parameters())
    return [(name.removeprefix("model."), parameter) for name, parameter in named if parameter.requires_grad]
