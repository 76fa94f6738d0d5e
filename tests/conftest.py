"""Shared fixtures. Everything here works without the network and without any file outside the repository."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_run import Inputs, make_inputs

from minimind_dpo.ending import STOP_SIGNALS

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


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that ends its process leaves signals ignored, and what a later test starts would inherit that."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model with its tokenizer, 21 training pairs and 5 held-out pairs."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))
