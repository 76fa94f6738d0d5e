"""What files hold, as a digest: the same bytes are the same data, wherever they lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from minimind_dpo.data.rows import DataFile


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
    # The same bytes under a name that says how they are packed are other rows, or none.
    kind = f"{file.kind}.gz" if file.is_packed else file.kind
    digest, size, lines = hashlib.sha256(kind.encode()), 0, 0
    for path in [file.name] if file.dataset is None else _dataset_files(file.dataset, digest):
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
                size += len(block)
                lines += block.count(b"\n")
    return FileDigest(digest.hexdigest(), size, lines)


def _dataset_files(dataset: Any, digest: Any) -> list[str]:
    """The files behind a data set. One in memory, or a selection of rows, adds its fingerprint to `digest`."""
    files = [file["filename"] for file in dataset.cache_files]
    if not files or getattr(dataset, "_indices", None) is not None:
        digest.update(dataset._fingerprint.encode())
    return files
