"""A policy, its engine and its batches on a CUDA that computes nothing; the device guard has to be loaded before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from helpers_model import random_row, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minimind_dpo.data.batch import PairBatch, pack_pairs
from minimind_dpo.engine.optimizers import make_optimizer
from minimind_dpo.engine.rounding import HalfWeights
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference.sources import CachedReference

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = torch.device("cuda")


class FakeEngine:
    """One process, with the casts of autocast and of `Plain`, and an optimizer that steps or not."""

    device, world_size, rank = DEVICE, 1, 0

    def __init__(self, scorer: PairScorer, precision: str, steps: bool):
        self.scorer, self.steps = scorer, steps
        self.autocast: Callable[[], Any] = nullcontext
        self.half: HalfWeights | None = None
        if precision in HALF:
            self.autocast = lambda: torch.autocast("cuda", HALF[precision])
            self.half = HalfWeights(scorer.product_weights(), HALF[precision], "dithered")
            scorer.half_weights = self.half.copies
        trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(trained, 1e-6, 0.01)

    def accumulate(self, last: bool) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, max_grad_norm: float) -> Tensor:
        if not self.steps:
            return torch.zeros((), device=DEVICE)
        norm = nn.utils.clip_grad_norm_(self.scorer.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.half is not None:
            self.half.refresh(1)
        return norm

    def sum(self, values: Tensor) -> Tensor:
        return values


class Scored(nn.Module):
    """A scorer under the engine's autocast, as accelerate has it."""

    def __init__(self, scorer: PairScorer, autocast: Callable[[], Any]):
        super().__init__()
        self.module, self.autocast = scorer, autocast

    def forward(self, batch: PairBatch) -> Any:
        with self.autocast():
            return self.module(batch)


def host_batch(mode: FakeTensorMode, pairs: int, cached: bool) -> PairBatch:
    """A batch of pairs as it comes from the loader: in pinned memory."""
    generator = torch.Generator().manual_seed(pairs)
    rows = [
        random_row(generator, prefix=3 + i % 5, chosen=4 + i % 3, rejected=2 + i % 4, mask="all_assistant")
        for i in range(pairs)
    ]
    batch = pack_pairs(rows)
    logps = torch.zeros(sum(batch.side_sizes))
    if cached:
        batch = CachedReference(SimpleNamespace(get=lambda _: [logps.numpy()])).collating(lambda _: batch)(rows)  # type: ignore[arg-type]
    return batch._moved(mode.from_tensor).pin_memory()


def on_fake_device(model: Any, mode: FakeTensorMode) -> Any:
    """The model with all its tensors replaced by fake ones on the device, tied ones by one."""
    replaced: dict[Tensor, Any] = {}
    with mode:
        for module in model.modules():
            for name, own in module._parameters.items():
                if own is not None and own not in replaced:
                    fake = torch.empty(own.shape, dtype=own.dtype, device=DEVICE)
                    replaced[own] = nn.Parameter(fake, requires_grad=own.requires_grad)
                module._parameters[name] = replaced.get(own)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return model


def fake_scorer(
    mode: FakeTensorMode, kind: str, dtype: torch.dtype, lora: list[str] | None, checkpointing: bool, **shape: Any
) -> PairScorer:
    """The scorer of a policy on the device, with LoRA beside the layers of such names (none: all linear ones)."""
    model = tiny_model(kind, **shape).to(dtype)
    if lora is not None:
        add_adapters(model, r=4, alpha=8, dropout=0.0, target_modules=lora, base="base", seed=0)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    scorer = PairScorer(on_fake_device(model.train(), mode))
    scorer.fused_head = True
    return scorer


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """A mode for tensors on a GPU of the Ampere generation that is not there."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.Tensor.pin_memory = _pinned  # type: ignore[method-assign,assignment]
    library = torch.library.Library("aten", "IMPL")  # these kernels a torch for CUDA has, so that nothing is decomposed
    for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
        library.impl(name, _never, "CUDA")
    yield FakeTensorMode(allow_non_fake_inputs=True)


def _never(*_: Any) -> Any:
    raise AssertionError("fake tensors need no kernel")


def _pinned(tensor: Any, *_: Any) -> Any:
    tensor.pinned = True
    return tensor
