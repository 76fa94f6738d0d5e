"""The files in which wandb and swanlab keep a run offline: a head of 7 bytes, then a log in LevelDB's format.

Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_HEAD = _CHUNK_HEAD = 7  # bytes; of a chunk: its checksum, length and kind
_BLOCK = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


def read_records(path: Path) -> Iterator[bytes]:
    """The whole records of a file; one that was cut off by a kill ends it."""
    data, position, parts = path.read_bytes(), _HEAD, b""
    while position + _CHUNK_HEAD <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _CHUNK_HEAD:  # no head lies across two blocks
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _CHUNK_HEAD
        chunk = data[position : position + length]
        if not _FULL <= kind <= _LAST or len(chunk) < length:
            return
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        position += length
        if kind in (_FULL, _LAST):
            yield parts
