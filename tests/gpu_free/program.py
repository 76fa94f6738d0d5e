"""Optimizer steps on a CUDA that computes nothing: `program.py GUARD NAME...` prints what each of them asked of it.

GUARD is guard.cpp, built; it has to be there before torch is. `keep NAME` is what a forward pass keeps (`kept.py`).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ctypes.CDLL(sys.argv[1])
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from gpu_free.counting import Watch  # noqa: E402
from gpu_free.fakes import DEVICE, FakeEngine, Scored, fake_cuda, fake_scorer, host_batch, on_fake_device  # noqa: E402
from gpu_free.kept import KEPT, keep  # noqa: E402
from helpers_model import tiny_model  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from minimind_dpo.config import TrainConfig  # noqa: E402
from minimind_dpo.data.order import MicroBatch, StepPlan  # noqa: E402
from minimind_dpo.objective.preference import Preference  # noqa: E402
from minimind_dpo.objective.scoring import PairScorer  # noqa: E402
from minimind_dpo.reference.sources import CachedReference, LiveReference  # noqa: E402
from minimind_dpo.training.batches import LoadedStep  # noqa: E402
from minimind_dpo.training.step import optimizer_step  # noqa: E402

SHAPE_26M = dict(
    vocab_size=6400,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
)


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
    scorer = fake_scorer(mode, kind, dtype, ["q_proj", "v_proj"] if lora else None, checkpointing, **shape)
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


def _found(name: str, mode: FakeTensorMode) -> dict[str, Any]:
    try:
        if name in KEPT:
            return keep(mode, **KEPT[name])
        return take_step(mode, **SCENARIOS[name])
    except Exception as error:  # what a fake tensor can't know, a step must not ask
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    with fake_cuda() as mode:
        found = {name: _found(name, mode) for name in sys.argv[2:] or (*SCENARIOS, *KEPT)}
    print(json.dumps(found))
