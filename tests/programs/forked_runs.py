"""Runs of a command in forked processes, so that none pays for imports; one job a line of standard input.

A job: `program`, a module with a `main` or a file of programs/, and its `flags`; `ranks` and `environment` of each;
`log`, a file for what they print; `pairs`, where each rank writes which pairs every optimizer step took; `bomb`, if
something shall happen amid the run: {"module", "name", "nth", "when": "before" or "after", "rank", "signal", "fills"}
sends a signal to that rank's process at the nth call of a function, or leaves no room on the disk `fills`; `forgets`, a
value that the engine leaves out of checkpoints. Answered is a line with the ranks' process ids, each the leader of a
process group, and at the end one with their exit codes. As under a launcher, ranks are killed once another one failed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import deepspeed  # noqa: F401  # a fork has it then
import torch
from helpers_disk import fill

import minimind_dpo.engine.cpu as cpu
import minimind_dpo.training.loop as loop
import minimind_dpo.training.run_directory
import minimind_dpo.training.session
import minimind_dpo.training.setup  # noqa: F401
from minimind_dpo.ending import Ending
from minimind_dpo.engine.plain import Plain

IMPORTED = Path(tempfile.mkdtemp()) / "modules"


def set_bomb(bomb: dict[str, Any]) -> None:
    """Make the nth call of a function send this process a signal, or fill a disk."""
    strike = partial(fill, Path(bomb["fills"])) if bomb["fills"] else partial(os.kill, os.getpid(), bomb["signal"])
    module = importlib.import_module(bomb["module"])
    honest, calls = getattr(module, bomb["name"]), 0

    def exploding(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == bomb["nth"] and bomb["when"] == "before":
            strike()
        result = honest(*args, **kwargs)
        if calls == bomb["nth"] and bomb["when"] == "after":
            strike()
        return result

    setattr(module, bomb["name"], exploding)


def record_pairs(path: str) -> None:
    """Write which pairs each optimizer step takes, in order."""
    honest = loop.optimizer_step

    def recording(training: Any, loaded: Any, *rest: Any) -> Any:
        taken = [batch.pairs.tolist() if hasattr(batch.pairs, "tolist") else list(batch.pairs)
                 for batch in loaded.plan.micro_batches]  # fmt: skip
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([loaded.plan.step, taken]) + "\n")
        return honest(training, loaded, *rest)

    loop.optimizer_step = recording


def forget(name: str) -> None:
    """Leave a value of the engine out of every checkpoint."""
    honest = Plain.scalars
    Plain.scalars = lambda engine: {key: value for key, value in honest(engine).items() if key != name}


def run(program: str, flags: list[str]) -> int:
    """The exit code that the program comes to."""
    if not program.endswith(".py"):
        with Ending() as ending:
            ending.code = importlib.import_module(program).main(flags)
        return ending.code
    sys.argv = [program, *flags]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def work(job: dict[str, Any], rank: int) -> NoReturn:
    """One rank of a run."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["environment"])
    if "MASTER_ADDR" in job["environment"]:  # as under a launcher, be it with a single rank
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
        os.environ.update(LOCAL_WORLD_SIZE=str(job["ranks"]))
    torch.set_num_threads(1)
    if "LOCAL_WORLD_SIZE" not in job["environment"]:  # a launched run takes all cores where its user named no number
        cpu._threads = lambda processes: 1  # threads of models so small only wait for each other
    code = 1
    try:
        record_pairs(f"{job['pairs']}-{rank}")
        if job.get("bomb") and job["bomb"]["rank"] == rank:
            set_bomb(job["bomb"])
        if job["forgets"]:
            forget(job["forgets"])
        code = run(job["program"], job["flags"])
        if rank == 0:
            IMPORTED.write_text("\n".join(sys.modules), "utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_as_well() -> None:
    """Import what a run had to import, so that the next ones have it."""
    if IMPORTED.exists():
        for name in IMPORTED.read_text("utf-8").splitlines():
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)


def run_job(job: dict[str, Any]) -> list[int]:
    """Fork the ranks and wait for all; their exit codes, negative for a signal."""
    ranks: dict[int, int] = {}
    for rank in range(job["ranks"]):
        if (pid := os.fork()) == 0:
            work(job, rank)
        os.setpgid(pid, pid)
        ranks[pid] = rank
    answer(json.dumps(list(ranks)))
    codes = [0] * job["ranks"]
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        codes[rank] = os.waitstatus_to_exitcode(status)
        if codes[rank] not in (0, 75):
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return codes


answer = partial(print, file=os.fdopen(os.dup(1), "w"), flush=True)
for line in sys.stdin:
    answer(json.dumps(run_job(json.loads(line))))
    import_as_well()
