"""Checkpoints: which names are theirs, which of them are whole, and what a resume refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_run import Inputs, lines, same_bits, train_here

from minimind_dpo.checkpoints import directory as checkpoints
from minimind_dpo.checkpoints.directory import checkpoint_problem, find_checkpoint
from minimind_dpo.errors import TrainingError, UserError
from minimind_dpo.models.loading import load_model
from minimind_dpo.reference.filling import CacheFiller
from minimind_dpo.training import loop


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps with a checkpoint at each."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train_here(inputs.flags(output_dir, save_steps=1, save_total_limit=0)) == 0
    return output_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same run, to be damaged; of its checkpoints the first two."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    return tmp_path / "run"


FOREIGN = ("step-best", "step-backup", "step-000010.bak", "step-", "step-1e3", "step-\u0663", "Step-000009", "x")


def test_other_names_are_nobody_s(inputs: Inputs, tmp_path: Path) -> None:
    """They lie there when a run saves and when it resumes: it goes on, and they stay."""
    directory = tmp_path / "run" / "checkpoints"
    for name in FOREIGN:
        (directory / name).mkdir(parents=True)
        (directory / name / "kept").touch()
    (directory / "step-000099").write_text("a file")
    flags = inputs.flags(tmp_path / "run", save_steps=1, save_total_limit=1)
    assert train_here(flags) == 0
    assert train_here([*flags, "--max_steps", "4"]) == 0
    assert {path.name for path in directory.iterdir()} == {*FOREIGN, "step-000099", "step-000004"}
    assert all((directory / name / "kept").exists() for name in FOREIGN)


MANIFESTS = [
    "", "[]", "3", "null", "{}", '{"files": []}', '{"files": ["a"]}', '{"files": {}}', '{"files": {"x": null}}',
    '{"files": {"x": {"size": 1}}}', '{"files": null}', '{"files": {"x": 3}}', "[" * 100_000, "\ufeff{", "\udc00",
]  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS)
def test_a_manifest_of_another_shape_makes_the_older_one_taken(copy: Path, text: str) -> None:
    manifest = copy / "checkpoints" / "step-000002" / "manifest.json"
    manifest.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert checkpoint_problem(manifest.parent) == "manifest.json is damaged"
    assert find_checkpoint(copy / "checkpoints", "auto") == copy / "checkpoints" / "step-000001"


def edited(entry: Any) -> Any:
    def edit(files: dict[str, Any]) -> None:
        files["config.json"] = entry(files["config.json"])

    return edit


EDITS: dict[str, Any] = {
    "no state": lambda files: files.pop("trainer_state.json"),
    "no scalars": lambda files: files.pop("optimizer.json"),
    "no configuration": lambda files: files.pop("config.json"),
    "no tensors": lambda files: files.pop("state-00000-00000.safetensors"),
    "size as text": edited(lambda entry: entry | {"size": str(entry["size"])}),
    "size as truth": edited(lambda entry: entry | {"size": True}),
    "no sha256": edited(lambda entry: {"size": entry["size"]}),
    "sha256 a list": edited(lambda entry: entry | {"sha256": [entry["sha256"]]}),
    "a file outside": lambda files: files.update({"../x": {"size": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_must_name_what_a_checkpoint_has(copy: Path, edit: str) -> None:
    manifest = copy / "checkpoints" / "step-000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    EDITS[edit](content["files"])
    manifest.write_text(json.dumps(content))
    assert checkpoint_problem(manifest.parent) == "manifest.json is damaged"


def test_tensors_that_nobody_listed_are_not_read(copy: Path) -> None:
    checkpoint = copy / "checkpoints" / "step-000002"
    shutil.copy(checkpoint / "state-00000-00000.safetensors", checkpoint / "state-00007-00000.safetensors")
    assert checkpoint_problem(checkpoint) == "state-00007-00000.safetensors is not in manifest.json"
    with pytest.raises(UserError, match="is not in manifest.json"):
        load_model(checkpoint)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(copy: Path) -> None:
    checkpoint, rng = copy / "checkpoints" / "step-000002", random.Random(0)
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for _ in range(10):
            content, place = bytearray(whole), rng.randrange(len(whole))
            if whole[place : place + 1].isspace() and path.name == "manifest.json":
                continue  # one blank for another
            content[place] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            assert checkpoint_problem(checkpoint) is not None, (path, place)
        path.write_bytes(whole)
    assert checkpoint_problem(checkpoint) is None


def test_a_checkpoint_beyond_the_end_is_refused(inputs: Inputs, copy: Path) -> None:
    before = (copy / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="max_steps: .*step-000002 has gone 2 steps, the run would have 1"):
        train_here(inputs.flags(copy, max_steps=1))
    assert (copy / "model" / "model.safetensors").read_bytes() == before


def test_other_data_are_refused_before_anything_is_scored(
    inputs: Inputs, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheFiller, "fill", None)
    with pytest.raises(UserError, match="train_data_digest: was"):
        train_here(inputs.flags(copy, train_data=inputs.eval_data, reference="cache", num_train_epochs=9))


def test_a_full_disk_leaves_no_half_checkpoint(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint finds no room: one message, the first is whole; with room the run ends as ever."""
    flags = inputs.flags(tmp_path / "run", save_steps=1)
    written = checkpoints.write_fragments

    def full(directory: Path, *args: Any) -> list[Path]:
        if "step-000002" in directory.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "state-00000-00000.safetensors"))
        return written(directory, *args)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_fragments", full)
        with pytest.raises(TrainingError, match="cannot write to .*step-000002.*No space left.*output_dir"):
            train_here(flags)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert train_here(flags) == 0
    assert train_here(inputs.flags(tmp_path / "whole")) == 0
    assert same_bits(tmp_path / "run", tmp_path / "whole")


def test_others_may_read_a_run(finished: Path) -> None:
    """Every file has the rights that its directory's maker gives any file."""
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert any(path.name == "model.safetensors" for path in files)


def test_planted_links_are_not_written_through(inputs: Inputs, tmp_path: Path) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    (run / "checkpoints").mkdir(parents=True)
    for name in ("metrics.tmp", "metrics.jsonl", "config.yaml", "summary.json", "report.html"):
        (run / name).symlink_to(victim / "kept")
    for name in (".step-000001.partial", ".step-000002.partial", ".step-000003.partial"):
        (run / "checkpoints" / name).symlink_to(victim)
    assert train_here(inputs.flags(run, save_steps=1, save_total_limit=0, resume="auto")) == 0
    assert [path.name for path in victim.iterdir()] == ["kept"] and (victim / "kept").read_text() == "kept"
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(victim / "kept")
    with pytest.raises(UserError, match="output_dir: cannot write to .*lock"):
        train_here(inputs.flags(run))
    assert (victim / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "make"),
    [("", "file"), ("checkpoints", "file"), ("model", "file"), ("metrics.jsonl", "dir"), ("summary.json", "dir")],
)
def test_a_name_that_is_taken_is_told_at_the_start(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: str
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    if make == "file":
        path.touch()
    else:
        path.mkdir()
    monkeypatch.setattr(loop, "train", None)
    with pytest.raises(UserError, match=f"output_dir: .*{path}"):
        train_here(inputs.flags(tmp_path / "run"))


def resumed(inputs: Inputs, run: Path, **options: Any) -> list[Any]:
    """The lines of a run that goes on from step 2, without its clock."""
    assert train_here(inputs.flags(run, save_steps=1, save_total_limit=0, **options)) == 0
    return [line["step"] for line in lines(run)]


def test_missing_lines_are_told(inputs: Inputs, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = copy / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[1:]))
    assert resumed(inputs, copy) == [2, 3]
    told = [record.getMessage() for record in caplog.records if "not those that were written" in record.getMessage()]
    assert len(told) == 1 and "up to step 2" in told[0] and "1 there, 2 written" in told[0]


def test_whole_metrics_are_not_spoken_of(inputs: Inputs, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resumed(inputs, copy) == [1, 2, 3]
    assert "metrics.jsonl" not in caplog.text


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b"{}", b'{"step": "1"}', b"\xff\xfe", b"[" * 100_000, b""])
def test_lines_that_are_no_metrics_are_told(
    inputs: Inputs, copy: Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    metrics = copy / "metrics.jsonl"
    first, *others = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([first, line + b"\n", *others]))
    assert resumed(inputs, copy) == [1, 2, 3]
    assert caplog.text.count("left out, as no lines of metrics: 2") == 1
