"""The cache of tokenized data: one directory for each content, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minimind_dpo.data.chat import TokenizedPair, shared_prefix_length
from minimind_dpo.data.sources import DataFile
from minimind_dpo.files import aside, sweep, sync, sync_all

CODE_VERSION = 3  # raise it when the same bytes would be tokenized differently
_SIDES = ("chosen_input_ids", "chosen_completion_mask", "rejected_input_ids", "rejected_completion_mask")
_PAIRS_PER_RECORD_BATCH = 256
_TABLE, _META = "pairs.arrow", "meta.json"


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file holds: sha256 (hex), size in bytes, number of lines."""

    sha256: str
    size: int
    lines: int


def digest_file(file: DataFile) -> FileDigest:
    """The digest of a file, or of all files behind a data set; they are read as a stream.

    Raises:
        OSError: a file can't be read.
    """
    digest, size, lines = hashlib.sha256(file.kind.encode()), 0, 0
    for path in [file.name] if file.dataset is None else _dataset_files(file.dataset, digest):
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
                size += len(block)
                lines += block.count(b"\n")
    return FileDigest(digest.hexdigest(), size, lines)


def key_of(contents: list[str], tokenizer: Any, settings: Any) -> str:
    """The name of a cache entry (hex): a digest of what decides the tokenized pairs, and of nothing else.

    Args:
        contents: the files' digests, in order.
        tokenizer: a fast tokenizer of transformers.
        settings: a dataclass of values that JSON can hold.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left behind by earlier calls, without effect on ours
        backend.pop(state, None)
    parts = [CODE_VERSION, contents, backend, tokenizer.chat_template, tokenizer.special_tokens_map, asdict(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cache_root() -> Path:
    """Where everything that can be computed again is kept: $MINIMIND_DPO_CACHE, by default ~/.cache/minimind_dpo."""
    return Path(os.environ.get("MINIMIND_DPO_CACHE") or "~/.cache/minimind_dpo").expanduser()


def entry_path(key: str) -> Path:
    """The directory of a cache entry."""
    return cache_root() / "tokens" / key


def open_entry(path: Path) -> tuple[Any, dict[str, Any]] | None:
    """The memory-mapped data set and the meta data of an entry; None if it is absent or damaged."""
    import datasets  # late: it takes a second, which nothing else here needs

    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        if (path / _TABLE).stat().st_size != meta["bytes"]:
            return None
        return datasets.Dataset.from_file(str(path / _TABLE)), meta
    except (OSError, ValueError, KeyError):
        return None


class TableWriter:
    """The table of an entry, written as a stream: pairs and dropped rows are added in order, and counted."""

    def __init__(self, path: Path) -> None:
        ids, mask = pa.list_(pa.int32()), pa.list_(pa.int8())
        sides = list(zip(_SIDES, [ids, mask] * 2, strict=True))
        values = [("weight", pa.float64()), ("margin", pa.float64()), ("id", pa.string())]
        origin = [("file", pa.int32()), ("row", pa.int64())]
        self._schema = pa.schema([*sides, *values, ("tokens", pa.int32()), *origin])
        self._table = pa.ipc.new_stream(str(path), self._schema)
        self._pairs: list[tuple[Any, ...]] = []
        self._digest = hashlib.sha256()
        self._kept = 0
        self._dropped: dict[str, int] = {}
        self._examples: dict[str, tuple[int, int]] = {}

    def add(self, pair: TokenizedPair, file: int, row: int) -> None:
        """Append the next pair, which was read as row `row` of the source's file `file` (from 0)."""
        sides = [
            _int_array(pair.chosen_input_ids),
            _mask_array(pair.chosen_completion_mask),
            _int_array(pair.rejected_input_ids),
            _mask_array(pair.rejected_completion_mask),
        ]
        # What a pair teaches is digested, not where it was read.
        for side in sides:
            self._digest.update(len(side).to_bytes(8, "little") + side.tobytes())
        values = [pair.weight, np.nan if pair.margin is None else pair.margin]
        self._digest.update(np.asarray(values, dtype="<f8").tobytes())
        self._kept += 1
        tokens = len(sides[0]) + len(sides[2]) - 2 - shared_prefix_length(sides[0], sides[2])
        self._pairs.append((*sides, pair.weight, pair.margin, pair.id, tokens, file, row))
        if len(self._pairs) >= _PAIRS_PER_RECORD_BATCH:
            self._flush()

    def drop(self, reason: str, file: int, row: int) -> None:
        """Count a row that is left out."""
        self._dropped[reason] = self._dropped.get(reason, 0) + 1
        self._examples.setdefault(reason, (file, row))

    def meta(self) -> dict[str, Any]:
        """Numbers of rows, kept and dropped, and the digest, so far; what `open_entry` returns again."""
        return {
            "digest": self._digest.hexdigest(),
            "rows": self._kept + sum(self._dropped.values()),
            "kept": self._kept,
            "dropped": self._dropped,
            "examples": self._examples,
        }

    def close(self) -> None:
        """Write what is pending, and the table's end."""
        self._flush()
        self._table.close()

    def _flush(self) -> None:
        if not self._pairs:
            return
        columns = [
            _list_array(column, field.type) if pa.types.is_list(field.type) else pa.array(column, field.type)
            for field, column in zip(self._schema, zip(*self._pairs, strict=True), strict=True)
        ]
        self._table.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._pairs = []


def _int_array(values: list[int]) -> np.ndarray:
    return np.asarray(array("i", values)).astype("<i4", copy=False)  # several times as fast as without `array`


def _mask_array(values: list[int]) -> np.ndarray:
    return np.frombuffer(bytes(values), dtype=np.uint8).astype("<i4")


def _list_array(column: tuple[np.ndarray, ...], kind: Any) -> Any:
    offsets = np.cumsum([0, *map(len, column)]).astype(np.int32)
    values = np.concatenate(column).astype(kind.value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(offsets, values, type=kind)


@contextmanager
def write_entry(path: Path) -> Iterator[TableWriter]:
    """Write an entry aside and rename it to `path` when the block ends without an error: complete or absent.

    Of several processes that write the same entry the first wins; the others find an equal one and take it.

    Raises:
        OSError: the disk is full, or the cache can't be written to.
    """
    sweep(path.parent)
    with aside(path) as scratch:
        scratch.mkdir()
        writer = TableWriter(scratch / _TABLE)
        yield writer
        writer.close()
        meta = writer.meta() | {"bytes": (scratch / _TABLE).stat().st_size}
        (scratch / _META).write_text(json.dumps(meta), encoding="utf-8")
        sync_all(scratch)
        _move(scratch, path)
        sync(path.parent)


def _move(scratch: Path, path: Path) -> None:
    for _ in range(3):
        try:
            os.rename(scratch, path)
            return
        except OSError:
            if open_entry(path) is not None:
                return
            # A damaged entry is in the way (a disk that was full, a file that was cut): it makes room.
            shutil.rmtree(path, ignore_errors=True)
    os.rename(scratch, path)


def _dataset_files(dataset: Any, digest: Any) -> list[str]:
    """The files behind a data set. One in memory, or a selection of rows, adds its fingerprint to `digest`."""
    files = [file["filename"] for file in dataset.cache_files]
    if not files or getattr(dataset, "_indices", None) is not None:
        digest.update(dataset._fingerprint.encode())
    return files
