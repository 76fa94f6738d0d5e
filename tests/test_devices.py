"""What is set before a device starts, and runs on devices that lack something, by stand-ins: there is no GPU here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_forks import launched
from helpers_run import REPOSITORY, Inputs, built, environment, lines, same_bits, train_here
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minimind_dpo.config import load_config
from minimind_dpo.data.batch import PairBatch
from minimind_dpo.engine.devices import held_dtype, repeating, sum_dtype
from minimind_dpo.models.fast import attention
from minimind_dpo.objective.layout import PairLayout
from minimind_dpo.training import loop
from minimind_dpo.training.step import optimizer_step

CPU = torch.device("cpu")
CPU_CONFIGURATIONS = sorted(path.stem for path in (REPOSITORY / "configs" / "accelerate").glob("*_cpu.yaml"))


def switches() -> tuple[bool, bool, bool, str | None]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_a_deterministic_run_has_its_switches_and_gives_them_back(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on in every step, and off again afterwards; on a CPU no bit depends on them."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[Any] = []

    def watched(*given: Any) -> Any:
        seen.append(switches())
        return optimizer_step(*given)

    before = switches()
    monkeypatch.setattr(loop, "optimizer_step", watched)
    for name in ("true", "false"):
        assert train_here(inputs.flags(tmp_path / name, deterministic=name, max_steps=2)) == 0
        assert switches() == before
    assert seen == [(True, False, False, ":4096:8")] * 2 + [before] * 2 and not before[0]
    assert same_bits(tmp_path / "true", tmp_path / "false")


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = switches()
        with pytest.raises(KeyError), repeating(True):
            assert switches() == (True, False, False, ":16:8")
            raise KeyError
        with repeating(False):
            assert switches() == before
        assert switches() == before == (True, True, True, ":16:8")
    finally:
        torch.use_deterministic_algorithms(False)


def test_it_stays_as_it_is_over_a_resume(inputs: Inputs, tmp_path: Path) -> None:
    assert train_here(inputs.flags(tmp_path, max_steps=1, save_steps=1)) == 0
    with pytest.raises(ValueError, match="deterministic: was False, is True"):
        train_here(inputs.flags(tmp_path, max_steps=2, save_steps=1, deterministic=True))


# `start_engine` on a machine of one GPU, as far as it can be told to a build without CUDA; a process a case says what
# it came to
STARTED = """
import json, os, sys
import torch
from minimind_dpo.config import TrainConfig
from minimind_dpo.engine import launcher
from minimind_dpo.errors import UserError

torch.accelerator.is_available = lambda: True
torch.accelerator.device_count = lambda: 1
for cuda, variables in json.loads(sys.argv[1]):
    if os.fork() == 0:
        torch.version.cuda = cuda
        os.environ.update(variables)
        try:
            device = launcher.start_engine(TrainConfig()).device
            print(device, os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
        except UserError as error:
            print(str(error).split(";")[0], flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="where segments can grow")
def test_what_an_engine_sets_up_where_there_is_a_gpu() -> None:
    """(accelerate itself finds no GPU, so the device is the CPU either way.)"""
    cases: dict[str, tuple[str | None, dict[str, str]]] = {
        "cpu expandable_segments:True None": ("13.0", {}),
        "cpu max_split_size_mb:64 None": ("13.0", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        "cpu None max_split_size_mb:64": ("13.0", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
        "cpu None None": (None, {}),  # ROCm
        # two ranks on the machine of one GPU: on the CPU they may be as many as they like
        "cpu None None ": ("13.0", {"ACCELERATE_USE_CPU": "True", "LOCAL_WORLD_SIZE": "2"}),
    }
    own = {name: value for name, value in environment().items() if "ALLOC_CONF" not in name}
    # accelerate would leave DeepSpeed out for it
    contradiction = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
    cases["ACCELERATE_USE_CPU: accelerate leaves DeepSpeed out for it"] = (None, contradiction)
    words = [sys.executable, "-c", STARTED, json.dumps(list(cases.values()))]
    said = subprocess.check_output(words, env=own, text=True, cwd=REPOSITORY).splitlines()
    assert said == [case.strip() for case in cases]


@pytest.mark.parametrize("name", CPU_CONFIGURATIONS)
def test_cpu_configurations_hide_gpus(name: str) -> None:
    """From each rank, whichever of accelerate's launchers starts it."""
    assert yaml.safe_load((REPOSITORY / "configs" / "accelerate" / f"{name}.yaml").read_text())["use_cpu"] is True
    variables = launched(name)[1]
    assert variables.get("ACCELERATE_USE_CPU") == "True" or variables["CUDA_VISIBLE_DEVICES"] == "-1,-1"


@pytest.mark.skipif("MINIMIND_DPO_TEST_GPUS" in os.environ, reason="asked to show them")
def test_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


class WithoutFloat64(TorchDispatchMode):
    """A device that refuses float64, as MPS does: no operation may give such a tensor."""

    def __enter__(self) -> WithoutFloat64:
        sum_dtype.cache_clear()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        sum_dtype.cache_clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 for tensor in given):
            raise TypeError(f"{func}: this device has no float64")
        return result


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> WithoutFloat64:
    """The CPU as such a device; batches are laid out on the host, which has float64."""
    honest = PairLayout.__call__

    def on_the_host(layout: PairLayout, rows: Any) -> PairBatch:
        with _disable_current_modes():
            return honest(layout, rows)

    monkeypatch.setattr(PairLayout, "__call__", on_the_host)
    return WithoutFloat64()


def test_the_type_of_sums(without_float64: WithoutFloat64) -> None:
    with without_float64:
        assert held_dtype(torch.float64, CPU) == sum_dtype(CPU) == torch.float32
        assert held_dtype(torch.int64, CPU) == torch.int64
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(3).double()
    assert held_dtype(torch.float64, CPU) == sum_dtype(CPU) == torch.float64


def test_a_run_says_how_it_attends(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attention._say.cache_clear()
    with caplog.at_level(logging.INFO, "minimind_dpo"):
        assert train_here(inputs.flags(tmp_path, max_steps=1)) == 0
    assert caplog.text.count("attention over packed pairs: on the CPU, a pair at a time") == 1


LOSSES = {
    "sigmoid": {},
    "several": {"loss_type": "sigmoid ipo", "loss_weights": "1 0.5", "f_divergence_type": "js_divergence"},
    "over the step": {"loss_type": "beta_dpo", "ld_alpha": 0.5, "use_weighting": True},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=list(LOSSES))
def test_a_step_on_a_device_without_float64(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], without_float64: WithoutFloat64
) -> None:
    """Reference, losses, metrics, the way back, clipping and AdamW; numbers are those of a device that has it."""
    flags = []
    for name, value in (("reference", "live"), *options.items()):
        flags += [f"--{name}", *str(value).split()]
    found = {}
    for name in ("with", "without"):
        run = built(load_config([*inputs.flags(tmp_path / name, max_steps=1), *flags]))
        run.scorer.train()
        loaded = next(iter(loop.load_steps(run.train_data.dataset, run.plans(), run.layout, 0, CPU)))
        with without_float64 if name == "without" else nullcontext():
            found[name] = optimizer_step(run, loaded, 1e-2)
    assert (found["with"].sums.dtype, found["without"].sums.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(found["without"].sums.double(), found["with"].sums, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(found["without"].grad_norm, found["with"].grad_norm, rtol=1e-4, atol=0)


def test_a_run_on_a_device_without_float64(
    inputs: Inputs, tmp_path: Path, without_float64: WithoutFloat64, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step and evaluation of a whole run; its metrics are those of a device that has it."""
    options = {"eval_data": inputs.eval_data, "max_steps": 2, "eval_steps": 1}
    assert train_here(inputs.flags(tmp_path / "with", **options)) == 0
    for name in ("optimizer_step", "evaluate", "empty_rewards"):
        honest = getattr(loop, name)

        def there(*given: Any, honest: Any = honest) -> Any:
            with without_float64:
                return honest(*given)

        monkeypatch.setattr(loop, name, there)
    assert train_here(inputs.flags(tmp_path / "without", **options)) == 0
    for first, second in zip(lines(tmp_path / "with"), lines(tmp_path / "without"), strict=True):
        for key in first.keys() - {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}:
            assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-4), key
