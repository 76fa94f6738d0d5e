"""`torch_compile`: compiled training passes give the numbers of uncompiled ones, from one program for all batches."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_forks import Forks
from helpers_model import random_row, tiny_model
from helpers_run import Inputs, train_lines
from torch import Tensor
from torch._dynamo.utils import counters

from minimind_dpo.config import TrainConfig
from minimind_dpo.data.batch import PairBatch, pack_pairs
from minimind_dpo.engine.rounding import HalfWeights
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.fast.compiling import CompiledDecoder
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.training import fitting

KINDS = ("llama", "qwen3", "mistral_window", "minimind_moe", "qwen3_moe")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would write to a trace, were there one, pytest would collect, which takes longer than compiling."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def batches(count: int) -> list[PairBatch]:
    """Of 2 pairs and more, none as long as another."""
    generator = torch.Generator().manual_seed(0)
    lengths = [[(3 + 3 * k + i, 4 + i, 6 + k) for i in range(2 + k)] for k in range(count)]
    return [
        pack_pairs([random_row(generator, prefix=p, chosen=c, rejected=r, mask="all_assistant") for p, c, r in batch])
        for batch in lengths
    ]


def numbers(scorer: PairScorer, batch: PairBatch, half: bool = False) -> list[Tensor]:
    """Log-probabilities, router losses, and all gradients."""
    scorer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        scores = scorer(batch)
    (scores.per_token_logps.sum() + scores.aux_losses.sum()).backward()
    gradients = [parameter.grad for parameter in scorer.parameters() if parameter.grad is not None]
    return [scores.per_token_logps.detach(), scores.aux_losses.detach(), *gradients]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of all, each in the largest number of its tensor."""
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
        for ours, theirs in zip(found, expected, strict=True)
    )


def make_scorer(kind: str, lora: bool = False) -> PairScorer:
    model = tiny_model(kind)
    if lora:
        add_adapters(model, r=4, alpha=8, dropout=0.0, target_modules=[], base="", seed=0)
    scorer = PairScorer(model.train())
    scorer.fused_head = True
    return scorer


@pytest.mark.parametrize(("kind", "lora"), [*((kind, False) for kind in KINDS), ("llama", True)])
def test_one_program_for_all_batches(kind: str, lora: bool) -> None:
    """Traced and differentiated as for Inductor, and then run as it is."""
    plain, compiled = make_scorer(kind, lora), make_scorer(kind, lora)
    compiled.compiled = CompiledDecoder("aot_eager")
    counters.clear()
    for batch in batches(4):
        assert distance(numbers(compiled, batch), numbers(plain, batch)) < 1e-5
    assert compiled.compiled.works and counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():  # what is not trained is not compiled
        compiled(batches(1)[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_half_precision_is_no_further_from_fp32() -> None:
    plain, compiled, exact = make_scorer("llama"), make_scorer("llama"), make_scorer("llama")
    for scorer in (plain, compiled):
        scorer.half_weights = HalfWeights(scorer.product_weights(), torch.bfloat16, "nearest").copies
    compiled.compiled = CompiledDecoder("aot_eager")
    for batch in batches(2):
        expected = numbers(exact, batch)
        rounding = distance(numbers(plain, batch, half=True), expected)
        assert 0 < distance(numbers(compiled, batch, half=True), expected) < 1.5 * rounding
    assert compiled.compiled.works


def test_what_cannot_be_compiled_goes_on_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    plain, compiled = make_scorer("llama"), make_scorer("llama")
    compiled.compiled = CompiledDecoder("aot_eager")
    norm = compiled.model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x * float(x.numel() > 0))
    norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with caplog.at_level(logging.WARNING):
        for batch in batches(2):
            assert distance(numbers(compiled, batch), numbers(plain, batch)) < 1e-5
    told = [record.message for record in caplog.records if record.message.startswith("torch_compile: ")]
    assert len(told) == 1 and "LlamaModel goes on uncompiled" in told[0] and not compiled.compiled.works


def test_a_third_program_is_one_too_many(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever makes a program anew, the run's first and two more are all."""
    scorer = make_scorer("llama")
    scorer.compiled = CompiledDecoder("eager")
    counters.clear()
    batch = batches(1)[0]
    norm = scorer.model.model.norm
    for name in "abcde":
        norm.forward = lambda x, name=name: x if name == "" else type(norm).forward(norm, x)
        numbers(scorer, batch)
    assert counters["stats"]["unique_graphs"] == 3 and not scorer.compiled.works
    assert sum("goes on uncompiled" in record.message for record in caplog.records) == 1


def config(**options: Any) -> TrainConfig:
    return TrainConfig(torch_compile=True, **options)


@pytest.mark.parametrize(
    ("options", "gathers", "said"),
    [
        ({"gradient_checkpointing": True}, False, "gradient_checkpointing"),
        ({"dropout": 0.1}, False, "dropout"),
        ({"lora_dropout": 0.1}, False, "dropout"),
        ({"attn_implementation": "sdpa"}, False, "attn_implementation: sdpa"),
        ({}, True, "ZeRO 3"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], gathers: bool, said: str) -> None:
    engine: Any = SimpleNamespace(gathers_weights=gathers, device=torch.device("cpu"))
    with pytest.raises(UserError, match=f"torch_compile: does not go with .*{said}"):
        fitting.check_compiles(config(**options), engine)
    fitting.check_compiles(TrainConfig(**options), engine)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    engine: Any = SimpleNamespace(gathers_weights=False, device=torch.device("cpu"))
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        fitting.check_compiles(config(), engine)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    engine.device = torch.device("cuda")
    with pytest.raises(UserError, match="Triton"):
        fitting.check_compiles(config(), engine)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Inductor keeps what it has compiled: the same decoder needs it once."""
    return tmp_path_factory.mktemp("programs")


@pytest.mark.parametrize("engine", ["single_cpu", "multi_cpu", "ds_zero2_cpu"])
def test_a_run_learns_the_same(engine: str, inputs: Inputs, forks: Forks, tmp_path: Path, programs: Path) -> None:
    """By Inductor, from the second engine on from its cache."""
    lines = []
    for compiles in ("false", "true"):
        directory = tmp_path / compiles
        directory.mkdir()
        flags = inputs.flags(directory / "run", torch_compile=compiles, max_steps=2, learning_rate=1e-3)
        codes = forks.run(flags, directory, engine, TORCHINDUCTOR_CACHE_DIR=str(programs))
        log = (directory / "log").read_text("utf-8")
        assert set(codes) == {0} and "goes on uncompiled" not in log, log
        lines.append(train_lines(directory / "run"))
    for plain, compiled in zip(*lines, strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert any(programs.iterdir())
