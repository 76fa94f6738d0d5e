"""Stopping early in every phase: exit code 75, one line, nothing half-written, and the undisturbed bits afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from helpers_run import REPOSITORY, Inputs, command, environment, lines, same_bits, train_here

from minimind_dpo.data.tokenized import tokenize_files
from minimind_dpo.ending import Ending, StopRequest
from minimind_dpo.engine import ranks
from minimind_dpo.errors import StoppedEarly, TrainingError
from minimind_dpo.training import evaluation, loop

CLOCKS = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")


def numbers(output_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its clock and memory."""
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines(output_dir)]


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 1.0), (signal.SIGINT, 2.5), (signal.SIGUSR1, 4.0)]
)
def test_a_signal_amid_imports(inputs: Inputs, tmp_path: Path, number: signal.Signals, seconds: float) -> None:
    flags = inputs.flags(tmp_path, num_train_epochs=2000)
    process = subprocess.Popen(command(flags), env=environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr and "stopped" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "seconds"), [(["train", "--accelerate_config", "multi_cpu"], 1.5), (["demo", "--output_dir", "run"], 0.5)]
)
def test_a_signal_to_the_console_script(inputs: Inputs, tmp_path: Path, words: list[str], seconds: float) -> None:
    """While the launcher, or the command itself, is still importing: as a Ctrl-C, to the whole group."""
    flags = inputs.flags(tmp_path / "run", num_train_epochs=2000) if words[0] == "train" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind_dpo.cli", *words, *flags],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr and "stopped" in stderr.splitlines()[-1]


def test_a_command_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A signal amid an export, say: what stood there stays, what was begun is gone."""
    program = (
        "import os, signal, pathlib\n"
        "from minimind_dpo.ending import Ending\n"
        "from minimind_dpo.files import replacing\n"
        "with Ending() as ending, replacing(pathlib.Path('model')) as new:\n"
        "    new.mkdir()\n"
        "    (new / 'weights').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("whole")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "minimind-dpo: stopped by SIGTERM\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_ending_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Ending():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_tokenizing_is_left_between_two_blocks(inputs: Inputs, tmp_path: Path) -> None:
    rows = inputs.train_data.read_text("utf-8") * 20
    (tmp_path / "many.jsonl").write_text(rows, "utf-8")
    calls = 0

    def go_on() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StoppedEarly("before the first step")

    settings: dict[str, Any] = {"max_length": 512, "completion_mask": "final_turn", "on_bad_row": "auto"}
    with pytest.raises(StoppedEarly):
        tokenize_files(str(tmp_path / "many.jsonl"), tiny_tokenizer(), **settings, go_on=go_on)
    assert calls == 3
    assert len(tokenize_files(str(tmp_path / "many.jsonl"), tiny_tokenizer(), **settings)) == 420


def test_ranks_leave_tokenizing_together(inputs: Inputs, tmp_path: Path) -> None:
    """Two ranks, the launcher signalled while rank 0 tokenises and rank 1 waits for it."""
    row = inputs.train_data.read_text("utf-8").splitlines()[0]
    rows = (row.replace("chosen ", f"chosen {number} ", 1) for number in range(200_000))
    (tmp_path / "many.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    flags = inputs.flags(tmp_path / "run", train_data=tmp_path / "many.jsonl")
    words = command(flags, "multi_cpu")
    words[words.index("accelerate.commands.launch")] = "minimind_dpo.launch"
    cache = tmp_path / "cache"
    surroundings = environment(MINIMIND_DPO_CACHE=str(cache))
    process = subprocess.Popen(words, env=surroundings, stderr=subprocess.PIPE, text=True)
    while not any(path.suffix == ".arrow" for path in cache.rglob("*")):
        assert process.poll() is None
        time.sleep(0.1)
    begin = time.monotonic()
    process.terminate()
    seen = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in seen, seen
    assert time.monotonic() - begin < 20 and "stopped early before the first step" in seen


def test_a_waiting_rank_is_heard() -> None:
    store = torch.distributed.HashStore()
    main = ranks._Turn("task", store, lambda: False)
    other = ranks._Turn("task", store, lambda: True)
    waiting = threading.Thread(target=lambda: pytest.raises(StoppedEarly, other.wait, 30.0))
    main.go_on()
    waiting.start()
    with pytest.raises(StoppedEarly):
        for _ in range(100):
            time.sleep(0.05)
            main.go_on()
    main.end(ranks._STOPPED)
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_a_silent_main_process_is_left() -> None:
    """As one that is stopped, or hangs in a file system: the others end after `ddp_timeout`."""
    turn = ranks._Turn("task", torch.distributed.HashStore(), lambda: False)
    with pytest.raises(TrainingError, match="no sign of rank 0 for 1 s"):
        turn.wait(1.0)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_stopped_evaluation_is_made_again(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the first step, in the middle, and after the last one: same lines and bits as a run left alone."""
    options = {"eval_data": inputs.eval_data, "eval_steps": 2, "per_device_train_batch_size": 4}
    train_here(inputs.flags(tmp_path / "whole", **options))
    monkeypatch.setattr(evaluation, "_ASKED_EVERY", 1)
    honest = loop.evaluate

    def stopped_at_step(run: Any, data: Any) -> dict[str, float]:
        if run.state.step == step:
            signal.raise_signal(signal.SIGTERM)
        return honest(run, data)

    with monkeypatch.context() as stopping:
        stopping.setattr(loop, "evaluate", stopped_at_step)
        assert train_here(inputs.flags(tmp_path / "stopped", **options)) == 75
    assert train_here(inputs.flags(tmp_path / "stopped", **options)) == 0
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert same_bits(tmp_path / "stopped", tmp_path / "whole")


def test_max_hours_ends_a_run_that_goes_on_later(inputs: Inputs, tmp_path: Path) -> None:
    options = {"eval_data": inputs.eval_data, "eval_steps": 2}
    train_here(inputs.flags(tmp_path / "whole", **options))
    codes = [train_here(inputs.flags(tmp_path / "run", max_hours=1e-9, **options)) for _ in range(3)]
    assert codes == [75, 75, 0]  # a step each time, however short the time is
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert same_bits(tmp_path / "run", tmp_path / "whole")


def test_time_is_a_request_to_stop() -> None:
    assert not StopRequest() and not StopRequest(max_hours=1.0)
    over = StopRequest(max_hours=0.0)
    assert over and not over.signalled()
