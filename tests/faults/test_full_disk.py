"""A disk that fills up amid each kind of write: one clear message, exit code 1, nothing that is taken for whole later.

The disk is a small one in memory, so the errors are the kernel's own. Once there is room again the same command goes on
to the undisturbed run's bits.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import runs
from faults.runs import Alone, goes_on, group, oracle
from helpers_disk import BALLAST, fill, make_room, small_disk
from helpers_forks import Bomb, Forks
from helpers_run import Inputs

from minimind_dpo.checkpoints.directory import checkpoint_problem
from minimind_dpo.cli import main as cli
from minimind_dpo.demo.run import ASSETS

OPTIONS: dict[str, Any] = {"num_train_epochs": 2, "save_steps": 2, "eval_steps": 1, "reference": "cache"}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "lora": {"lora_r": 2}, "skipping": {"on_nonfinite": "skip"}}
PAGES = 2 * 4096  # begun and not ended: room for the first of what is written


@dataclass(frozen=True)
class Write:
    """A write that begins in the nth call of a function of the package, on a disk with `left` bytes free by then.

    `place` is the part of its path that the message names, `of` the kind of run.
    """

    place: str
    module: str
    name: str
    nth: int = 1
    left: int = 0
    of: str = "plain"

    def __str__(self) -> str:
        return f"{self.place}: {self.name} {self.nth} {self.left}"


WRITES = [
    Write("cache", "data.cache", "TableWriter"),
    Write("cache", "data.cache", "TableWriter", left=PAGES),
    Write("cache/tokens", "data.cache", "sealed"),
    Write("cache/reference", "reference.stored", "_unique"),
    Write("cache/reference", "reference.stored", "_unique", nth=2),
    Write("cache/reference", "reference.cache", "sealed"),
    Write("run", "training.run_directory", "_lock"),
    Write("run", "training.run_directory", "save_config"),
    Write("run/metrics.jsonl", "training.metrics", "_without_nan"),
    Write("run/nonfinite", "training.numbers", "_described", of="skipping"),
    Write("run/checkpoints", "training.loop", "describe_model"),
    Write("run/checkpoints", "checkpoints.directory", "write_state"),
    Write("run/checkpoints", "checkpoints.directory", "write_fragments"),
    Write("run/checkpoints", "checkpoints.directory", "write_fragments", nth=2, left=PAGES),
    Write("run/checkpoints", "checkpoints.directory", "_entries", nth=2),
    Write("run", "training.run_directory", "save_adapter", left=PAGES, of="lora"),
    Write("run", "training.run_directory", "save_model"),
    Write("run", "training.run_directory", "save_model", left=PAGES),
    Write("run", "training.run_directory", "make_portable"),
    Write("run", "training.run_directory", "seal_model"),
    Write("run", "training.run_directory", "_summary"),
    Write("run", "training.run_directory", "write_report"),
]
QUICK = ("sealed 1 0", "_unique 1 0", "_without_nan", "write_fragments 2", "save_model 1 8192")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("disk")) as place:
        yield place


@pytest.fixture(autouse=True)
def emptied(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(disk / "cache"))
    yield
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def heavy(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data with a pair whose weight makes its step's loss overflow."""
    rows = inputs.train_data.read_text("utf-8").splitlines()
    rows[2] = rows[2][:-1] + ', "weight": 3e38}'
    path = tmp_path_factory.mktemp("heavy") / "train.jsonl"
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, str]:
    """The oracle of a run of each kind left alone, filled when it is asked for."""
    return {}


def flags_of(inputs: Inputs, heavy: Path, directory: Path, kind: str) -> list[str]:
    options = OPTIONS | {"eval_data": inputs.eval_data} | KINDS[kind]
    return inputs.flags(directory / "run", **options | ({"train_data": heavy} if kind == "skipping" else {}))


def left_alone(known: dict[str, str], inputs: Inputs, heavy: Path, directory: Path, kind: str) -> str:
    if kind not in known:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("MINIMIND_DPO_CACHE", str(directory / "cache"))
            assert cli(["train", *flags_of(inputs, heavy, directory, kind)]) == 0
        known[kind] = oracle(directory)
    return known[kind]


def fill_amid(patched: pytest.MonkeyPatch, disk: Path, write: Write) -> None:
    """Fill the disk just before the write begins."""
    module = importlib.import_module(f"minimind_dpo.{write.module}")
    honest, calls = getattr(module, write.name), 0

    def filling(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == write.nth:
            fill(disk, write.left)
        return honest(*args, **kwargs)

    patched.setattr(module, write.name, filling)


def fails_with_one_message(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli(words) == 1
    seen = capsys.readouterr().err
    told = [line for line in seen.splitlines() if "minimind-dpo:" in line]
    assert len(told) == 1 and "Traceback" not in seen, seen
    assert f"error: cannot write to {place}" in told[0] and os.strerror(errno.ENOSPC) in told[0], seen


def is_quick(write: Write) -> bool:
    return any(name in str(write) for name in QUICK)


@pytest.mark.parametrize(
    "write",
    [pytest.param(write, id=str(write), marks=[] if is_quick(write) else pytest.mark.faults) for write in WRITES],
)
def test_a_full_disk_ends_a_run_that_goes_on_later(
    inputs: Inputs,
    heavy: Path,
    disk: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write: Write,
) -> None:
    """A full disk in each write of a run: one message, code 1, and with room again the undisturbed bits."""
    expected = left_alone(undisturbed, inputs, heavy, tmp_path, write.of)
    words = ["train", *flags_of(inputs, heavy, disk, write.of)]
    with monkeypatch.context() as patched:
        fill_amid(patched, disk, write)
        fails_with_one_message(words, disk / write.place, capsys)
    assert (disk / BALLAST).exists(), "the write never came"
    make_room(disk)
    assert [path for path in disk.rglob("*") if path.name.endswith(".partial")] == []
    assert {checkpoint_problem(path) for path in (disk / "run" / "checkpoints").glob("step-*")} <= {None}
    assert cli(words) == 0
    assert oracle(disk) == expected


@pytest.mark.faults
@pytest.mark.parametrize("left", [0, PAGES])
@pytest.mark.parametrize(
    ("source", "format"), [("run", "hf"), ("run/checkpoints/step-000006", "hf"), ("demo", "minimind")]
)
def test_a_full_disk_leaves_no_half_export(
    inputs: Inputs,
    heavy: Path,
    disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    format: str,
    left: int,
) -> None:
    """A full disk in an export: one message, code 1, nothing is left; with room again it is written."""
    if source == "demo":
        (model,) = ASSETS.glob("*.pth")
    else:
        model = tmp_path / source
        assert cli(["train", *flags_of(inputs, heavy, tmp_path, "plain")]) == 0
    output = disk / "deep" / ("dpo.pth" if format == "minimind" else "model")
    words = ["export", "--model", str(model), "--format", format, "--output", str(output)]
    fill(disk, left)
    fails_with_one_message(words, output, capsys)
    make_room(disk)
    assert list((disk / "deep").rglob("*")) == []
    assert cli(words) == 0
    assert output.exists()


@pytest.mark.faults
def test_a_full_disk_leaves_no_half_ledger(inputs: Inputs, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk in the ledger of data check: one message, code 1, nothing is left."""
    (disk / "data.jsonl").write_text("{broken\n" * 1000)
    words = ["data", "check", "--data", str(disk / "data.jsonl"), "--tokenizer", str(inputs.model)]
    fill(disk, PAGES)
    fails_with_one_message([*words, "--ledger", str(disk / "ledger.jsonl")], disk / "ledger.jsonl", capsys)
    make_room(disk)
    assert [path.name for path in disk.iterdir()] == ["data.jsonl"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=group(engine)) for engine in ("multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu")]
)
@pytest.mark.parametrize(
    ("rank", "module", "name"),
    [
        (0, "checkpoints.directory", "write_fragments"),
        (1, "checkpoints.directory", "write_fragments"),
        (0, "reference.stored", "_unique"),
    ],
)
def test_a_disk_is_full_for_one_rank(
    inputs: Inputs,
    disk: Path,
    forks: Forks,
    alone: Alone,
    tmp_path: Path,
    engine: str,
    rank: int,
    module: str,
    name: str,
) -> None:
    """A full disk that one of two ranks meets: one message, and with room again the undisturbed bits."""
    for part in ("run", "cache"):
        (disk / part).mkdir()
        (tmp_path / part).symlink_to(disk / part)
    bomb = Bomb(module, name, 1, "before", rank, fills=str(disk))
    codes = forks.run(runs.flags_of(inputs, tmp_path), tmp_path, engine, bomb)
    log = (tmp_path / "log").read_text("utf-8")
    assert 1 in codes and log.count("cannot write to") == 1 and os.strerror(errno.ENOSPC) in log, log
    make_room(disk)
    assert goes_on(forks, inputs, tmp_path, engine) == alone(engine)
