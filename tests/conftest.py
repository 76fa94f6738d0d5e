"""Shared fixtures. Everything here works without the network and without any file outside the repository."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_forks import Forks
from helpers_run import Inputs, make_inputs

from minimind_dpo.ending import STOP_SIGNALS

if "MINIMIND_DPO_TEST_GPUS" not in os.environ:  # figures and bits here are a CPU's; CUDA starts later than this
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LOGGERS = (
    "minimind_dpo",
    "accelerate",
    "bitsandbytes",
    "torch.distributed.elastic",
)  # those whose level a command sets
# pytest in the background of a script would hand it on as ignored to what tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
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


@contextmanager
def process_as_before() -> Iterator[None]:
    """A command that runs in this process leaves signals ignored, and sets levels of loggers and variables.

    A later test, and what it starts, would inherit them and depend on the order of tests.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    environment = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    """Each test leaves the process as it was."""
    with process_as_before():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    """So does each fixture of several tests, which is made before a test's own fixtures are."""
    if fixturedef.scope == "function":
        return (yield)
    with process_as_before():
        return (yield)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny model with its tokenizer, 21 training pairs and 5 held-out pairs."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A program that forks runs; what it has imported serves all tests."""
    program = Forks()
    yield program
    program.close()
