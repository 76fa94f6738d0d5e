"""What is set before a device starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_run import Inputs, same_bits, train_here
from torch.utils import deterministic

from minimind_dpo.engine.devices import repeating
from minimind_dpo.training import loop
from minimind_dpo.training.step import optimizer_step


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
