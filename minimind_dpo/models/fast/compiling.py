"""A decoder compiled by torch (TorchDynamo and Inductor, Ansel et al. 2024) for its training passes over packed rows.

All layers become one graph whose sizes are symbols: tokens, pairs, wanted rows. Attention stays a call
(`attention_ops.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from minimind_dpo.data.branches import BranchPlan, PairSegment
from minimind_dpo.engine import transfer
from minimind_dpo.errors import UserError
from minimind_dpo.models.fast.attention_ops import RowPlan, cpu_plan, gpu_plan

logger = logging.getLogger(__name__)

MOST_GRAPHS = 3  # a run's first, and two made again
_SETTINGS = {
    "recompile_limit": MOST_GRAPHS,
    "force_nn_module_property_static_shapes": False,  # the last layer's rows are a module's attribute
    "optimize_ddp": False,  # which would cut the graph into DDP's buckets
}


class CompiledDecoder:
    """Calls decoders through the compiler; where that can't compile one, or no longer, as they are, and says so.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        own = FunctionType(_call.__code__.replace(), _call.__globals__)  # torch counts graphs by code object
        self._compiled: Callable[..., Any] | None = torch.compile(own, dynamic=True, fullgraph=True, backend=backend)

    @property
    def works(self) -> bool:
        """Whether passes are compiled ones, as far as is known."""
        return self._compiled is not None

    def __call__(
        self,
        decoder: Any,
        inputs: dict[str, Any],
        segments: Sequence[PairSegment],
        branches: BranchPlan | None,
        wanted: Tensor | None,
    ) -> Any:
        """What `decoder` gives for a packed row; arguments of `PairScorer.forward` and of a `Patch`."""
        if self._compiled is not None:
            if inputs.get("output_router_logits"):
                maybe_install_capturing_hooks(decoder)  # of their own accord in a first pass, under a lock
            plan = (
                cpu_plan(segments, wanted)
                if branches is None or not transfer.on_gpu(inputs["input_ids"])
                else gpu_plan(branches)
            )
            with torch._dynamo.config.patch(_SETTINGS):  # type: ignore[no-untyped-call]
                try:
                    return self._compiled(decoder, inputs, plan)
                except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                    self._give_up(decoder, error)
        return decoder(**inputs, pair_segments=segments, branch_plan=branches)

    def _give_up(self, decoder: Any, error: Exception) -> None:
        self._compiled = None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        logger.warning("torch_compile: %s goes on uncompiled (%s)", type(decoder).__name__, reason)


def _call(decoder: Any, inputs: dict[str, Any], plan: RowPlan) -> Any:
    return decoder(**inputs, row_plan=plan)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch has no compiler for a device.

    Raises:
        UserError: there is none.
    """
    if device.type == "cuda":
        if torch.utils._triton.has_triton():
            return
        raise UserError("torch_compile: needs Triton on a GPU; pip install triton, or leave the setting out")
    if device.type != "cpu":
        raise UserError(f"torch_compile: not tried on {device.type}; leave the setting out")
    from torch._inductor import cpp_builder, exc  # late: a second, for runs that compile

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(
            "torch_compile: no C++ compiler is here, which torch needs to compile for a CPU; install g++ (Debian, "
            "Ubuntu: apt install g++), name one in CXX, or leave the setting out"
        ) from None
