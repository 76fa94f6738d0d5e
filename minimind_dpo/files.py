"""Files that are whole or absent, and as they were written.

A crash, a kill or a power cut leaves the old content or the new one, never a half. New content is written in a
directory that only this writer knows, its bytes are brought to the disk, and only then does it take its name: no two
writers meet, and no link that somebody planted under a foreseeable name is followed.

What is read again carries a checksum: xxh3_128 finds accidents as fast as a disk reads, and says not who wrote it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from minimind_dpo.errors import TrainingError, UserError

_PARTIAL = ".partial"
_ABANDONED = 24 * 3600  # seconds after which nobody writes any more
_unfinished: set[Path] = set()  # where `replacing` blocks of this process write
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # nobody's mistake, and it may go on later
_FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
)


@contextmanager
def writing(path: Path, setting: str) -> Iterator[None]:
    """Around what writes to `path`, and nothing else: where that place is at fault, the error says so.

    Args:
        path: where the block writes.
        setting: what the user changes to write elsewhere: a flag, or a variable of the environment.

    Raises:
        UserError: nothing can be written there: read-only, another user's, a file where a directory should be.
        TrainingError: the disk is full.
    """
    try:
        yield
    except (UserError, TrainingError):
        raise
    except Exception as error:
        number = _number_of(error)
        place = str(getattr(error, "filename2", None) or getattr(error, "filename", None) or path)
        place = str(path) if _PARTIAL in place else place  # a name that nobody knows
        if number in _FULL:
            raise TrainingError(
                f"cannot write to {place}: {os.strerror(number)}. Make room there and start again, or name another "
                f"place with {setting}"
            ) from error
        if number in _FORBIDDEN:
            raise UserError(
                f"{setting}: cannot write to {place}: {os.strerror(number)}. Name a place that can be written to"
            ) from error
        raise


def _number_of(error: BaseException) -> int:
    """The operating system's number of an error, which libraries in other languages only tell in words; else 0."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := re.search(r"os error (\d+)", str(error)):
        return int(found[1])
    return _number_of(error.__context__) if error.__context__ else 0


def checksum(path: Path) -> str:
    """xxh3_128 (hex) of a file's content, read as a stream.

    Raises:
        OSError: it can't be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sealed(value: Any) -> str:
    """`value` as JSON with its checksum, for `read_sealed`."""
    return json.dumps({"checksum": _checksum_of(value), "value": value}, indent=1)


def read_sealed(path: Path) -> Any:
    """The value that was written as `sealed` gives it.

    Raises:
        OSError: it can't be read.
        ValueError: it is not what was written.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["checksum"] == _checksum_of(content["value"]):
            return content["value"]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path.name} is not what was written")


def _checksum_of(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same name, to write a file or make a directory at; it vanishes with the block.

    The directories above `path` are made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
    try:
        yield workspace / path.name
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `aside`; what was written there takes the place of `path` when the block ends without an error."""
    with aside(path) as new:
        _unfinished.add(new.parent)
        try:
            yield new
            share(new)
            sync_all(new)
        finally:
            _unfinished.discard(new.parent)
        put_in_place(new, path)


def remove_unfinished() -> None:
    """Remove what this process has begun to write and not finished; for one that is about to end amid its work."""
    for workspace in list(_unfinished):
        shutil.rmtree(workspace, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file, or make it; UTF-8."""
    with replacing(path) as new:
        new.write_text(text, "utf-8")


def share(directory: Path) -> None:
    """Give tensors the rights that any new file has there: safetensors makes them for their owner alone."""
    for path in directory.glob("*.safetensors"):
        path.chmod(directory.stat().st_mode & 0o666)


def put_in_place(new: Path, path: Path) -> None:
    """Rename `new`, whose bytes are on disk and which lies on the same file system, to `path`.

    A file takes the place of another in one instant. A directory cannot: what is there is renamed away first, comes
    back should the second renaming fail, and is removed at the end. A kill between the two leaves the name absent.
    """
    if not (new.is_dir() and os.path.lexists(path)):
        os.replace(new, path)
        return sync(path.parent)
    with aside(path) as old:
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(old, path)
            raise
        sync(path.parent)


def discard(path: Path) -> None:
    """Remove a directory that must be whole or absent: it loses its name before its content."""
    with aside(path) as doomed:
        os.replace(path, doomed)


def open_itself(path: str, flags: int) -> int:
    """An `opener` for `open` that follows no link: OSError where the name is one."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def make_anew(path: Path) -> None:
    """Make an empty directory in place of whatever is there; of a link, only the link is removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def sweep(directory: Path) -> None:
    """Remove what killed processes left half-written in `directory` more than a day ago."""
    for path in directory.glob(f".*{_PARTIAL}"):
        try:
            if path.lstat().st_mtime > time.time() - _ABANDONED:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except FileNotFoundError:  # another process sweeps too
            continue


def own(path: Path) -> Path:
    """The name that takes the place of a cache entry which is another user's and closed to this one."""
    return path.with_name(f"{path.name}-{getattr(os, 'getuid', int)()}")


def is_closed(path: Path, access: int) -> bool:
    """Whether something is there to which this user has no such access, say `os.R_OK`."""
    return os.path.lexists(path) and not os.access(path, access)


def sync_all(path: Path) -> None:
    """Bring a file, or a directory with all that is in it, to the disk."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))
    if path.is_file():
        sync(path)


def sync(path: Path) -> None:
    """Bring one file, or the names in one directory, to the disk."""
    windows = os.name == "nt"  # it syncs only what is open for writing, and no directory
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose directories need no such call
            raise
    finally:
        os.close(descriptor)
