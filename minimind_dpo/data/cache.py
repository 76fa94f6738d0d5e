"""The cache of tokenized data: one directory for each content, complete or absent, with checksums."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from minimind_dpo.data.chat import TokenizedPair, shared_prefix_length
from minimind_dpo.files import aside, checksum, is_closed, own, read_sealed, sealed, sweep, sync, sync_all, writing

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MINIMIND_DPO_CACHE"
CODE_VERSION = 4  # raise it when the same bytes would be tokenized differently
_SIDES = ("chosen_input_ids", "chosen_completion_mask", "rejected_input_ids", "rejected_completion_mask")
_PAIRS_PER_RECORD_BATCH = 256
_TABLE, _META = "pairs.arrow", "meta.json"


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
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/minimind_dpo").expanduser()


def entry_path(key: str) -> Path:
    """The directory of a cache entry."""
    path = cache_root() / "tokens" / key
    closed = (
        os.path.isdir(path) and is_closed(path, os.X_OK),
        is_closed(path / _META, os.R_OK),
        is_closed(path / _TABLE, os.R_OK),
    )
    return own(path) if any(closed) else path


def open_entry(path: Path) -> tuple[Any, dict[str, Any]] | None:
    """The memory-mapped data set and the meta data of an entry; None if it is absent or, as is said then, damaged.

    All bytes are compared with their checksums, so the digest among the meta data is of the very pairs returned; and
    the key they were made for is, so a directory under another one's name is none of these pairs.
    """
    if not os.path.lexists(path):
        return None
    try:
        return _read_entry(path)
    except (OSError, ValueError) as error:
        logger.warning("token cache: %s is damaged (%s): the data is tokenized again", path, error)
        return None


def _read_entry(path: Path) -> tuple[Any, dict[str, Any]]:
    """As `open_entry`; ValueError or OSError if it is absent or damaged."""
    import datasets  # late: it takes a second, which nothing else here needs

    meta = read_sealed(path / _META)
    if not isinstance(meta, dict) or meta.get("key") != _key(path):
        raise ValueError("it does not say that it was made of this data and these settings")
    if checksum(path / _TABLE) != meta["checksum"]:
        raise ValueError(f"{_TABLE} is not what was written")
    return datasets.Dataset.from_file(str(path / _TABLE)), meta


def _key(path: Path) -> str:
    """What an entry at this path must have been made for; `own` has put something behind it, perhaps."""
    return path.name.partition("-")[0]


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
        with writing(cache_root(), CACHE_VARIABLE):
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
        UserError: the cache can't be written to.
        TrainingError: the disk is full.
    """
    with ExitStack() as stack:
        with writing(path, CACHE_VARIABLE):
            sweep(path.parent)
            scratch = stack.enter_context(aside(path))
            scratch.mkdir()
            writer = TableWriter(scratch / _TABLE)
        yield writer
        with writing(path, CACHE_VARIABLE):
            writer.close()
            meta = writer.meta() | {"key": _key(path), "checksum": checksum(scratch / _TABLE)}
            (scratch / _META).write_text(sealed(meta), encoding="utf-8")
            sync_all(scratch)
            _move(scratch, path)
            sync(path.parent)


def _move(scratch: Path, path: Path) -> None:
    for _ in range(3):
        try:
            os.rename(scratch, path)
            return
        except OSError:
            if _is_whole(path):
                return
            # A damaged entry is in the way, or something else: it makes room.
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif os.path.lexists(path):
                path.unlink()
    os.rename(scratch, path)


def _is_whole(path: Path) -> bool:
    try:
        _read_entry(path)
    except (OSError, ValueError):
        return False
    return True
