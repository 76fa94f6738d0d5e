"""Whether the toolkit is right on this machine's GPU, and how fast: one GPU, no network, under 8 minutes.

    python -m benchmarks.gpu_check --out DIR [--stages kernels speed ...] [--rehearse]

Each stage is a process of its own with a time limit; what it finds is in DIR/STAGE.json at once, what it prints in
DIR/STAGE.log. DIR/summary.json has all of it. `--rehearse` does the same on the CPU with tiny shapes, which shows that
the stages run, and nothing of a GPU. The exit code is 0 only if all that could be checked is right; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.notes import FAILED, RIGHT, SKIPPED, Notes, Place, verdict
from benchmarks.gpu_check.stages import SECONDS, STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where results go")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--work", metavar="SCRATCH", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the stages one after another; the exit code."""
    options = parse(argv)
    if options.work is not None:
        work(options.stages[0], options)
        return 0
    if not options.rehearse and not has_gpu():
        print("no GPU that torch can use is here (torch.cuda.is_available() is false); --rehearse runs on the CPU")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline, results = time.monotonic() + SECONDS * slower(options), {}
    for stage in STAGES:
        if stage.name in options.stages:
            results[stage.name] = attempt(stage, options, deadline - time.monotonic())
            show(stage, results[stage.name])
    (options.out / "summary.json").write_text(json.dumps(results, indent=1), "utf-8")
    bad = [name for name, result in results.items() if result["verdict"] not in (RIGHT, SKIPPED)]
    print(f"\nwrong: {', '.join(bad)}" if bad else "\nall that could be checked is right", f"({options.out})")
    return 1 if bad else 0


def slower(options: argparse.Namespace) -> int:
    """By how much limits are wider than on a GPU."""
    return 10 if options.rehearse else 1


def has_gpu() -> bool:
    """Whether torch has a CUDA device, asked in another process: this one never holds memory of it."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask]).returncode == 0


def first_gpu() -> str:
    """The first of the GPUs that the user lets be seen: with several TRL's trainer would divide batches among them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def attempt(stage: Stage, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a stage in a process of its own, within its time and what is `left` of all; what came of it."""
    file, began = options.out / f"{stage.name}.json", time.monotonic()
    missing = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    if missing:
        found: dict[str, Any] = {"verdict": SKIPPED, "said": f"not installed: {', '.join(missing)}"}
    elif left < 5:
        found = {"verdict": FAILED, "said": "no time was left"}
    else:
        Notes(file)
        ended = started(stage, options, min(stage.seconds * slower(options), left))
        found = json.loads(file.read_text("utf-8"))
        found |= {"verdict": verdict(found, ended is None), "said": ended}
    found = {"stage": stage.name, "asks": stage.asks, "seconds": round(time.monotonic() - began, 1)} | found
    found = {"checks": [], "figures": {}, "skipped": []} | found
    file.write_text(json.dumps(found, indent=1), "utf-8")
    return found


def started(stage: Stage, options: argparse.Namespace, seconds: float) -> str | None:
    """Start a stage's process and wait for it, no longer than so many seconds; how it failed, if it did."""
    log = options.out / f"{stage.name}.log"
    words = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(options.out.resolve()), "--stages", stage.name]
    with tempfile.TemporaryDirectory() as scratch, open(log, "w", encoding="utf-8") as output:
        words += ["--work", scratch, *(["--rehearse"] if options.rehearse else [])]
        environment = os.environ | SURROUNDINGS | {"MINIMIND_DPO_CACHE": str(Path(scratch) / "cache")}
        environment |= ON_CPU if options.rehearse else {"CUDA_VISIBLE_DEVICES": first_gpu()}
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"took more than {seconds:.0f} s"
        finally:  # with all that it has started
            with_children(process)
    tail = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
    return None if code == 0 else f"ended with {code}: {''.join(tail)}"


def with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill a process's group: a stage that was killed leaves what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def work(name: str, options: argparse.Namespace) -> None:
    """A stage's own process."""
    device = "cpu" if options.rehearse else "cuda"
    place = Place(device, options.rehearse, options.work, options.out)
    importlib.import_module(f"benchmarks.gpu_check.{name}").run(Notes(options.out / f"{name}.json"), place)


def show(stage: Stage, result: dict[str, Any]) -> None:
    """Print what came of a stage."""
    print(f"{result['verdict']:<8}{stage.name}: {stage.asks}? ({result['seconds']:.0f} s)", flush=True)
    wrong = [f"{check['what']}: {check['said']}" for check in result["checks"] if not check["right"]]
    skipped = [f"{skip['what']} skipped: {skip['why']}" for skip in result["skipped"]]
    said = [result["said"]] if result["said"] else []
    figures = [f"{name}: {json.dumps(value)}" for name, value in result["figures"].items()]
    for line in (*said, *wrong, *skipped, *figures):
        print(f"          {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
