"""Weights & Biases, offline: what is in the run file afterwards, read back by hand."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_forks import Forks
from helpers_run import Inputs, lines, run_command
from transformers.integrations.integration_utils import rewrite_logs
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": "dummy-secret-" + "0" * 27, "WANDB_SILENT": "true"}
BLOCK = 32768  # bytes; the file is a LevelDB log
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file: a 7-byte header, then chunks with crc, length and type, none across blocks.

    A killed run's file ends anywhere; what is incomplete there is left out.
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B" and struct.unpack("<H", data[4:6]) == (0xBEE1,)
    position, parts = 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(chunk) < length:
            return
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        position += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def _files(output_dir: Path) -> list[Path]:
    """The run files of all sessions, oldest first (their directories' names begin with the time)."""
    return sorted(output_dir.glob("wandb/offline-run-*/run-*.wandb"))


def history_of(path: Path) -> dict[int, dict[str, Any]]:
    """Logged values by step."""
    history = {}
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history[int(row["_step"])] = row
    return history


def _config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for record in _records(path):
        updates = {"config": record.config.update, "run": record.run.config.update}
        for item in updates.get(record.WhichOneof("record_type") or "", ()):
            config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return config


def _assert_same_numbers(history: dict[int, dict[str, Any]], logged: list[dict[str, Any]]) -> None:
    """Every line of metrics.jsonl is in the history under its step, number by number, as transformers names it."""
    for line in logged:
        row = history[line["step"]]
        assert row["train/global_step"] == line["step"]
        for name, value in rewrite_logs({name: value for name, value in line.items() if name != "step"}).items():
            assert row[name] == pytest.approx(value, rel=1e-12, abs=0), (line["step"], name)


def test_history_is_metrics_jsonl(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """Two ranks, one W&B run inside the run directory: every logged step and evaluation, the settings, no secret."""
    flags = inputs.flags(
        tmp_path / "run",
        report_to="wandb",
        run_name="tiny run",
        eval_data=inputs.eval_data,
        eval_steps=2,
        num_train_epochs=2,
        gradient_accumulation_steps=1,
    )
    assert forks.run(flags, tmp_path, "multi_cpu", **OFFLINE) == [0, 0], (tmp_path / "log").read_text("utf-8")

    (path,) = _files(tmp_path / "run")
    history = history_of(path)
    assert sorted(history) == [0, 1, 2, 3, 4, 5, 6]
    assert {"eval/loss", "eval/rewards/margins"} <= history[0].keys() and "train/loss" not in history[0]
    assert {"train/loss", "train/rewards/margins", "eval/loss"} <= history[2].keys()
    _assert_same_numbers(history, lines(tmp_path / "run"))

    config = _config(path)
    assert config["beta"] == 0.5 and config["loss_type"] == ["sigmoid"] and config["learning_rate"] == 1e-2
    assert config["train_data"] == [str(inputs.train_data)] and config["per_device_train_batch_size"] == 4
    (run,) = [record.run for record in _records(path) if record.WhichOneof("record_type") == "run"]
    assert run.display_name == "tiny run" and run.project == "minimind_dpo"

    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert path in files and tmp_path / "run" / "config.yaml" in files
    assert [file for file in files if OFFLINE["WANDB_API_KEY"].encode() in file.read_bytes()] == []


def _stop_after_a_checkpoint(forks: Forks, flags: list[str], run: Path, stop: signal.Signals) -> int:
    """Start a run, stop it once there is a newer checkpoint, and return the step of the newest one then."""
    before = _newest_step(run / "checkpoints")
    started = forks.start(flags, run.parent, **OFFLINE)
    started.wait_until(lambda: _newest_step(run / "checkpoints") != before, 240)
    started.signal(stop)
    assert started.wait() == [{signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}[stop]]
    return _newest_step(run / "checkpoints")


def _newest_step(checkpoints: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")), default=0)


def test_resumed_run_goes_on_reporting(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """Killed, resumed, stopped, resumed: three sessions of one W&B run, each going on where its checkpoint was."""
    run = tmp_path / "run"
    flags = inputs.flags(
        run,
        report_to="wandb",
        num_train_epochs=20,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )
    killed = _stop_after_a_checkpoint(forks, flags, run, signal.SIGKILL)
    stopped = _stop_after_a_checkpoint(forks, flags, run, signal.SIGTERM)
    result = run_command(flags, **OFFLINE)  # as a user's run reports
    assert result.returncode == 0, result.stderr
    logged = lines(run)
    assert [line["step"] for line in logged] == list(range(1, 221)) and 0 < killed < stopped < 220

    paths = _files(run)
    assert len(paths) == 3 and len({path.name for path in paths}) == 1  # one id: `wandb sync` joins the sessions
    first, second, third = map(history_of, paths)  # a killed session leaves what it had written by then
    assert [*first, *second, *third] == list(range(1, 221))
    assert list(third) == list(range(stopped + 1, 221))
    _assert_same_numbers(third, logged[stopped:])
    measured = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}  # of steps that were made twice
    _assert_same_numbers(
        first | second, [{k: v for k, v in line.items() if k not in measured} for line in logged[:stopped]]
    )
