"""A run: what it leaves, exactness over factorisations, repeats, kills and signals; the real command too."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers_forks import Forks, train_on
from helpers_run import (
    Inputs,
    command,
    environment,
    lines,
    relative_distance,
    run_command,
    same_bits,
    train_here,
    train_lines,
    weights,
)
from helpers_slurm import wait_until

from minimind_dpo.checkpoints.directory import checkpoint_problem
from minimind_dpo.config import load_config
from minimind_dpo.errors import TrainingError, UserError
from minimind_dpo.training import loop
from minimind_dpo.training.run_directory import locked

CONTRACT_METRICS = {
    "step",
    "epoch",
    "pairs_seen",
    "loss",
    "dpo_loss",
    "aux_loss",
    "learning_rate",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "pairs_per_second",
    "tokens_per_second",
    "peak_memory_gib",
}


def test_run_directory(inputs: Inputs, tmp_path: Path) -> None:
    """21 pairs in steps of 8: three steps, the last of 5 pairs; evaluation before, at step 2 and after."""
    flags = inputs.flags(tmp_path, eval_data=inputs.eval_data, eval_steps=2, save_steps=2)
    assert train_here(flags) == 0

    steps = train_lines(tmp_path)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["pairs_seen"] for line in steps] == [8, 16, 21]
    assert all(line.keys() >= CONTRACT_METRICS for line in steps)
    evaluations = [line for line in lines(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]

    written = load_config(["--config", str(tmp_path / "config.yaml")])
    assert written.matmul in ("torch", "onednn")  # what `auto` came to on this machine
    assert written == replace(load_config(flags), matmul=written.matmul, weight_rounding="nearest")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["pairs_seen"] == 21 and len(summary["reference_digest"]) == 64
    assert summary["eval_before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["eval_after"]["eval_loss"] == evaluations[-1]["eval_loss"] != summary["eval_before"]["eval_loss"]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000002", "step-000003"]
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("reference", ["live", "cache"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_first_step_is_ln2(inputs: Inputs, tmp_path: Path, reference: str, loss_type: str) -> None:
    train_here(inputs.flags(tmp_path, reference=reference, loss_type=loss_type, max_steps=2))
    first, second = train_lines(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_live_and_cached_reference_agree(inputs: Inputs, tmp_path: Path) -> None:
    for reference in ("live", "cache"):
        train_here(inputs.flags(tmp_path / reference, reference=reference))
    for live, cached in zip(train_lines(tmp_path / "live"), train_lines(tmp_path / "cache"), strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):
            assert cached[name] == pytest.approx(live[name], rel=1e-4, abs=1e-5)
    assert relative_distance(tmp_path / "live", tmp_path / "cache") < 1e-5


@pytest.mark.parametrize(
    ("batch", "accumulation", "accelerate"),
    [
        (1, 8, None),
        (2, 4, None),
        (2, 2, "multi_cpu"),
        (1, 4, "multi_cpu"),
        (2, 2, "ds_zero1_cpu"),
        (2, 2, "ds_zero2_cpu"),
    ],
)
def test_factorisation_does_not_matter(
    inputs: Inputs, forks: Forks, tmp_path: Path, batch: int, accumulation: int, accelerate: str | None
) -> None:
    """21 pairs in global batches of 8, against micro-batches of 8 on one process."""
    train_here(
        inputs.flags(
            tmp_path / "whole", per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3
        )
    )
    flags = inputs.flags(
        tmp_path / "parts",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
    )
    train_on(accelerate, flags, forks, tmp_path)
    assert relative_distance(tmp_path / "parts", tmp_path / "whole") < 1e-6
    for parts, whole in zip(train_lines(tmp_path / "parts"), train_lines(tmp_path / "whole"), strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("options", [{"attn_implementation": "sdpa"}, {"gradient_checkpointing": "true"}])
def test_layout_and_recomputation_change_nothing(inputs: Inputs, tmp_path: Path, options: dict[str, str]) -> None:
    train_here(inputs.flags(tmp_path / "packed", learning_rate=1e-3))
    train_here(inputs.flags(tmp_path / "other", learning_rate=1e-3, **options))
    assert relative_distance(tmp_path / "other", tmp_path / "packed") < 1e-6


def test_reading_later_and_workers_change_nothing(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU: a step's numbers are read when the next is under way, batches are laid out by a process."""
    train_here(inputs.flags(tmp_path / "plain", num_train_epochs=2, logging_steps=4))
    monkeypatch.setattr(loop, "_steps_ahead", lambda device: 1)
    train_here(inputs.flags(tmp_path / "ahead", num_train_epochs=2, logging_steps=4, dataloader_num_workers=1))
    assert same_bits(tmp_path / "ahead", tmp_path / "plain")
    names = ("step", "loss", "grad_norm", "rewards/margins", "pairs_seen")
    ahead, plain = (
        [[line[name] for name in names] for line in train_lines(tmp_path / run)] for run in ("ahead", "plain")
    )
    assert ahead == plain
    with pytest.raises(TrainingError, match="of optimizer step 2 is not finite"):
        train_here(inputs.flags(tmp_path / "lost", logging_steps=10, learning_rate="1e30", max_grad_norm=0))


def test_bf16_stays_close(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """Autocast to bf16 (8 bits of mantissa): the same run within some percent, and not the same numbers."""
    train_here(inputs.flags(tmp_path / "fp32", learning_rate=1e-3))
    flags = inputs.flags(tmp_path / "bf16", learning_rate=1e-3)
    train_on("single_cpu --mixed_precision bf16", flags, forks, tmp_path)
    half, full = ([line["logps/chosen"] for line in train_lines(tmp_path / run)] for run in ("bf16", "fp32"))
    assert half == pytest.approx(full, rel=0.02) and half != full


def test_weights_scale_their_pairs(inputs: Inputs, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"weight": 3.0} for line in inputs.train_data.read_text().splitlines()]
    weighted = tmp_path / "weighted.jsonl"
    weighted.write_text("\n".join(map(json.dumps, rows)))
    train_here(inputs.flags(tmp_path / "run", train_data=weighted, max_steps=1))
    assert train_lines(tmp_path / "run")[0]["loss"] == pytest.approx(3 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("accelerate", [None, "multi_cpu"])
def test_same_command_same_bits(inputs: Inputs, forks: Forks, tmp_path: Path, accelerate: str | None) -> None:
    """The real command's, and a fork's, whose program orders its sets in another way (PYTHONHASHSEED)."""
    result = run_command(inputs.flags(tmp_path / "first", gradient_accumulation_steps=1), accelerate)
    assert result.returncode == 0, result.stderr
    codes = forks.run(inputs.flags(tmp_path / "second", gradient_accumulation_steps=1), tmp_path, accelerate)
    assert set(codes) == {0}, (tmp_path / "log").read_text("utf-8")
    assert same_bits(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("accelerate", [None, "multi_cpu"])
def test_killed_again_and_again(inputs: Inputs, forks: Forks, tmp_path: Path, accelerate: str | None) -> None:
    """SIGKILL of all processes at random moments; `--resume auto` ends with the undisturbed run's bits."""
    options = dict(
        num_train_epochs=6,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=2,
        save_steps=2,
        eval_data=inputs.eval_data,
        eval_steps=5,
    )
    assert set(forks.run(inputs.flags(tmp_path / "undisturbed", **options), tmp_path, accelerate)) == {0}
    flags, rng, kills = inputs.flags(tmp_path / "killed", **options), random.Random(7), 0
    for _ in range(5):
        started = forks.start(flags, tmp_path, accelerate)
        started.wait_until(progress(tmp_path / "killed" / "metrics.jsonl"))
        time.sleep(rng.uniform(0.0, 0.3))
        started.signal(signal.SIGKILL)
        if started.wait()[0] == 0:
            break
        kills += 1
    codes = forks.run(flags, tmp_path, accelerate)
    assert set(codes) == {0}, (tmp_path / "log").read_text("utf-8")
    assert kills >= 1
    assert same_bits(tmp_path / "killed", tmp_path / "undisturbed")
    names = ("step", "loss", "eval_loss", "grad_norm", "rewards/margins")
    killed, whole = (
        [[line.get(name) for name in names] for line in lines(tmp_path / run)] for run in ("killed", "undisturbed")
    )
    assert killed == whole


def test_ranks_end_with_their_launcher(inputs: Inputs, tmp_path: Path) -> None:
    """torchrun gives its ranks sessions of their own: killing it must not leave them training."""
    flags = inputs.flags(tmp_path / "run", num_train_epochs=500)
    process = subprocess.Popen(
        command(flags, "multi_cpu"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(progress(tmp_path / "run" / "metrics.jsonl"), 120)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_one_run_a_directory(inputs: Inputs, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with locked(directory):
        with (
            pytest.raises(UserError, match=rf"is in use by another run \(process {os.getpid()} on "),
            locked(directory, patience=0.3),
        ):
            pass
    assert train_here(inputs.flags(directory, max_steps=1)) == 0  # free again


def progress(metrics: Path) -> Callable[[], bool]:
    """Whether something new has been logged from now on."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    return lambda: metrics.exists() and metrics.stat().st_mtime_ns > before and "loss" in metrics.read_text()


@pytest.mark.parametrize("accelerate", [None, "multi_cpu"])
def test_sigterm_saves_and_exits_75(inputs: Inputs, forks: Forks, tmp_path: Path, accelerate: str | None) -> None:
    """A stopped run ends with exit code 75 and a checkpoint, and continues to the undisturbed run's bits."""
    options = dict(num_train_epochs=20, gradient_accumulation_steps=1, per_device_train_batch_size=2)
    flags = inputs.flags(tmp_path / "stopped", **options)
    process = subprocess.Popen(
        command(flags, accelerate),
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(progress(tmp_path / "stopped" / "metrics.jsonl"), 120)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    if accelerate is None:  # a launcher reports its workers' codes in its own way
        assert process.returncode == 75, stderr
    checkpoints = list((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1 and checkpoint_problem(checkpoints[0]) is None
    assert not (tmp_path / "stopped" / "summary.json").exists()

    for again in (flags, inputs.flags(tmp_path / "whole", **options)):
        assert set(forks.run(again, tmp_path, accelerate)) == {0}, (tmp_path / "log").read_text("utf-8")
    assert same_bits(tmp_path / "stopped", tmp_path / "whole")


def test_resume_refuses_another_run(inputs: Inputs, tmp_path: Path) -> None:
    train_here(inputs.flags(tmp_path, save_steps=2))
    with pytest.raises(UserError, match=r"belongs to another run:\n  beta: was 0.5, is 0.1"):
        train_here(inputs.flags(tmp_path, save_steps=2, beta=0.1))
    with pytest.raises(UserError, match="reference_digest: was"):
        train_here(inputs.flags(tmp_path, ref_model_name_or_path=tmp_path / "model"))
    with pytest.raises(UserError, match="already holds a run"):
        train_here(inputs.flags(tmp_path, resume="never"))


def test_finished_run_trains_no_further(inputs: Inputs, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path, save_steps=2)
    train_here(flags)
    before = weights(tmp_path), lines(tmp_path)
    assert train_here(flags) == 0
    assert all((weights(tmp_path)[name] == tensor).all() for name, tensor in before[0].items())
    assert lines(tmp_path) == before[1]


def test_damaged_checkpoint_is_passed_over(inputs: Inputs, tmp_path: Path) -> None:
    """One flipped bit in the newest checkpoint: the one before is taken, and the end is the same."""
    options = dict(num_train_epochs=2, save_steps=2, save_total_limit=0)
    train_here(inputs.flags(tmp_path / "whole", **options))
    flags = inputs.flags(tmp_path / "damaged", **options)
    train_here(flags)
    newest = tmp_path / "damaged" / "checkpoints" / "step-000006" / "state-00000-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert checkpoint_problem(newest.parent) == (
        "state-00000-00000.safetensors is damaged (its sha256 differs from manifest.json)"
    )
    train_here(flags)
    assert same_bits(tmp_path / "damaged", tmp_path / "whole")


def test_resuming_an_older_checkpoint_sets_later_ones_aside(inputs: Inputs, tmp_path: Path) -> None:
    """Steps 2, 4, 6 are there and 2 is asked for: 4 and 6 are kept under another name, not counted, not deleted."""
    options = dict(num_train_epochs=2, save_steps=2, save_total_limit=0)
    train_here(inputs.flags(tmp_path, **options))
    checkpoints = tmp_path / "checkpoints"
    before = weights(tmp_path)
    train_here(inputs.flags(tmp_path, resume=checkpoints / "step-000002", **options))
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "abandoned-step-000004",
        "abandoned-step-000006",
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    assert all((weights(tmp_path)[name] == tensor).all() for name, tensor in before.items())
    assert [line["step"] for line in train_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_longer_run_continues_with_a_notice(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_here(inputs.flags(tmp_path, save_steps=2))
    train_here(inputs.flags(tmp_path, save_steps=2, num_train_epochs=2))
    assert "the run now has 6 steps, not 3" in caplog.text
    assert [line["step"] for line in train_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"beta": "-1"}, 2, "beta: must be positive"),
        ({"train_data": "missing.jsonl"}, 2, "missing.jsonl"),
        ({"model_name_or_path": "nowhere/model"}, 2, "nowhere/model"),
        ({"report_to": "wandb"}, 2, "set WANDB_MODE=offline"),
        ({"learning_rate": "1e30", "max_grad_norm": 0}, 1, "of optimizer step 2 is not finite"),
    ],
)
def test_exit_codes(
    inputs: Inputs, forks: Forks, tmp_path: Path, options: dict[str, str], code: int, message: str
) -> None:
    tracker = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert forks.run(inputs.flags(tmp_path / "run", **options), tmp_path, **tracker) == [code]
    said = (tmp_path / "log").read_text("utf-8")
    assert message in said and "Traceback" not in said


def test_the_command_ends_with_the_code(inputs: Inputs, tmp_path: Path) -> None:
    result = run_command(inputs.flags(tmp_path, beta=-1))
    assert result.returncode == 2 and "beta: must be positive" in result.stderr and "Traceback" not in result.stderr


def test_peak_memory_is_the_programs_own() -> None:
    """A process started from one of more than a GiB says what it needs itself."""
    ballast = bytearray(b"x") * (1 << 30)
    code = "from minimind_dpo.training.metrics import _peak_resident_kib; print(_peak_resident_kib())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(ballast) == 1 << 30
    assert 50_000 < int(result.stdout) < 900_000, result.stderr
