"""A real SLURM cluster of two nodes on this machine (launch/local/slurm_cluster.sh), and jobs on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers_run import REPOSITORY, Inputs

SCRIPT = REPOSITORY / "launch" / "local" / "slurm_cluster.sh"
SBIN = "/usr/sbin:/sbin"

# In every process of a job. A node shares the machine's cores with the other one: ranks that took all of them would
# wait for each other's threads. And a test has time to meet a job in mid-run: its first start renames checkpoints
# slowly, later ones do not.
SITE = """
import os, time
os.sched_getaffinity = lambda pid: {0}
if "SLOW_CHECKPOINTS" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    def slow(real):
        def move(source, target, **options):
            if "step-" in os.path.basename(target):
                time.sleep(float(os.environ["SLOW_CHECKPOINTS"]))
            return real(source, target, **options)
        return move
    os.replace, os.rename = slow(os.replace), slow(os.rename)
"""


def why_no_cluster() -> str | None:
    """Why a cluster can't be started here; None if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a SLURM cluster on one machine needs root"
    missing = [
        program
        for program in ("slurmctld", "slurmd", "munged", "sbatch", "srun")
        if shutil.which(program, path=f"{os.environ['PATH']}:{SBIN}") is None
    ]
    return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge" if missing else None


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job."""

    state: str
    restarts: int
    exit_code: str


class Cluster:
    """Two nodes, and the environment in which jobs are submitted to them."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets' paths have at most 107 characters
        self._site = self.directory / "site"
        self._site.mkdir()
        (self._site / "sitecustomize.py").write_text(SITE)

    def environment(self, **extra: str) -> dict[str, str]:
        """Both nodes are this machine: rendezvous and gloo use the loopback."""
        paths = [str(Path(sys.executable).parent), os.environ["PATH"], SBIN]
        return (
            os.environ
            | {
                "SLURM_CONF": str(self.directory / "slurm.conf"),
                "PATH": ":".join(paths),
                "PYTHON": sys.executable,
                "PYTHONPATH": f"{self._site}:{REPOSITORY}",
                "MAIN_ADDR": "127.0.0.1",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "LOG_DIR": str(self.directory / "jobs"),
            }
            | extra
        )

    def control(self, verb: str, *words: str) -> None:
        """`slurm_cluster.sh VERB`."""
        done = subprocess.run([SCRIPT, verb, self.directory, *words], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr

    def close(self) -> None:
        """Stop everything and remove its files."""
        self.control("stop")
        shutil.rmtree(self.directory, ignore_errors=True)

    def call(self, *command: str, **extra: str) -> str:
        """Run a SLURM command in the repository's root and return what it prints."""
        done = subprocess.run(
            command, env=self.environment(**extra), capture_output=True, text=True, timeout=60, cwd=REPOSITORY
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, accelerate: str, config: Path, *options: str, script: str = "train_cpu", **extra: str) -> str:
        """Submit a job script on two nodes, which have no GPUs; its number."""
        without = [] if script == "train_cpu" else ["--gpus-per-node=0", "--cpus-per-task=1"]
        return self.call(
            "sbatch",
            "--parsable",
            "--nodes=2",
            f"--output={self.directory}/%x-%j.log",
            *without,
            *options,
            f"launch/slurm/{script}.sbatch",
            f"configs/accelerate/{accelerate}.yaml",
            str(config),
            RANKS_PER_NODE="1",
            **extra,
        ).strip()

    def job(self, number: str) -> Job:
        """The job as slurmctld sees it now."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        values = dict(word.split("=", 1) for word in words if "=" in word)
        return Job(values["JobState"], int(values["Restarts"]), values["ExitCode"])

    def wait_for(self, number: str, *states: str, timeout: float = 480) -> Job:
        """The job once it is in one of `states`."""
        wait_until(lambda: self.job(number).state in states, timeout, lambda: self.logs(number))
        return self.job(number)

    def logs(self, number: str) -> str:
        """Everything the job wrote: the batch script's log, then each node's."""
        files = [*self.directory.glob(f"*-{number}.log"), *sorted(self.directory.glob(f"jobs/*-{number}/node-*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in files)


def write_config(inputs: Inputs, directory: Path, **options: object) -> Path:
    """A training configuration of a run into `directory`/run."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = inputs.flags(directory / "run", **options)
    path = directory / "run.yaml"
    path.write_text("".join(f"{name[2:]}: {value}\n" for name, value in zip(flags[::2], flags[1::2], strict=True)))
    return path


def wait_until(condition: Callable[[], object], timeout: float, explain: Callable[[], str] = str) -> None:
    """Return once `condition` holds; fail with `explain` after `timeout` seconds."""
    deadline = time.time() + timeout
    while not condition():
        assert time.time() < deadline, f"not so after {timeout} s\n{explain()}"
        time.sleep(0.2)
