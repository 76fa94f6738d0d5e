"""Real SLURM: two nodes on this machine run the job scripts (docs/slurm.md)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_run import REPOSITORY, Inputs, same_bits, train_lines
from helpers_slurm import Cluster, wait_until, why_no_cluster, write_config

pytestmark = [
    pytest.mark.skipif(why_no_cluster() is not None, reason=str(why_no_cluster())),
    pytest.mark.xdist_group("slurm"),  # one cluster a machine
]
STEPS = 32
ENGINES = ["ds_zero2_cpu", "ds_zero3_cpu"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.control("start")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a 2-node job that nobody disturbed, by accelerate configuration; made once."""
    made: dict[str, Path] = {}

    def run(accelerate: str) -> Path:
        if not (REPOSITORY / f"configs/accelerate/{accelerate}.yaml").is_file():
            pytest.skip(f"configs/accelerate/{accelerate}.yaml is not there")
        if accelerate not in made:
            directory = tmp_path_factory.mktemp(accelerate)
            script = "train" if accelerate == "ds_zero3_cpu" else "train_cpu"
            number = cluster.submit(accelerate, config(inputs, directory), script=script)
            job = cluster.wait_for(number, "COMPLETED", "FAILED")
            # somebody else may take the port between its choice and its use: then the job is queued again by itself
            undisturbed = job.restarts == 0 or "another process is utilizing it" in cluster.logs(number)
            assert job.state == "COMPLETED" and undisturbed, cluster.logs(number)
            made[accelerate] = directory / "run"
        return made[accelerate]

    return run


def config(inputs: Inputs, directory: Path, **options: object) -> Path:
    """The training configuration of a run of `STEPS` steps into `directory`/run."""
    return write_config(
        inputs,
        directory,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        **options,
    )


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def wait_for_checkpoints(cluster: Cluster, number: str, run: Path, count: int = 2) -> None:
    wait_until(lambda: len(checkpoints(run)) >= count, 240, lambda: cluster.logs(number))


@pytest.mark.parametrize("accelerate", ENGINES)
def test_two_nodes_train(undisturbed: Callable[[str], Path], accelerate: str) -> None:
    lines = train_lines(undisturbed(accelerate))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_before_the_time_limit_the_job_saves_and_queues_itself(
    cluster: Cluster, inputs: Inputs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """A limit of 2 minutes, a signal a minute before (SLURM is up to a minute early), 2.2 s a step until then."""
    whole = undisturbed("ds_zero2_cpu")
    number = cluster.submit(
        "ds_zero2_cpu", config(inputs, tmp_path, save_steps=1), "--time=2", "--signal=USR1@60", SLOW_CHECKPOINTS="2.2"
    )
    job = cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT")
    assert job.state == "COMPLETED" and 1 <= job.restarts <= 3, cluster.logs(number)
    assert "stopped early with a checkpoint; queued again" in cluster.logs(number)
    assert same_bits(tmp_path / "run", whole)
    assert [line["loss"] for line in train_lines(tmp_path / "run")] == [line["loss"] for line in train_lines(whole)]


def test_a_signalled_job_saves_and_queues_itself(
    cluster: Cluster, inputs: Inputs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same by hand, under ZeRO-3, with the script for short pieces."""
    whole = undisturbed("ds_zero3_cpu")
    number = cluster.submit(
        "ds_zero3_cpu", config(inputs, tmp_path, save_steps=1), script="requeue", SLOW_CHECKPOINTS="0.5"
    )
    wait_for_checkpoints(cluster, number, tmp_path / "run")
    cluster.call("scancel", "--signal=USR1", number)
    job = cluster.wait_for(number, "COMPLETED", "FAILED")
    assert job.state == "COMPLETED" and job.restarts == 1, cluster.logs(number)
    assert same_bits(tmp_path / "run", whole)


def test_a_cancelled_job_saves_and_stays_cancelled(
    cluster: Cluster, inputs: Inputs, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """`scancel` is no preemption. The same command submitted again continues."""
    whole, path = undisturbed("ds_zero2_cpu"), config(inputs, tmp_path, save_steps=8)
    number = cluster.submit("ds_zero2_cpu", path, SLOW_CHECKPOINTS="2")
    wait_for_checkpoints(cluster, number, tmp_path / "run", 1)
    before = checkpoints(tmp_path / "run")
    cluster.call("scancel", number)
    wait_until(lambda: not cluster.call("squeue", "--noheader"), 60)
    assert cluster.job(number).state == "CANCELLED" and cluster.job(number).restarts == 0
    assert checkpoints(tmp_path / "run") > before, cluster.logs(number)
    again = cluster.submit("ds_zero2_cpu", path)
    assert cluster.wait_for(again, "COMPLETED", "FAILED").state == "COMPLETED", cluster.logs(again)
    assert same_bits(tmp_path / "run", whole)


def test_a_node_dies(cluster: Cluster, inputs: Inputs, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    """SIGKILL of a node's slurmd and of all that ran on it; the node comes back once SLURM has noticed."""
    whole = undisturbed("ds_zero2_cpu")
    number = cluster.submit("ds_zero2_cpu", config(inputs, tmp_path, save_steps=4), SLOW_CHECKPOINTS="2")
    wait_for_checkpoints(cluster, number, tmp_path / "run")
    cluster.control("kill-node", "node2")
    try:
        wait_until(lambda: cluster.job(number).restarts == 1, 60, lambda: cluster.logs(number))
    finally:
        cluster.control("start")
    job = cluster.wait_for(number, "COMPLETED", "FAILED")
    assert job.state == "COMPLETED" and job.restarts == 1, cluster.logs(number)
    assert same_bits(tmp_path / "run", whole)


def test_a_failed_job_stays_failed(cluster: Cluster, inputs: Inputs, tmp_path: Path) -> None:
    number = cluster.submit("ds_zero2_cpu", config(inputs, tmp_path, train_data=tmp_path / "missing.jsonl"))
    job = cluster.wait_for(number, "COMPLETED", "FAILED", "PENDING")
    assert job.state in ("FAILED", "PENDING")
    job = cluster.wait_for(number, "FAILED")
    time.sleep(3)  # a requeue would show by now
    assert cluster.job(number) == job and job.restarts == 0 and job.exit_code == "2:0", cluster.logs(number)
    said = cluster.logs(number)
    batch, _, nodes = said.partition("== node-0.log")
    message = re.compile(r"minimind-dpo: (rank \d+: )?error: .*missing\.jsonl")
    assert message.search(batch) and message.search(nodes.partition("== node-1.log")[0]), said
    assert "failed; not queued again" in batch and "Traceback" not in batch, said
