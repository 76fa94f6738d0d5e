"""Products of fp32 matrices on the CPU: how the library is chosen and kept, and that both give the same numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_model import random_row, tiny_model
from helpers_run import Inputs, same_bits, train_here, train_lines
from torch import Tensor

from minimind_dpo.checkpoints import directory
from minimind_dpo.checkpoints.state import TrainerState, write_state
from minimind_dpo.data.batch import PairSegment, pack_pairs, pad_pairs
from minimind_dpo.engine import cpu
from minimind_dpo.engine.cpu import Processor, read_processor
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.fast import attention, attention_cpu, head, products
from minimind_dpo.models.fast.attention import pair_attention, sdpa_attention
from minimind_dpo.models.fast.head import token_logps
from minimind_dpo.models.fast.products import (
    agree_on_library,
    choose_library,
    half_precision_notice,
    linear,
    measure_lead,
)
from minimind_dpo.objective.scoring import PairScorer

ZEN_4 = Processor("AuthenticAMD", 25, frozenset({"avx512f"}))
ZEN_5 = ZEN_4._replace(family=26)
INTEL = Processor("GenuineIntel", 6, frozenset({"avx512f"}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, inner size and columns of each product by oneDNN from here on; layers of any size go to it."""
    made: list[tuple[int, int, int]] = []
    original = products.product

    def product(left: Tensor, right: Tensor) -> Tensor:
        made.append((*left.shape, len(right)))
        return original(left, right)

    monkeypatch.setattr(products, "product", product)
    monkeypatch.setattr(products, "_SMALLEST", 1)
    return made


def pairs() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = ((9, 5, 12), (30, 20, 3), (1, 7, 7))
    return [random_row(generator, prefix=p, chosen=c, rejected=r, mask="all_assistant") for p, c, r in lengths]


def scored(model: Any, library: str, plain: bool = False, half: bool = False) -> list[Tensor]:
    """Log-probabilities of `pairs` and the gradients of their mean."""
    scorer = PairScorer(model, library)
    scorer.fused_head = not plain
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logps = scorer((pad_pairs if plain else pack_pairs)(pairs())).per_token_logps
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [logps.detach(), *torch.autograd.grad(logps.mean(), weights)]


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


# the choice


@pytest.mark.parametrize(
    ("processor", "lead", "library", "reason"),
    [
        (ZEN_5, 2.2, "onednn", "2.20 times as fast"),
        (ZEN_5, 1.25, "onednn", "1.25 times as fast"),
        (ZEN_5, 1.24, "torch", "1.24 times as fast"),
        (INTEL, 1.02, "torch", "1.02 times as fast"),
        (ZEN_4, None, "torch", "AMD's family 25 have half the width"),
        (ZEN_5._replace(flags=frozenset({"avx2"})), None, "torch", "no 512-bit units"),
        (None, None, "torch", "no 512-bit units"),
    ],
)
def test_choice_of_a_processor(processor: Processor | None, lead: float | None, library: str, reason: str) -> None:
    """Where there is no lead to be had, nothing is measured."""
    answer, why = choose_library(processor, None if lead is None else lambda: lead)
    assert (answer, reason in why) == (library, True), why


def test_nothing_is_measured_of_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_library(ZEN_5, lambda: 9.9)[0] == "torch"
    with pytest.raises(UserError, match="built without oneDNN"):
        agree_on_library("onednn", engine())


@pytest.mark.parametrize(("seconds", "turns", "lead"), [((0.009, 0.003), 8, 3.0), ((0.9, 0.6), 2, 1.5)])
def test_measurement_ends_in_time(seconds: tuple[float, float], turns: int, lead: float) -> None:
    """Turns of 12 ms: eight in 96 ms, since a ninth would pass 100. A slow machine has the untimed one and another."""
    now, made = [0.0], [0, 0]

    def library(index: int) -> Any:
        def multiply(left: Tensor, right: Tensor) -> Tensor:
            # the first product of each compiles; the best of the others counts
            now[0] += seconds[index] * (1 if made[index] else 1.0)
            made[index] += 1
            return left

        return multiply

    assert measure_lead(lambda: now[0], (library(0), library(1))) == pytest.approx(lead)
    assert made == [turns, turns]


def test_measurement_of_this_machine() -> None:
    assert 0.05 < measure_lead() < 20


def test_processors_that_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    assert read_processor(path) is None
    path.write_text("processor : 0\nBogoMIPS : 50.00\nFeatures : fp asimd\n\nprocessor : 1\n")  # ARM
    assert read_processor(path) is None
    path.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx512f\npower:\n\nx: 1"
    )
    assert read_processor(path) == Processor("AuthenticAMD", 26, frozenset({"fpu", "avx512f"}))


def engine(device: str = "cpu", precision: str = "no") -> Any:
    return SimpleNamespace(device=torch.device(device), precision=precision, is_main=True)


def test_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "on_main", lambda engine, function: function())
    monkeypatch.setattr(products, "read_processor", lambda: ZEN_5)
    monkeypatch.setattr(products, "measure_lead", lambda: 2.0)
    assert agree_on_library("auto", engine())[0] == "onednn"
    assert agree_on_library("auto", engine(), kept="torch")[0] == "torch"
    assert agree_on_library("torch", engine())[0] == "torch"
    for other in (engine("cuda"), engine(precision="bf16")):
        assert agree_on_library("auto", other)[0] == "torch"


# the numbers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 50), (150,), (0,)])
def test_linear_layer_against_fp64(calls: list[Any], shape: tuple[int, ...], bias: bool) -> None:
    """Inputs and gradients in strides that are not those of a matrix, and an input without rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, *shape, generator=generator).movedim(0, -1).requires_grad_()
    weight = torch.randn(96, 80, generator=generator).t().requires_grad_()
    leaves = [x, weight, *([torch.randn(80, generator=generator).requires_grad_()] if bias else [])]
    grad = torch.randn(80, *shape, generator=generator).movedim(0, -1)
    output = linear(x, weight, leaves[2] if bias else None, "onednn")
    ours = [output, *torch.autograd.grad(output, leaves, grad)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.linear(*exact)
    theirs = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for left, right in zip(ours, theirs, strict=True):
        assert left.shape == right.shape and (left - right).norm() <= 1e-6 * right.norm()
    rows = x[..., 0].numel()
    assert calls == [(rows, 96, 80), (rows, 80, 96), (80, rows, 96)]


def test_gradient_that_was_expanded(calls: list[Any]) -> None:
    x, weight = torch.randn(70, 64, requires_grad=True), torch.randn(66, 64, requires_grad=True)
    ours = torch.autograd.grad(linear(x, weight, None, "onednn").sum(), [x, weight])
    theirs = torch.autograd.grad(F.linear(x, weight).sum(), [x, weight])
    assert all(distance(left, right) <= 1e-6 for left, right in zip(ours, theirs, strict=True)) and len(calls) == 3


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_head(calls: list[Any], monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """In slices of so many rows; a gradient of the weight that is added up goes 7 words at a time."""
    monkeypatch.setattr(head, "MOST_LOGITS", rows * 50)
    monkeypatch.setattr(products, "_STRIP", 7)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (11, 50))
    targets, grad = torch.arange(11) * 4, torch.randn(11, generator=generator)
    results = []
    for left, right in ((hidden, weight), (hidden.detach().double(), weight.detach().double())):
        left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
        if left.dtype == torch.float32:
            logps = token_logps(left, right, targets, "onednn")
        else:
            logps = F.linear(left, right).log_softmax(dim=-1)[range(11), targets]
        results.append([logps, *torch.autograd.grad(logps, [left, right], grad.to(logps.dtype))])
    assert all(distance(ours, theirs) <= 1e-6 for ours, theirs in zip(*results, strict=True))
    slices = -(-11 // rows)
    strips = (slices - 1) * 8
    assert len(calls) == slices * (2 if slices == 1 else 3) + 1 + strips


@pytest.mark.parametrize("kind", ["llama", "qwen3", "minimind_moe"])
def test_scores_and_gradients_of_both_libraries(calls: list[Any], kind: str) -> None:
    model = tiny_model(kind).eval()
    plain, torchs, onednns = scored(model, "torch", plain=True), scored(model, "torch"), scored(model, "onednn")
    assert calls
    for ours in (torchs, onednns):
        for left, right in zip(ours, plain, strict=True):
            assert distance(left, right) <= 1e-5


def test_torch_s_own_bits(calls: list[Any]) -> None:
    """With `torch` nothing is called but what is called without this module."""
    scored(tiny_model("llama"), "torch")
    assert calls == []
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).requires_grad_() for n in (300, 500))
    targets = torch.arange(300)
    logps = token_logps(hidden, weight, targets)
    ours = [logps, *torch.autograd.grad(logps.sum(), [hidden, weight])]
    logits = torch.mm(hidden.detach(), weight.detach().t())
    numerators = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    grad = (numerators / numerators.sum(dim=-1, keepdim=True)).neg_()
    grad.scatter_add_(1, targets[:, None], torch.ones(300, 1))
    assert torch.equal(ours[1], torch.mm(grad, weight.detach()))
    assert torch.equal(ours[2], grad.t() @ hidden.detach())


def test_attention_s_larger_products(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward, five backward of each key head of a block of so many multiplications, filled up to 64."""
    generator = torch.Generator().manual_seed(0)
    # blocks of 120, 120, 120 queries that see 120, 240, 360 keys, and of 30 that see 330
    segments = (PairSegment(0, 300, 60, 30),)
    states = [torch.randn(1, heads, 390, 32, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    monkeypatch.setattr(attention_cpu, "LARGE", 240 * 240 * 32)
    output = {}
    for library in ("torch", "onednn"):
        attended, _ = pair_attention(None, *states, None, pair_segments=segments, library=library)
        output[library] = [attended, *torch.autograd.grad(attended.square().sum(), states)]
    for ours, theirs in zip(output["onednn"], output["torch"], strict=True):
        assert distance(ours, theirs) <= 1e-6
    # rows, inner size, columns: scores, outputs; then of weights, scores, queries, keys, values
    assert set(calls) == {shape for keys in (256, 384) for shape in ((256, 32, keys), (256, keys, 32), (keys, 256, 32))}
    assert len(calls) == 2 * 2 * (2 + 4)


def test_a_run_s_attention_is_told_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    original = attention_cpu.CpuPairAttention.apply
    monkeypatch.setattr(
        attention_cpu.CpuPairAttention, "apply", lambda *given: (told.append(given[-1]), original(*given))[1]
    )
    for library in ("onednn", "torch"):
        scored(tiny_model("llama"), library)
    assert told == ["onednn"] * 2 + ["torch"] * 2


def test_half_precision_is_left_to_autocast(calls: list[Any]) -> None:
    model = tiny_model("llama")
    ours, theirs = scored(model, "onednn", half=True), scored(model, "torch", half=True)
    assert calls == [] and all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


def test_recomputation_uses_the_same_library(calls: list[Any]) -> None:
    model = tiny_model("llama").train()
    kept, made = scored(model, "onednn"), len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = scored(model, "onednn")
    assert len(calls) - made == made + 2 * 7  # two layers of seven products once more
    assert all(torch.equal(left, right) for left, right in zip(kept, recomputed, strict=True))


def test_frozen_weights_under_lora(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers' seven weights no gradient is made, and LoRA's own matrices are too narrow to gain anything."""
    monkeypatch.setattr(products, "_SMALLEST", 16)
    model = tiny_model("llama")
    add_adapters(model, r=4, alpha=16, dropout=0.0, target_modules=[], base="base", seed=0)
    with torch.no_grad():  # they begin at 0
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    ours, made = scored(model.eval(), "onednn"), len(calls)
    assert made == 14 + 14 - 3 + 1 + 1  # forward, backward without the first layer's q, k, v; the head twice
    assert not any(4 in shape for shape in calls)
    for left, right in zip(ours, scored(model, "torch"), strict=True):
        assert distance(left, right) <= 1e-5


def test_model_is_whole_afterwards(calls: list[Any]) -> None:
    model = tiny_model("llama")
    scored(model, "onednn")
    made = len(calls)
    model(torch.arange(10)[None])
    assert len(calls) == made and not any("forward" in vars(module) for module in model.modules())


# half precision


def half_attention(dtype: torch.dtype, kept_keys: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Relative errors of outputs and gradients, against fp64, of our attention and of SDPA on the same bf16 states."""
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", kept_keys)
    segments = (PairSegment(0, 80, 120, 110), PairSegment(310, 1, 60, 0))
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, 371, 32, generator=generator).to(dtype) for heads in (4, 2, 2)]
    states[0], states[1] = states[0] * 2, states[1] * 2
    grad = torch.randn(1, 371, 4, 32, generator=generator).to(dtype)

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [state.detach().to(dtype).requires_grad_() for state in states]
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]

    exact = results(lambda q, k, v: sdpa_attention(q, k, v, segments, None, None), torch.float64)
    forms = {
        "ours": lambda q, k, v: pair_attention(None, q, k, v, None, pair_segments=segments)[0],
        "sdpa": lambda q, k, v: sdpa_attention(q, k, v, segments, None, None),
    }
    return {
        name: [distance(left, right) for left, right in zip(results(form, dtype), exact, strict=True)]
        for name, form in forms.items()
    }


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("kept_keys", [384, 0])
def test_attention_in_bf16_is_as_exact_as_sdpa(monkeypatch: pytest.MonkeyPatch, kept_keys: int, units: bool) -> None:
    monkeypatch.setattr(attention, "has_bf16_units", lambda: units)
    errors = half_attention(torch.bfloat16, kept_keys, monkeypatch)
    for ours, theirs in zip(errors["ours"], errors["sdpa"], strict=True):
        assert ours <= 1.05 * theirs and ours < 5e-3
    assert sum(errors["ours"]) < sum(errors["sdpa"])
    if not units:
        assert max(errors["ours"]) < 2e-3


def test_attention_in_bf16_keeps_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_bf16_units", lambda: True)
    states = [torch.randn(1, heads, 20, 8).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        pair_attention(None, *states, None, pair_segments=(PairSegment(0, 5, 7, 8),))
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in kept) == 20 * 8 * (4 + 2 + 2) + 4 * (12 * 12 + 8 * 13)


@pytest.mark.parametrize(
    ("flags", "answer"), [({"avx512f"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True), (None, False)]
)
def test_units_for_bf16(monkeypatch: pytest.MonkeyPatch, flags: set[str] | None, answer: bool) -> None:
    processor = None if flags is None else ZEN_4._replace(flags=frozenset(flags))
    monkeypatch.setattr(cpu, "read_processor", lambda: processor)
    assert cpu.has_bf16_units.__wrapped__() is answer


@pytest.mark.parametrize(("units", "lead", "says"), [(True, 2.9, True), (True, 1.7, False), (False, 2.9, False)])
def test_notice_of_faster_half_precision(monkeypatch: pytest.MonkeyPatch, units: bool, lead: float, says: bool) -> None:
    monkeypatch.setattr(products, "has_bf16_units", lambda: units)
    notice = half_precision_notice("torch", lambda: lead)
    assert (notice is not None) == says
    if notice is not None:
        assert "bf16 2.9 times as fast as fp32" in notice and "\n" not in notice


def test_a_run_in_fp32_is_told_once(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(products, "has_bf16_units", lambda: True)
    monkeypatch.setattr(products, "measure_lead", lambda **given: 3.0)
    flags = inputs.flags(tmp_path, save_steps=2, matmul="torch")
    train_here(flags)
    train_here([*flags, "--num_train_epochs", "2"])  # a run that goes on is not asked to change
    assert caplog.text.count("--mixed_precision bf16") == 1


# the run


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiny model's layers are large enough for oneDNN."""
    monkeypatch.setattr(products, "_SMALLEST", 1)
    yield


def recorded(output_dir: Path) -> list[str]:
    """The library that summary and checkpoints name."""
    states = [json.loads(path.read_text())["identity"] for path in output_dir.glob("checkpoints/step-*/trainer_*.json")]
    return [state["matmul"] for state in states] + [json.loads((output_dir / "summary.json").read_text())["matmul"]]


def test_a_run_with_onednn_resumes_to_the_same_bits(
    inputs: Inputs, tmp_path: Path, narrow: None, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Begun with oneDNN; `auto` keeps to it, and torch's own is another run."""
    options: dict[str, Any] = dict(save_steps=2, save_total_limit=0, eval_data=inputs.eval_data, num_train_epochs=2)
    run, other = tmp_path / "run", tmp_path / "other"
    train_here(inputs.flags(run, matmul="onednn", **options))
    shutil.copytree(run, other)
    middle = other / "checkpoints" / "step-000002"
    with pytest.raises(UserError, match="matmul: was onednn, is torch"):
        train_here(inputs.flags(other, matmul="torch", resume=middle, **options))
    made = len(calls)
    train_here(inputs.flags(other, matmul="auto", resume=middle, **options))
    assert len(calls) > made and "matmul: onednn (as the run began)" in caplog.text
    assert same_bits(run, other)
    assert set(recorded(run) + recorded(other)) == {"onednn"}
    train_here(inputs.flags(tmp_path / "torch", matmul="torch", **options))
    for ours, theirs in zip(train_lines(run), train_lines(tmp_path / "torch"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_checkpoints_from_before_there_was_a_choice_mean_torch(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_former(state: TrainerState, checkpoint: Path) -> None:
        write_state(replace(state, identity={k: v for k, v in state.identity.items() if k != "matmul"}), checkpoint)

    flags = inputs.flags(tmp_path, save_steps=2)
    with monkeypatch.context() as former:
        former.setattr(directory, "write_state", write_former)
        train_here([*flags, "--matmul", "torch"])
    monkeypatch.setattr(products, "choose_library", lambda processor: ("onednn", "so it is said"))
    train_here([*flags, "--num_train_epochs", "2"])
    assert recorded(tmp_path)[-1] == "torch"


def test_libraries_have_caches_of_their_own(inputs: Inputs, tmp_path: Path) -> None:
    for name, library in (("a", "torch"), ("b", "onednn"), ("c", "onednn")):
        train_here(inputs.flags(tmp_path / name, matmul=library, reference="cache", max_steps=1))
    assert len(list((Path(os.environ["MINIMIND_DPO_CACHE"]) / "reference").iterdir())) == 2
