"""What is set before a device starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_forks import launched
from helpers_run import REPOSITORY, Inputs, environment, same_bits, train_here
from torch.utils import deterministic

from minimind_dpo.engine.devices import repeating
from minimind_dpo.training import loop
from minimind_dpo.training.step import optimizer_step

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

torch.accelerator.is_available = lambda: True
torch.accelerator.device_count = lambda: 1
for cuda, variables in json.loads(sys.argv[1]):
    if os.fork() == 0:
        torch.version.cuda = cuda
        os.environ.update(variables)
        device = launcher.start_engine(TrainConfig()).device
        print(device, os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
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
