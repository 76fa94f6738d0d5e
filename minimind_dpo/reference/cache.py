"""Reference log-probabilities on disk, found by the content of pairs, and for whole data sets at once.

The directory of one reference under given numeric settings (`cache_directory`) holds

    chunk-*.arrow      64 pairs that were scored together, written while a cache is filled
    merged-*.arrow     1024 chunks in one file; their own files go once it is there
    complete/*.json    for a tokenised data set that was found or scored as a whole: the merged files to look in

Every file is written aside and renamed, so it is whole or absent. Merged files never change and are never deleted, so
any number of runs share a directory: at worst they score a pair twice, or keep the same values twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minimind_dpo.data.cache import cache_root
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.files import replacing, sweep, write_text

logger = logging.getLogger(__name__)

CHUNK_PAIRS = 64
MERGED_CHUNKS = 1024
_FORMAT = 2  # raise it when files are laid out, or pairs are batched for scoring, differently
_SCHEMA = pa.schema([("key", pa.binary(16)), ("logps", pa.list_(pa.float32()))])
_KEY = "S16"  # numpy orders and compares these; it ignores trailing zeros, alike on both sides


@dataclass(frozen=True, slots=True)
class Needed:
    """Pairs of a tokenised data set that will be looked up: `positions` in it, ascending; a range for all of it."""

    data: TokenizedData
    positions: Sequence[int]

    def chunks(self) -> int:
        """The number of chunks."""
        return -(-len(self.positions) // CHUNK_PAIRS)

    def rows(self, chunk: int) -> list[dict[str, Any]]:
        """The pairs of one chunk, read from disk."""
        positions = self.positions[chunk * CHUNK_PAIRS : (chunk + 1) * CHUNK_PAIRS]
        return self.data.dataset.__getitems__([int(position) for position in positions])

    def names(self) -> list[str]:
        """Names of the markers that answer for these pairs: of the whole data set, then of these positions alone."""
        parts = ["all"]
        if len(self.positions) < len(self.data):
            parts.append(hashlib.sha256(np.asarray(self.positions, dtype="<i8").tobytes()).hexdigest())
        return [hashlib.sha256(f"{self.data.digest} {part}".encode()).hexdigest()[:32] for part in parts]


def cache_directory(digest: str, numerics: dict[str, Any]) -> Path:
    """Where the log-probabilities of one reference under given numeric settings lie.

    `digest` is the reference's (`reference_digest`); `numerics` are settings that change the numbers: precision,
    layout, device type.
    """
    settings = hashlib.sha256(json.dumps(numerics | {"format": _FORMAT}, sort_keys=True).encode()).hexdigest()
    return cache_root() / "reference" / f"{digest[:32]}-{settings[:8]}"


class _File:
    """One memory-mapped file: keys in ascending order, and each key's log-probabilities."""

    def __init__(self, path: Path):
        table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.keys = np.frombuffer(table["key"].buffers()[1], dtype=_KEY)[: len(table)]
        self.offsets = table["logps"].offsets.to_numpy()
        self.logps = table["logps"].values.to_numpy()

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, -1 where it is absent."""
        rows = np.searchsorted(self.keys, keys)
        rows[rows == len(self.keys)] = 0
        return np.where(self.keys[rows] == keys, rows, -1)

    def values(self, row: int) -> np.ndarray:
        """The per-token log-probabilities of a row."""
        return self.logps[self.offsets[row] : self.offsets[row + 1]]


class ReferenceCache:
    """The files of one directory; pairs are looked up in those of its merged files that were opened."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: list[_File] = []
        (directory / "complete").mkdir(parents=True, exist_ok=True)

    def open(self, names: Sequence[str]) -> None:
        """Map merged files into memory; nothing is read. Those that are damaged or gone are passed by."""
        self._files = [file for _, file in self._opened([self.directory / name for name in names])]

    def has(self, keys: Sequence[bytes]) -> bool:
        """Whether every key is there."""
        wanted = np.array(keys, dtype=_KEY)
        found = np.zeros(len(wanted), dtype=bool)
        for file in self._files:
            found |= file.rows(wanted) >= 0
        return bool(found.all())

    def get(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """The per-token log-probabilities of each pair, float32, chosen then rejected.

        A pair that was scored in two chunks has two values, which may differ in the last bit; the one is taken that
        `_first` of both is, whichever files they have come to lie in.

        Raises:
            KeyError: a pair was never scored.
        """
        wanted = np.array(keys, dtype=_KEY)
        found: list[list[np.ndarray]] = [[] for _ in keys]
        for file in self._files:
            for index, row in enumerate(file.rows(wanted)):
                if row >= 0:
                    found[index].append(file.values(row))
        for key, values in zip(keys, found, strict=True):
            if not values:
                raise KeyError(key.hex())
        return [_first(values) for values in found]

    def write_chunk(self, keys: Sequence[bytes], logps: Sequence[np.ndarray]) -> None:
        """Store one chunk under a name made of its keys."""
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        self._write(f"chunk-{name}.arrow", np.array(keys, dtype=_KEY), logps)

    def merge(self) -> list[str]:
        """Put all chunks into merged files, and only then delete their files; the names of all merged files.

        For one process of a run; another run may do the same at the same time.
        """
        while paths := self._paths("chunk")[:MERGED_CHUNKS]:
            opened = self._opened(paths)
            if opened:
                keys = np.concatenate([file.keys for _, file in opened])
                logps = [file.values(row) for _, file in opened for row in range(len(file.keys))]
                name = hashlib.sha256(b"".join(path.name.encode() for path, _ in opened)).hexdigest()[:32]
                self._write(f"merged-{name}.arrow", keys, logps)
            for path, _ in opened:
                path.unlink(missing_ok=True)  # another run may have merged it too
        return [path.name for path in self._paths("merged")]

    def finish(self, needed: Needed) -> None:
        """Merge, and write down that the merged files hold all of `needed`, so that the next run need not look."""
        self.merge()
        sizes = {path.name: path.stat().st_size for path in self._paths("merged")}
        marker = self.directory / "complete" / f"{needed.names()[-1]}.json"
        write_text(marker, json.dumps({"pairs": len(needed.positions), "files": sizes}))
        sweep(self.directory)

    def marked(self, needed: Sequence[Needed]) -> list[str] | None:
        """The merged files that hold all of `needed`; None where that is not known, or no longer true."""
        parts = [self._marked(part) for part in needed]
        return None if None in parts else sorted({name for part in parts for name in part or ()})

    def _marked(self, needed: Needed) -> list[str] | None:
        for marker in needed.names():
            path = self.directory / "complete" / f"{marker}.json"
            try:
                merged = json.loads(path.read_text("utf-8"))["files"]
                wrong = [name for name, size in merged.items() if _size(self.directory / name) != size]
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                wrong = [f"complete/{path.name} ({error!r})"]
            if not wrong:
                return list(merged)
            logger.warning(
                "reference cache: %s in %s is missing or damaged: every pair is looked up, and computed "
                "again where need be",
                wrong[0],
                self.directory,
            )
        return None

    def unmark(self) -> None:
        """Forget what is known to be complete, so that the next run looks every pair up."""
        for path in (self.directory / "complete").glob("*.json"):
            path.unlink(missing_ok=True)

    def _paths(self, kind: str) -> list[Path]:
        return sorted(self.directory.glob(f"{kind}-*.arrow"))

    def _opened(self, paths: Sequence[Path]) -> list[tuple[Path, _File]]:
        """Those of the files that can be read; others are removed, and one that another run has merged is passed by."""
        opened = []
        for path in paths:
            try:
                opened.append((path, _File(path)))
            except FileNotFoundError:
                continue
            except (pa.ArrowInvalid, OSError, KeyError, AttributeError) as error:
                logger.warning("reference cache: %s is damaged (%s) and will be computed again", path, error)
                path.unlink(missing_ok=True)
        return opened

    def _write(self, name: str, keys: np.ndarray, logps: Sequence[np.ndarray]) -> None:
        """Write a file of these pairs in the order of their keys, each key once."""
        order = _unique(keys, logps)
        offsets = np.cumsum([0, *(len(logps[row]) for row in order)], dtype=np.int32)
        values = np.concatenate([logps[row] for row in order]).astype(np.float32)
        columns = [
            pa.Array.from_buffers(pa.binary(16), len(order), [None, pa.py_buffer(keys[order].tobytes())]),
            pa.ListArray.from_arrays(offsets, values),
        ]
        with (
            replacing(self.directory / name) as new,
            pa.OSFile(str(new), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as writer,
        ):
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))


def _unique(keys: np.ndarray, logps: Sequence[np.ndarray]) -> list[int]:
    """Rows in the order of their keys; of those with one key the `_first`."""
    rows: list[int] = []
    for row in np.argsort(keys, kind="stable").tolist():
        if not rows or keys[rows[-1]] != keys[row]:
            rows.append(row)
        elif _first([logps[rows[-1]], logps[row]]) is logps[row]:
            rows[-1] = row
    return rows


def _first(values: Sequence[np.ndarray]) -> np.ndarray:
    """Of a pair's values the one with the smallest bytes: a choice that depends on no order and on no file."""
    return values[0] if len(values) == 1 else min(values, key=lambda array: array.tobytes())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
