"""One file of reference log-probabilities: named by the checksum of its content, and with one for every pair in it.

The first tells at once whether a file is what was written; the second, in one that is not, which pairs still are. A
file also names its directory, which is that of one reference: moved to another's it is not taken for its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from minimind_dpo.data.cache import CACHE_VARIABLE
from minimind_dpo.files import aside, checksum, put_in_place, sync, writing

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logps", pa.list_(pa.float32())), ("checksum", pa.uint64())])
_OF = b"directory"  # files of before have no such note
KEY = "S16"  # numpy orders and compares these; it ignores trailing zeros, alike on both sides


class LogpsFile:
    """A memory-mapped file: keys in ascending order, and each key's log-probabilities."""

    def __init__(self, path: Path, whole: bool = True):
        """Map a file; of one that is whole, nothing but its frame is read.

        Raises:
            OSError: it can't be read.
            ValueError: it is no such file, or one of another reference.
        """
        self._path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(_SCHEMA):
            raise ValueError(f"{path} holds something else")
        if (of := (reader.schema.metadata or {}).get(_OF, b"").decode()) not in ("", path.parent.name):
            raise ValueError(f"it is of another reference, {of}")
        batch = reader.get_batch(0)
        if not whole:
            batch.validate(full=True)
        self.keys = np.frombuffer(batch["key"].buffers()[1], dtype=KEY)[: len(batch)]
        self.offsets = batch["logps"].offsets.to_numpy()
        self.logps = batch["logps"].values.to_numpy()
        self.checksums = batch["checksum"].to_numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return LogpsFile, (self._path,)  # a process that is sent one maps the file too; its values stay on disk

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, -1 where it is absent."""
        rows = np.searchsorted(self.keys, keys)
        rows[rows == len(self.keys)] = 0
        return np.where(self.keys[rows] == keys, rows, -1)

    def values(self, row: int) -> np.ndarray:
        """The per-token log-probabilities of a row."""
        return self.logps[self.offsets[row] : self.offsets[row + 1]]

    def is_intact(self, row: int) -> bool:
        """Whether a row is what was written."""
        return _checksum_of(self.keys[row], self.values(row)) == int(self.checksums[row])

    def intact(self) -> list[int]:
        """The rows that are what was written."""
        return [row for row in range(len(self.keys)) if self.is_intact(row)]


def is_whole(path: Path) -> bool:
    """Whether a file is there, is what was written, and where."""
    try:
        return path.stem.rpartition("-")[2] == checksum(path) and LogpsFile(path) is not None
    except (OSError, ValueError):
        return False


def open_whole(path: Path) -> LogpsFile | None:
    """A file that is what was written; None where it is not, or another run has removed it."""
    try:
        return LogpsFile(path) if is_whole(path) else None
    except FileNotFoundError:
        return None


def write_logps(directory: Path, kind: str, keys: np.ndarray, logps: Sequence[np.ndarray]) -> Path:
    """Write the file KIND-CHECKSUM.arrow of these pairs in the order of their keys, each key once.

    Raises:
        UserError: the directory can't be written to.
        TrainingError: the disk is full.
    """
    order = _unique(keys, logps)
    offsets = np.cumsum([0, *(len(logps[row]) for row in order)], dtype=np.int32)
    values = np.concatenate([logps[row] for row in order]).astype(np.float32)
    checksums = [_checksum_of(keys[row], logps[row].astype(np.float32, copy=False)) for row in order]
    columns = [
        pa.Array.from_buffers(pa.binary(16), len(order), [None, pa.py_buffer(keys[order].tobytes())]),
        pa.ListArray.from_arrays(offsets, values),
        pa.array(checksums, pa.uint64()),
    ]
    schema = _SCHEMA.with_metadata({_OF: directory.name})
    with writing(directory, CACHE_VARIABLE), aside(directory / f"{kind}.arrow") as new:
        with pa.OSFile(str(new), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        sync(new)
        final = directory / f"{kind}-{checksum(new)}.arrow"
        put_in_place(new, final)
    return final


def first(values: Sequence[np.ndarray]) -> np.ndarray:
    """Of a pair's values the one with the smallest bytes: a choice that depends on no order and on no file."""
    return values[0] if len(values) == 1 else min(values, key=lambda array: array.tobytes())


def remove(path: Path) -> None:
    """Remove a file that another run may have removed meanwhile."""
    with writing(path, CACHE_VARIABLE):
        path.unlink(missing_ok=True)


def _checksum_of(key: bytes, values: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(key + values.tobytes())


def _unique(keys: np.ndarray, logps: Sequence[np.ndarray]) -> list[int]:
    """Rows in the order of their keys; of those with one key the `first`."""
    rows: list[int] = []
    for row in np.argsort(keys, kind="stable").tolist():
        if not rows or keys[rows[-1]] != keys[row]:
            rows.append(row)
        elif first([logps[rows[-1]], logps[row]]) is logps[row]:
            rows[-1] = row
    return rows
