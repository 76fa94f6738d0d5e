"""Shared fixtures. Everything here works without the network and without any file outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers_run import Inputs, make_inputs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The measured fixtures that lie beside the project in CI; a user's clone has none."""
    path = REPOSITORY.parent / "shared" / "fixtures"
    if not path.is_dir():
        pytest.skip("the measured fixtures (../shared/fixtures) are not beside this checkout")
    return path


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with an empty token and reference cache of its own."""
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model with its tokenizer, 21 training pairs and 5 held-out pairs."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
