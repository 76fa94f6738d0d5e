"""Damage to whatever a run keeps on disk: the run notices it or it has no effect on the final weights' bits.

A run is found as a kill after step 4 of 6 leaves it: two checkpoints, metrics, settings, both caches. One of its files
is harmed, the same command is given again, and the sha256 of its final weights is compared with the undisturbed run's.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers_run import Inputs, train_here

from minimind_dpo.errors import UserError
from minimind_dpo.models.loading import load_model

FLIPS, OTHERS = 200, 40  # the whole; a few of each are among the default tests
FINISHED = ("model", "summary.json", "report.html")  # what a killed run has not yet
OPTIONS = {"save_steps": 2, "save_total_limit": 0, "num_train_epochs": 2, "reference": "cache"}


@dataclass(frozen=True)
class Left:
    """What a killed run left in `directory` (`run` and `cache`), and the sha256 that its weights end with."""

    inputs: Inputs
    directory: Path
    sha256: str

    def files(self, directory: Path) -> list[Path]:
        """Everything kept on disk, in an order that depends on no file system."""
        return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def left(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    directory = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINIMIND_DPO_CACHE", str(directory / "cache"))
        assert train_here(inputs.flags(directory / "run", **OPTIONS)) == 0
    ends_with = sha256(directory / "run")
    for name in FINISHED:
        path = directory / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(directory / "run" / "checkpoints" / "step-000006")
    yield Left(inputs, directory, ends_with)


def harm(path: Path, kind: str, rng: random.Random) -> None:
    """Damage a file as disks, file systems and people do."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    elif kind == "cut":
        content = content[:place]
    elif kind == "other":
        content = bytearray(rng.randbytes(len(content)))
    elif kind == "json":
        content = bytearray(rng.choice([b"[]", b"{}", b"null", b'{"files": {}}', b'[{"checksum": null}]']))
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content)


def tried(left: Left, place: Path, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Harm one file of a copy and run: "same bits", or the mistake that the command ends with."""
    rng = random.Random(f"{kind} {seed}")
    shutil.copytree(left.directory, place)
    harmed = rng.choice(left.files(place))
    harm(harmed, kind, rng)
    monkeypatch.setenv("MINIMIND_DPO_CACHE", str(place / "cache"))
    try:
        assert train_here(left.inputs.flags(place / "run", **OPTIONS)) == 0
    except UserError as error:
        return f"{harmed.relative_to(place)}: {error}"
    assert sha256(place / "run") == left.sha256, f"{kind} {seed}: silently other weights, from {harmed}"
    shutil.rmtree(place)
    return "same bits"


def cases(kind: str, number: int, quick: int) -> list[object]:
    """Tries of one kind; all but the first `quick` are run by `make faults` alone."""
    return [
        pytest.param(kind, seed, marks=[pytest.mark.faults] if seed >= quick else [], id=f"{kind}-{seed}")
        for seed in range(number)
    ]


KINDS = ("zeros", "cut", "other", "json", "gone")


@pytest.mark.parametrize(
    ("kind", "seed"), [*cases("flip", FLIPS, 6), *(case for kind in KINDS for case in cases(kind, OTHERS, 1))]
)
def test_damage_is_noticed_and_made_good(
    left: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    """Damage to any file on disk is made good: all can be made again or has an older version, the bits are the same."""
    assert tried(left, tmp_path / "copy", kind, seed, monkeypatch) == "same bits"


def test_every_file_of_a_saved_model_is_compared(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit in a saved model's weights is refused, in any other file told."""
    assert train_here(inputs.flags(tmp_path / "run", max_steps=1)) == 0
    model, rng = tmp_path / "run" / "model", random.Random(0)
    for path in sorted(model.iterdir()):
        whole = path.read_bytes()
        for _ in range(5):
            harm(path, "flip", rng)
            caplog.clear()
            try:
                load_model(tmp_path / "run")
            except UserError as error:
                assert path.name == "checksums.json" or "damaged" in str(error) or "can't load" in str(error)
            else:
                blank = path.name == "checksums.json"  # one blank for another
                assert blank or f"{path.name}: not what was written" in caplog.text
            path.write_bytes(whole)
    assert load_model(tmp_path / "run") is not None
