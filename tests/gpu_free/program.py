"""Optimizer steps on a CUDA that computes nothing: `program.py GUARD NAME...` prints what each of them asked of it.

GUARD is guard.cpp, built; it has to be there before torch is.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ctypes.CDLL(sys.argv[1])
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from gpu_free.counting import Watch  # noqa: E402
from helpers_model import random_row, tiny_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from minimind_dpo.config import TrainConfig  # noqa: E402
from minimind_dpo.data.batch import PairBatch, pack_pairs  # noqa: E402
from minimind_dpo.data.order import MicroBatch, StepPlan  # noqa: E402
from minimind_dpo.engine.optimizers import make_optimizer  # noqa: E402
from minimind_dpo.engine.rounding import HalfWeights  # noqa: E402
from minimind_dpo.models.adapters import add_adapters  # noqa: E402
from minimind_dpo.objective.preference import Preference  # noqa: E402
from minimind_dpo.objective.scoring import PairScorer  # noqa: E402
from minimind_dpo.reference.sources import CachedReference, LiveReference  # noqa: E402
from minimind_dpo.training.batches import LoadedStep  # noqa: E402
from minimind_dpo.training.step import optimizer_step  # noqa: E402

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE_26M = dict(
    vocab_size=6400,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
)
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


def take_step(
    mode: FakeTensorMode,
    kind: str = "llama",
    *,
    pairs: tuple[int, ...] = (3,),
    precision: str = "bf16",
    dtype: torch.dtype = torch.float32,
    lora: bool = False,
    checkpointing: bool = False,
    reference: str = "cache",
    loss: str = "sigmoid",
    steps: bool = False,
    **shape: Any,
) -> dict[str, Any]:
    """What an optimizer step with micro-batches of so many `pairs` asks of the device, after one to warm up."""
    model = tiny_model(kind, **shape).to(dtype)
    if lora:
        targets = ["q_proj", "v_proj"]
        add_adapters(model, r=4, alpha=8, dropout=0.0, target_modules=targets, base="base", seed=0)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    scorer = PairScorer(on_fake_device(model.train(), mode))
    scorer.fused_head = True
    batches = [host_batch(mode, count, reference == "cache") for count in pairs]
    frozen = PairScorer(on_fake_device(tiny_model(kind, **shape).to(dtype).requires_grad_(False), mode))
    frozen.fused_head = True
    with mode:
        engine = FakeEngine(scorer, precision, steps)
        sources: dict[str, Any] = {"cache": CachedReference(None), "live": LiveReference(frozen, engine.autocast)}  # type: ignore[arg-type]
        run: Any = SimpleNamespace(
            config=TrainConfig(max_grad_norm=1.0, **dict.fromkeys(("model_name_or_path", "output_dir"), "none")),
            engine=engine,
            scorer=Scored(scorer, engine.autocast),
            optimizer=engine.optimizer,
            reference=sources[reference],
            following=None,
            preference=Preference({loss: 1.0}),
            state=SimpleNamespace(running_logits=0.0),
            stop=False,
            end_token_ids=torch.zeros(2, dtype=torch.long, device=DEVICE),
        )
        for _ in range(2):
            plan = StepPlan(1, sum(pairs), _micro_batches(pairs))
            with Watch() as watch:
                optimizer_step(run, LoadedStep(plan, iter(batches)), 1e-6)
            engine.optimizer.zero_grad()
    return {
        "kernels": sum(watch.kernels.values()),
        "by_kernel": dict(watch.kernels.most_common()),
        "dispatches": watch.dispatches,
        "copies": watch.copies,
        "blocking": watch.blocking,
        "waits": watch.waits,
        "products": dict(watch.products),
    }


def _micro_batches(pairs: tuple[int, ...]) -> list[MicroBatch]:
    places = iter(range(sum(pairs)))
    members = [[next(places) for _ in range(count)] for count in pairs]
    return [MicroBatch(member, member) for member in members]


SCENARIOS: dict[str, dict[str, Any]] = {
    "26m bf16 4": dict(pairs=(4,), **SHAPE_26M),
    "26m bf16 32": dict(pairs=(32,), **SHAPE_26M),
    "26m fp32 32": dict(pairs=(32,), precision="no", **SHAPE_26M),
    "26m bf16 4 whole": dict(pairs=(4,), steps=True, **SHAPE_26M),
    "llama bf16": dict(),
    "llama fp16": dict(precision="fp16"),
    "llama fp32": dict(precision="no"),
    "llama bf16 weights": dict(precision="no", dtype=torch.bfloat16),
    "qwen3 bf16": dict(kind="qwen3"),
    "minimind_moe bf16": dict(kind="minimind_moe"),
    "mistral_window bf16": dict(kind="mistral_window"),
    "qwen3_moe bf16": dict(kind="qwen3_moe"),
    "llama bf16 accumulated": dict(pairs=(3, 2)),
    "llama bf16 live": dict(reference="live"),
    "llama bf16 lora": dict(lora=True),
    "llama bf16 checkpointing": dict(checkpointing=True),
    "llama bf16 over the step": dict(pairs=(3, 2), loss="bco"),
}


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


if __name__ == "__main__":
    found: dict[str, Any] = {}
    with fake_cuda() as mode:
        for name in sys.argv[2:] or SCENARIOS:
            try:
                found[name] = take_step(mode, **SCENARIOS[name])
            except Exception as error:  # what a fake tensor can't know, a step must not ask
                found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    print(json.dumps(found))
