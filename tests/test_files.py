"""Files that are whole or absent, whatever happens while they are written; what a name can mean."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from minimind_dpo.config.names import is_raw_weights, looks_local
from minimind_dpo.files import aside, discard, make_anew, put_in_place, replacing, sweep, sync_all, write_text


class Cut(Exception):
    """Stands for whatever ends a writer."""


def write(new: Path, kind: str, text: str) -> None:
    """Content as a file, or as a directory of two files, one of them deeper."""
    if kind == "file":
        new.write_text(text)
    else:
        (new / "deep").mkdir(parents=True)
        for path in (new / "a", new / "deep" / "b"):
            path.write_text(text)


def read(path: Path, kind: str) -> set[str]:
    return {part.read_text() for part in ([path] if kind == "file" else [path / "a", path / "deep" / "b"])}


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("before", [False, True])
def test_content_is_replaced_and_nothing_else_is_left(tmp_path: Path, kind: str, before: bool) -> None:
    path = tmp_path / "deep" / "x"
    if before:
        path.parent.mkdir()
        write(path, kind, "old")
        if kind == "directory":
            (path / "only in the old one").touch()
    with replacing(path) as new:
        write(new, kind, "new")
    assert read(path, kind) == {"new"}
    assert list(path.parent.iterdir()) == [path]
    assert not (path / "only in the old one").exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("where", ["while writing", "fsync", "first rename", "last rename"])
def test_an_end_at_any_point_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    path = tmp_path / "x"
    write(path, kind, "old")

    def cut(*_: object) -> None:
        raise OSError("cut")

    real, renamings = os.replace, 0

    def cut_last(source: Path, target: Path) -> None:
        """Fail where the new content would take its name; a directory's old content has been renamed by then."""
        nonlocal renamings
        renamings += 1
        if renamings == (1 if kind == "file" else 2):
            cut()
        real(source, target)

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", cut)
    elif where != "while writing":
        monkeypatch.setattr(os, "replace", cut if where == "first rename" else cut_last)
    with pytest.raises((Cut, OSError)), replacing(path) as new:
        write(new, kind, "new")
        if where == "while writing":
            raise Cut
    assert read(path, kind) == {"old"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_bytes_are_on_the_disk_before_they_take_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        events.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    with replacing(tmp_path / "x") as new:
        write(new, kind, "new")
    written = [tmp_path / "x", *(tmp_path / "x").rglob("*")]
    *synced, renamed, last = events
    assert {("fsync", path.stat().st_ino) for path in written} == set(synced)
    assert renamed == ("rename", (tmp_path / "x").stat().st_ino)
    assert last == ("fsync", tmp_path.stat().st_ino)  # the name itself


def test_of_writers_at_the_same_time_one_is_whole(tmp_path: Path) -> None:
    path, together = tmp_path / "x", threading.Barrier(8)

    def work(letter: str) -> None:
        together.wait()
        for _ in range(20):
            write_text(path, letter * 100_000)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcdefgh"]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            text = path.read_text()
            seen.add((len(text), len(set(text))))
    assert seen == {(100_000, 1)}
    assert list(tmp_path.iterdir()) == [path]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    directory.mkdir()
    for name in (".x.partial", f".x.{os.getpid()}.partial", "x", "new", ".old.partial"):
        (directory / name).symlink_to(victim)
        os.utime(directory / name, (0, 0), follow_symlinks=False)
    with replacing(directory / "x") as new:
        new.mkdir()
        (new / "a").write_text("new")
    make_anew(directory / "new")
    sweep(directory)
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert sorted(path.name for path in directory.iterdir()) == ["new", "x"]
    assert not any(path.is_symlink() for path in directory.iterdir())


def test_a_file_does_not_take_a_directorys_place(tmp_path: Path) -> None:
    write(tmp_path / "x", "directory", "old")
    with pytest.raises(OSError):
        write_text(tmp_path / "x", "new")
    assert read(tmp_path / "x", "directory") == {"old"}


def test_others_may_read_what_its_maker_lets_them(tmp_path: Path) -> None:
    """The place that is written in is the writer's own; what comes out of it has the rights of any other file."""
    (tmp_path / "plain").touch()
    (tmp_path / "plain directory").mkdir()
    write_text(tmp_path / "x", "new")
    with replacing(tmp_path / "d") as new:
        assert new.parent.stat().st_mode & 0o077 == 0
        new.mkdir()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "d").stat().st_mode == (tmp_path / "plain directory").stat().st_mode


def test_what_is_aside_vanishes_unless_it_is_put_in_place(tmp_path: Path) -> None:
    with aside(tmp_path / "x") as new:
        write(new, "directory", "new")
    assert list(tmp_path.iterdir()) == []
    with aside(tmp_path / "x") as new:
        write(new, "directory", "new")
        sync_all(new)
        put_in_place(new, tmp_path / "y")
    assert list(tmp_path.iterdir()) == [tmp_path / "y"]


def test_a_discarded_directory_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "directory", "old")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed before anything in it is removed
    discard(tmp_path / "x")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.") and read(left / "x", "directory") == {"old"}


def test_what_killed_writers_left_goes_after_a_day(tmp_path: Path) -> None:
    for name, hours in ((".a.partial", 25), (".b.partial", 23), (".c.partial", 25), ("d.partial", 25), (".lock", 25)):
        write(tmp_path / name, "directory" if name == ".c.partial" else "file", "half")
        os.utime(tmp_path / name, (time.time() - hours * 3600,) * 2)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.partial", ".lock", "d.partial"]


def test_looks_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    local = ("/a", "./a", "~/a", "a/b/c", "out/a", "a/", "a\\b", "full_sft.pth", "owner/model.gguf")
    assert [name for name in local if not looks_local(name)] == []
    assert [name for name in ("owner/name", "gpt2", "owner/name-GGUF") if looks_local(name)] == []


def test_is_raw_weights(tmp_path: Path) -> None:
    for name in ("a.pth", "a.bin", "a.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "directory.pth").mkdir()
    names = ("a.pth", "a.bin", "a.gguf", "directory.pth", "absent.pth")
    assert [is_raw_weights(tmp_path / name) for name in names] == [True, True, False, False, False]
