"""bf16 and fp16 with trained weights: the packed layout, and a reference that is the policy's start.

Tiny random models have logits near 0, where half precision rounds nothing that matters; the demo's model does not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_forks import Forks
from helpers_model import tiny_model
from helpers_run import train_lines

from minimind_dpo import load_model
from minimind_dpo.config import save_config
from minimind_dpo.demo.run import ASSETS, demo_config
from minimind_dpo.errors import UserError
from minimind_dpo.models.fast import attention
from minimind_dpo.objective.layout import PACKED, PLAIN, adopt_layout, choose_layout, difference
from minimind_dpo.objective.scoring import PairScorer

CPU = torch.device("cpu")
WEIGHTS = next(ASSETS.glob("*.pth"))
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("live", "cache", "offload", "adapter")


def autocast(precision: str) -> Any:
    return lambda: torch.autocast("cpu", HALF.get(precision), enabled=precision in HALF)


@pytest.mark.parametrize("engine", ["single_cpu", "multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_reference_under_every_engine(tmp_path: Path, forks: Forks, precision: str, engine: str) -> None:
    config = tmp_path / "demo.yaml"
    save_config(demo_config(tmp_path / "unused"), config)
    few = {"train": 8, "heldout": 4}  # pairs; every mode and rank scores them several times, in fp16 slowly
    for name, count in few.items():
        lines = (ASSETS / f"{name}.jsonl").read_text("utf-8").splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    flags = [
        "--config",
        str(config),
        "--train_data",
        str(tmp_path / "train.jsonl"),
        "--eval_data",
        str(tmp_path / "heldout.jsonl"),
        "--max_steps",
        "2",
        "--lr_scheduler_type",
        "constant",
        "--warmup_ratio",
        "0",
        "--per_device_train_batch_size",
        "2",
    ]
    program, launched = "tests/programs/each_reference.py", f"{engine} --mixed_precision {precision}"
    codes = forks.run([str(tmp_path), *flags], tmp_path, launched, program=program)
    said = (tmp_path / "log").read_text("utf-8")
    if (precision, engine[:3]) == ("fp16", "ds_") and "DeepSpeed finds no fp16 arithmetic" in said:
        pytest.skip("DeepSpeed has no fp16 on this processor")
    assert set(codes) == {0}, said
    assert "cannot attend over packed pairs" not in said
    first = {mode: train_lines(tmp_path / mode)[0]["loss"] for mode in MODES}
    evaluated = {mode: json.loads((tmp_path / mode / "summary.json").read_text())["eval_before"] for mode in MODES}
    noise = 1e-6 if precision == "no" else 0.01
    for mode in MODES:
        assert first[mode] == pytest.approx(math.log(2), abs=noise)
        assert evaluated[mode]["eval_loss"] == pytest.approx(math.log(2), abs=noise)
    live, cache = (train_lines(tmp_path / mode)[1]["loss"] for mode in ("live", "cache"))
    assert live != pytest.approx(math.log(2), abs=1e-4)
    assert live == pytest.approx(cache, abs=noise)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_trained_model_is_packed(precision: str) -> None:
    scorer = PairScorer(load_model(WEIGHTS))
    assert choose_layout(scorer, "pairs", CPU, autocast(precision)) is PACKED
    assert scorer.fused_head


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_model_that_reads_packed_rows_as_something_else_is_not(
    precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Attention that lets the rejected branch see the chosen one, as plain causal attention over the row would."""

    def causal(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    with mock.patch.object(attention.CpuPairAttention, "apply", causal):
        assert choose_layout(PairScorer(load_model(WEIGHTS)), "pairs", CPU, autocast(precision)) is PLAIN
    assert "log-probabilities differ by up to" in caplog.text


def test_figures_decide_between_noise_and_structure() -> None:
    expected = torch.full((8,), -3.0)
    noise, broken, biased = expected.clone(), expected.clone(), expected - 0.3
    noise[0] += 0.21
    broken[0] += 4.4
    assert difference(noise, expected, half=True) is None
    assert difference(noise, expected, half=False) == (
        "log-probabilities differ by up to 0.21 nats a token, 0.026 on average"
    )
    assert difference(broken, expected, half=True) is not None
    assert difference(biased, expected, half=True) is not None
    assert difference(torch.full((8,), math.nan), expected, half=True) is not None


def test_a_reference_inherits_the_layout_and_a_named_one_must_have_it() -> None:
    policy = PairScorer(load_model(WEIGHTS))
    layout = choose_layout(policy, "pairs", CPU)
    own, other = PairScorer(load_model(WEIGHTS)), PairScorer(tiny_model("llama"))
    adopt_layout(own, policy, layout, CPU, named=False)
    adopt_layout(other, policy, layout, CPU, named=True)
    assert own.fused_head and other.fused_head

    class Odd(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("pair_segments", None)
            return super().forward(*args, **kwargs)

    odd = tiny_model("llama")
    odd.__class__ = Odd
    odd.lm_head.bias = torch.nn.Parameter(torch.zeros(97))  # its head stays with the model's own forward
    with pytest.raises(UserError, match=r"^ref_model_name_or_path: Odd cannot attend .* does not tell its attention"):
        adopt_layout(PairScorer(odd), policy, layout, CPU, named=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("a fault of the kernel"),
        IndexError("another one"),
    ],
)
def test_memory_and_our_own_kernels_are_no_reason_to_pad(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(attention.CpuPairAttention, "apply", _in_a_kernel(error))
    with pytest.raises(type(error)):
        choose_layout(PairScorer(tiny_model("llama")), "pairs", CPU)


def _in_a_kernel(error: Exception) -> Any:
    """A function of attention.py's file that fails."""
    scope: dict[str, Any] = {"error": error}
    exec(compile("def kernel(*_):\n    raise error", str(attention.__file__), "exec"), scope)
    return scope["kernel"]


def test_a_model_s_own_refusal_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("soft-capped scores and attention sinks have no packed form")

    with mock.patch.object(attention.CpuPairAttention, "apply", refuses):
        assert choose_layout(PairScorer(tiny_model("llama")), "pairs", CPU) is PLAIN
    assert "(NotImplementedError: soft-capped scores and attention sinks have no packed form)" in caplog.text


def test_every_rank_takes_the_main_process_s_answer() -> None:
    scorer = PairScorer(tiny_model("llama"))
    assert choose_layout(scorer, "pairs", CPU, agree=lambda answer: "the main process saw a difference") is PLAIN
    assert not scorer.fused_head
