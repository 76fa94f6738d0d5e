"""`minimind-dpo precompute`: training after it computes nothing, and has the bits of a run that filled the cache."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_forks import Forks
from helpers_run import WORDS, Inputs, command, environment, lines, same_bits, train_here

from minimind_dpo import cli
from minimind_dpo.reference.cache import ReferenceCache
from minimind_dpo.reference.filling import CacheFiller
from minimind_dpo.reference.sources import LiveReference

TIMES = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def precompute(flags: list[str], forks: Forks, directory: Path, engine: str | None = None) -> str:
    """What the command says."""
    cache = {"MINIMIND_DPO_CACHE": os.environ["MINIMIND_DPO_CACHE"]}
    codes = forks.run(flags, directory, engine, program="minimind_dpo.precompute", **cache)
    said = (directory / "log").read_text("utf-8")
    assert set(codes) == {0}, said
    return said


def cache_files() -> list[str]:
    """What lies in the only cache directory of the test, with the time of its last change."""
    directories = list((Path(os.environ["MINIMIND_DPO_CACHE"]) / "reference").glob("*"))
    if not directories:
        return []
    (directory,) = directories
    return sorted(f"{path.relative_to(directory)} {path.stat().st_mtime_ns}" for path in directory.rglob("*.*"))


def numbers(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock said."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(output_dir)]


def assert_trains_as_if_it_had_filled(
    inputs: Inputs, directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Training with the present cache computes nothing, and gives the bits of training with an empty one."""
    before = cache_files()
    with monkeypatch.context() as patched:
        patched.setattr(CacheFiller, "fill", None)
        patched.setattr(ReferenceCache, "write_chunk", None)
        assert train_here(inputs.flags(directory / "after", reference="cache", **options)) == 0
    assert cache_files() == before
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(directory / "empty"))
    assert train_here(inputs.flags(directory / "itself", reference="cache", **options)) == 0
    assert numbers(directory / "after") == numbers(directory / "itself")
    assert same_bits(directory / "after", directory / "itself")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 2},
        {"max_steps": 1},
        {"lora_r": 4},
        {"attn_implementation": "sdpa"},
        {"gradient_checkpointing": "true"},
    ],
)
def test_training_computes_nothing(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:
    options = {"eval_data": inputs.eval_data} | options
    flags = inputs.flags(tmp_path / "unused", **options)
    assert cli.main(["precompute", *flags]) == 0
    pairs = (8 if "max_steps" in options else 21) + 5
    assert f"{pairs} pairs: {pairs} scored (" in capsys.readouterr().out
    assert not (tmp_path / "unused").exists()
    assert cli.main(["precompute", *flags, "--gradient_accumulation_steps", "2"]) == 0
    assert f"{pairs} pairs: 0 scored" in capsys.readouterr().out
    assert_trains_as_if_it_had_filled(inputs, tmp_path, monkeypatch, **options)


@pytest.mark.parametrize("engine", ["multi_cpu", "ds_zero3_cpu"])
def test_two_ranks_for_one(
    inputs: Inputs, tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Two ranks, sharing the pairs or the model as well, fill the cache that a run on one process reads."""
    options = {"train_data": long_data(tmp_path / "long.jsonl", 150), "max_steps": 19, "logging_steps": 5}
    said = precompute(inputs.flags(tmp_path / "unused", **options | {"max_steps": -1}), forks, tmp_path, engine)
    assert "150 pairs: 150 scored (" in said
    assert not (tmp_path / "unused").exists()
    assert_trains_as_if_it_had_filled(inputs, tmp_path, monkeypatch, **options)


def long_data(path: Path, pairs: int) -> Path:
    rng = random.Random(1)
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"{number} {' '.join(rng.choices(WORDS, k=8))}",
                    "chosen": f"a {rng.choice(WORDS)}",
                    "rejected": f"the {' '.join(rng.choices(WORDS, k=rng.randint(1, 20)))}",
                }
            )
            + "\n"
            for number in range(pairs)
        )
    )
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_stops_it_and_it_goes_on(inputs: Inputs, tmp_path: Path, forks: Forks, number: signal.Signals) -> None:
    flags = inputs.flags(tmp_path / "unused", train_data=long_data(tmp_path / "long.jsonl", 3000))
    words = [word.replace("minimind_dpo.train", "minimind_dpo.precompute") for word in command(flags)]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    cache, deadline = Path(os.environ["MINIMIND_DPO_CACHE"]), time.time() + 120
    while not list(cache.glob("reference/*/chunk-*.arrow")) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "stopped early while computing reference log-probabilities; the same command continues there" in stderr
    kept = 64 * len(list(cache.glob("reference/*/chunk-*.arrow")))
    assert 0 < kept < 3000
    assert f"{kept} found" in precompute(flags, forks, tmp_path)


@pytest.mark.parametrize(
    ("options", "fills"),
    [
        ({}, False),
        ({"max_steps": 2}, False),
        ({"num_train_epochs": 2}, True),
        ({"max_steps": 4}, True),
        ({"eval_data": "held out"}, True),
    ],
)
def test_auto_fills_a_cache_only_to_read_it_twice(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], fills: bool
) -> None:
    """A single pass starts at once with a live reference; a cache that is complete is read by any run."""
    if "eval_data" in options:
        options["eval_data"] = inputs.eval_data
    assert train_here(inputs.flags(tmp_path / "empty", **options)) == 0
    assert any(".arrow " in name for name in cache_files()) == fills
    assert cli.main(["precompute", *inputs.flags(tmp_path / "unused", **options)]) == 0
    before = cache_files()
    monkeypatch.setattr(CacheFiller, "fill", None)
    monkeypatch.setattr(LiveReference, "per_token_logps", None)
    assert train_here(inputs.flags(tmp_path / "complete", **options)) == 0
    assert cache_files() == before
    for ours, theirs in zip(numbers(tmp_path / "empty"), numbers(tmp_path / "complete"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("reference", ["live", "offload"])
def test_a_reference_without_a_cache_is_refused(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str
) -> None:
    assert cli.main(["precompute", *inputs.flags(tmp_path, reference=reference)]) == 2
    assert f"reference: a run with {reference} reads no cache" in capsys.readouterr().err


def test_help_names_its_own_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["precompute", "--help"])
    assert capsys.readouterr().out.startswith("usage: minimind-dpo precompute [--config FILE]")
