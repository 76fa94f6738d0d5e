"""launch.py's exit codes with real `accelerate launch` runs of a small stub, and the scripts under launch/."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_forks import Forks
from helpers_run import REPOSITORY, Inputs, environment, same_bits
from helpers_slurm import wait_until, write_config

from minimind_dpo.launch.workers import overall_code

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.is_file())
CONFIGS = {"one": "single_cpu", "two": "multi_cpu"}

# Ends as its argument says: CODE[,CODE of rank 1]; `wait` ends with 75 on SIGTERM, some time after it.
STUB = """
import os, signal, sys, time
rank = int(os.environ.get("RANK", "0"))
codes = sys.argv[1].split(",")
code = codes[min(rank, len(codes) - 1)]
if code == "wait":
    stopped = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stopped.append(1))
    open(os.path.join(os.path.dirname(__file__), f"ready-{rank}"), "w").close()
    while not stopped:
        time.sleep(0.05)
    time.sleep(1)
    code = "75"
elif code == "forever":
    time.sleep(600)
elif code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(code))
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


PROGRAM = "minimind_dpo.launch"


def arguments(stub: Path, processes: str, codes: str) -> list[str]:
    config = REPOSITORY / "configs" / "accelerate" / f"{CONFIGS[processes]}.yaml"
    return ["--config_file", str(config), "--main_process_port", "0", str(stub), codes]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([75, 75], 75),
        ([75, -15], 75),
        ([-15, 75], 75),
        ([75, 1], 1),
        ([2, -15], 2),
        ([2, 1], 2),
        ([1, 2], 1),
        ([3], 1),
        ([-9], 1),
        ([-15, -15], 1),
    ],
)
def test_overall_code(codes: list[int], code: int) -> None:
    assert overall_code(codes) == code


@pytest.mark.parametrize(
    ("processes", "codes", "code", "message"),
    [
        ("one", "0", 0, ""),
        ("one", "75", 75, ""),
        ("one", "2", 2, "the process ended with exit code 2"),
        ("one", "killed", 1, "the process was killed by SIGKILL"),
        ("two", "0", 0, ""),
        ("two", "75", 75, ""),
        ("two", "0,2", 2, "rank 1 ended with exit code 2"),
        ("two", "forever,7", 1, "rank 1 ended with exit code 7"),
        ("two", "75,forever", 75, ""),
    ],
)
def test_exit_codes(
    forks: Forks, stub: Path, tmp_path: Path, processes: str, codes: str, code: int, message: str
) -> None:
    ended = forks.run(arguments(stub, processes, codes), tmp_path, program=PROGRAM)
    said = (tmp_path / "log").read_text("utf-8")
    assert ended == [code] and message in said, said
    assert "Traceback" not in said and "FAILED" not in said


@pytest.mark.parametrize(
    ("processes", "number"),
    [("one", signal.SIGTERM), ("two", signal.SIGTERM), ("two", signal.SIGUSR1), ("two", signal.SIGINT)],
)
def test_signals_reach_the_workers(
    forks: Forks, stub: Path, tmp_path: Path, processes: str, number: signal.Signals
) -> None:
    started = forks.start(arguments(stub, processes, "wait"), tmp_path, program=PROGRAM)
    ready = stub.with_name("ready-0" if processes == "one" else "ready-1")
    started.wait_until(ready.exists, 60)
    started.signal(number)
    ended, said = started.wait(), (tmp_path / "log").read_text("utf-8")
    assert ended == [75] and "Traceback" not in said, said


def test_a_wrong_argument_is_a_users_mistake(forks: Forks, stub: Path, tmp_path: Path) -> None:
    ended = forks.run(["--config_file", "nowhere.yaml", str(stub), "0"], tmp_path, program=PROGRAM)
    said = (tmp_path / "log").read_text("utf-8")
    assert ended == [2] and "nowhere.yaml" in said and "Traceback" not in said, said


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script(path: Path) -> None:
    """Stops at errors, prints no command lines (they could carry secrets), never takes a key as an argument."""
    text = path.read_text()
    assert "set -euo pipefail" in text
    assert not re.search(r"set -\w*x|xtrace", text)
    assert not re.search(r"(echo|printf|--\w+)[^\n]*\$\{?WANDB_API_KEY\b(?!_FILE)", text)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_every_job_script(path: Path) -> None:
    options = re.findall(r"^#SBATCH (.*)$", path.read_text(), flags=re.M)
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append"} <= set(options)
    assert any(re.fullmatch(r"--signal=USR1@\d+", option) for option in options)
    assert any(option.startswith("--time=") for option in options)


def test_a_nodes_rank_is_read_on_that_node() -> None:
    """SLURM_NODEID in the batch script would be 0 everywhere: only what srun starts may mention it."""
    for path in SCRIPTS:
        assert ("SLURM_NODEID" in path.read_text()) == (path == LAUNCH / "slurm" / "node.sh"), path


# What srun of a job leaves: one word a node (see launch/slurm/node.sh), and its own exit code.
FAKE_SRUN = """#!/usr/bin/env bash
echo "$@" >srun-arguments
node=0
for word in $SAID; do echo "$word" >"$STATE_DIR/node-$node"; echo "last words of $node" \\
    >"$(dirname "$STATE_DIR")/node-$node.log"; node=$((node + 1)); done
exit "$SRUN_CODE"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "$2" >requeued; else echo first; echo second; fi
"""


@pytest.mark.parametrize(
    ("said", "srun", "restarts", "requeued", "code", "message"),
    [
        ("0 0", 0, 0, False, 0, "done"),
        ("75 75", 0, 0, True, 75, "stopped early with a checkpoint; queued again (restart 1 of at most 3)"),
        ("75 terminated", 1, 2, True, 75, "(restart 3 of at most 3)"),
        ("75 75", 0, 3, False, 75, "not queued again after 3 restarts (MAX_RESTARTS=3)"),
        ("1 running", 1, 0, True, 75, "node 1 died; queued again"),
        ("1 running", 1, 3, False, 75, "not queued again"),
        ("0 0", 0, 4, False, 75, "restart 4 is beyond MAX_RESTARTS=3"),
        ("2 1", 143, 0, False, 2, "last words of 0"),
        ("1 2", 1, 0, False, 2, "last words of 1"),
        ("terminated 1", 143, 0, False, 1, "last words of 1"),
        ("", 1, 0, False, 1, "failed; not queued again"),
    ],
)
def test_what_a_job_does_at_its_end(
    tmp_path: Path, said: str, srun: int, restarts: int, requeued: bool, code: int, message: str
) -> None:
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    shutil.copy(LAUNCH / "slurm" / "job.sh", tmp_path / "launch" / "slurm")
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / "slurm" / "train_cpu.sbatch", "srun", "scontrol", "--beta", "a b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "dpo",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "MAX_RESTARTS": "3",
            "SLURM_RESTART_COUNT": str(restarts),
            "SAID": said,
            "SRUN_CODE": str(srun),
            "CONTAINER_ARGS": "--container-image=image --container-mounts=/a:/a",
        },
    )
    assert done.returncode == code and message in done.stdout.replace("\n", " "), done.stdout + done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    if restarts > 3:
        return
    assert f"rendezvous first:{free_port_from(12000 + 7 * 16 + restarts)};" in done.stdout
    arguments = (tmp_path / "srun-arguments").read_text()
    assert "--container-image=image --container-mounts=/a:/a bash launch/slurm/node.sh" in arguments
    assert "--kill-on-bad-exit=1" in arguments and "--open-mode=append" in arguments


def free_port_from(port: int) -> int:
    """The first from there on that nobody listens on: usually `port` itself."""
    with socket.socket() as asking:
        return free_port_from(port + 1) if asking.connect_ex(("127.0.0.1", port)) == 0 else port


def test_ranks_meet_on_a_port_that_nobody_listens_on() -> None:
    def meeting_port(number: int) -> int:
        said = subprocess.run(
            ["bash", "-c", f"source launch/slurm/job.sh; free_port {number}"],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return int(said)

    port = meeting_port(8000)
    assert port == free_port_from(20_000)
    with socket.create_server(("127.0.0.1", port)):
        following = meeting_port(8000 + 3 * 18_000)
        assert following == free_port_from(port + 1)
        with socket.create_server(("127.0.0.1", following)):
            assert meeting_port(8000) == free_port_from(following + 1)


def test_submitted_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", LAUNCH / "slurm" / "train.sbatch", "a", "b"],
        capture_output=True,
        text=True,
        env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)},
    )
    assert done.returncode == 2 and "from the repository's root" in done.stderr


def test_train_sh_runs_again_and_stops_when_asked(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """A worker that is signalled: the run goes on by itself. The script is signalled: it ends with 75."""
    script = [str(LAUNCH / "local" / "train.sh"), "configs/accelerate/multi_cpu.yaml"]
    options = dict(max_steps=60, gradient_accumulation_steps=1, per_device_train_batch_size=2, save_steps=1)
    environ = environment(PYTHON=sys.executable, MAIN_PORT="0")
    config = write_config(inputs, tmp_path / "stopped", **options)
    metrics = tmp_path / "stopped" / "run" / "metrics.jsonl"

    def progress(beyond: int) -> int:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > beyond, 120)
        return len(metrics.read_text().splitlines())

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*script, str(config)], env=environ, cwd=REPOSITORY, stderr=log, stdout=log)
        progress(3)
        workers = _descendants(process.pid, f"minimind_dpo.train\0--config\0{config}")
        os.kill(workers[-1], signal.SIGUSR1)
        wait_until(lambda: "run again (1 of 10)" in (tmp_path / "log").read_text(), 60, (tmp_path / "log").read_text)
        progress(progress(0) + 3)
        process.terminate()
        assert process.wait(timeout=60) == 75, (tmp_path / "log").read_text()
    done = subprocess.run([*script, str(config)], env=environ, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = write_config(inputs, tmp_path / "whole", **options | {"save_steps": 0})
    assert forks.run(["--config", str(whole)], tmp_path / "whole", "multi_cpu") == [0, 0]
    assert same_bits(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")


def _descendants(parent: int, command: str) -> list[int]:
    """Processes below `parent` whose command line (words divided by NUL) contains `command`, but no launcher."""
    found, level = [], [parent]
    while level:
        level = [
            int(child)
            for pid in level
            for task in Path(f"/proc/{pid}/task").glob("*/children")
            for child in task.read_text().split()
        ]
        for pid in level:
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text()
            except FileNotFoundError:
                continue
            if command in words and "minimind_dpo.launch" not in words:
                found.append(pid)
    return found


def test_node_sh_on_two_machines(inputs: Inputs, tmp_path: Path) -> None:
    """Two machines' commands on this one; and what it says of a wrong environment."""
    config = write_config(inputs, tmp_path)
    script = [str(LAUNCH / "local" / "node.sh"), "configs/accelerate/multi_cpu.yaml", str(config)]
    environ = environment(
        PYTHON=sys.executable,
        NNODES="2",
        RANKS_PER_NODE="1",
        MAIN_ADDR="127.0.0.1",
        MAIN_PORT=str(20000 + os.getpid() % 10000),
        GLOO_SOCKET_IFNAME="lo",
    )
    wrong = subprocess.run(script, env=environ, cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 2 and "NODE_RANK" in wrong.stderr
    processes = []
    for rank in ("1", "0"):
        processes.append(
            subprocess.Popen(
                script, env=environ | {"NODE_RANK": rank}, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
            )
        )
        time.sleep(0.5)
    ends = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert (tmp_path / "run" / "summary.json").exists()
