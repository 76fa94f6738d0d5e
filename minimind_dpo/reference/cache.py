"""Reference log-probabilities on disk, found by the content of pairs, and for whole data sets at once.

The directory of one reference under given numeric settings (`cache_directory`) holds

    chunk-*.arrow      64 pairs that were scored together, written while a cache is filled
    merged-*.arrow     1024 chunks in one file; their own files go once it is there
    complete/*.json    for a tokenised data set that was found or scored as a whole: the merged files to look in

Every file is written aside and renamed, so it is whole or absent. Merged files never change and are only deleted when
they are damaged, so any number of runs share a directory: at worst they score a pair twice, or keep the same values
twice. All files that a run looks in are compared with their checksums when it starts, by the main process; of a damaged
one the intact pairs are kept, and only the chunks of the others are scored again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimind_dpo.data.batch import pair_key
from minimind_dpo.data.cache import CACHE_VARIABLE, cache_root
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.files import is_closed, own, read_sealed, sealed, sweep, write_text, writing
from minimind_dpo.reference.stored import KEY, LogpsFile, first, is_whole, open_whole, remove, write_logps

logger = logging.getLogger(__name__)

CHUNK_PAIRS = 64
MERGED_CHUNKS = 1024
_FORMAT = 3  # raise it when files are laid out, or pairs are batched for scoring, differently


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
    directory = cache_root() / "reference" / f"{digest[:32]}-{settings[:8]}"
    return own(directory) if os.path.isdir(own(directory)) else directory


class ReferenceCache:
    """The files of one directory; pairs are looked up in those of its merged files that were opened."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: list[LogpsFile] = []
        self._told: set[str] = set()

    def claim(self) -> Path:
        """Make the directory, or one of this user's own beside another user's that is closed to this one; where it is.

        Raises:
            UserError: nothing can be written there.
        """
        if is_closed(self.directory, os.R_OK | os.W_OK | os.X_OK):
            self.directory = own(self.directory)
        with writing(self.directory, CACHE_VARIABLE):
            (self.directory / "complete").mkdir(parents=True, exist_ok=True)
        return self.directory

    def open(self, names: Sequence[str]) -> None:
        """Map merged files into memory, which `marked` or `merge` found whole; those that went since are passed by."""
        self._files = []
        for name in names:
            try:
                self._files.append(LogpsFile(self.directory / name))
            except (OSError, ValueError, KeyError) as error:
                logger.warning("reference cache: %s can't be read (%s)", self.directory / name, error)

    def has(self, keys: Sequence[bytes]) -> bool:
        """Whether every key is there."""
        wanted = np.array(keys, dtype=KEY)
        found = np.zeros(len(wanted), dtype=bool)
        for file in self._files:
            found |= file.rows(wanted) >= 0
        return bool(found.all())

    def get(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """The per-token log-probabilities of each pair, float32, chosen then rejected.

        A pair that was scored in two chunks has two values, which may differ in the last bit; the one is taken that
        `first` of both is, whichever files they have come to lie in.

        Raises:
            KeyError: a pair was never scored, or its values were damaged since the files were opened.
        """
        wanted = np.array(keys, dtype=KEY)
        found: list[list[np.ndarray]] = [[] for _ in keys]
        for file in self._files:
            for index, row in enumerate(file.rows(wanted)):
                if row >= 0 and file.is_intact(row):
                    found[index].append(file.values(row))
        for key, values in zip(keys, found, strict=True):
            if not values:
                raise KeyError(key.hex())
        return [first(values) for values in found]

    def write_chunk(self, keys: Sequence[bytes], logps: Sequence[np.ndarray]) -> None:
        """Store one chunk."""
        write_logps(self.directory, "chunk", np.array(keys, dtype=KEY), logps)

    def merge(self) -> list[str]:
        """Put all chunks into merged files, and only then delete their files; the names of all merged files.

        For one process of a run; another run may do the same at the same time.
        """
        chunks = self._paths("chunk")
        for begin in range(0, len(chunks), MERGED_CHUNKS):
            opened = {path: file for path in chunks[begin : begin + MERGED_CHUNKS] if (file := open_whole(path))}
            if opened:
                keys = np.concatenate([file.keys for file in opened.values()])
                logps = [file.values(row) for file in opened.values() for row in range(len(file.keys))]
                write_logps(self.directory, "merged", keys, logps)
            for path in opened:
                remove(path)
        return [path.name for path in self._paths("merged")]

    def mend(self) -> list[str]:
        """Put what is intact of damaged files into new ones, delete those, and merge; what is lost is scored again."""
        for kind in ("merged", "chunk"):
            for path in self._paths(kind):
                self._mend(path, kind)
        return self.merge()

    def _mend(self, path: Path, kind: str) -> None:
        if is_whole(path):
            return
        rows: list[int] = []
        try:
            file = LogpsFile(path, whole=False)
            rows = file.intact()
            intact = f"{len(rows)} of its {len(file.keys)} pairs are intact"
        except (FileNotFoundError, PermissionError):  # another run has merged or mended it; or it is another user's
            return
        except Exception as error:  # whatever a library makes of bytes that were never written
            intact = f"none of its pairs can be read ({error})"
        logger.warning("reference cache: %s is damaged: %s, the others will be computed again", path, intact)
        if rows:
            write_logps(self.directory, kind, file.keys[rows], [file.values(row) for row in rows])
        remove(path)

    def finish(self, needed: Needed) -> None:
        """Merge, and write down that the merged files hold all of `needed`, so that the next run need not look."""
        names = self.merge()
        *others, marker = self._markers(needed)
        with writing(marker, CACHE_VARIABLE):
            write_text(marker, sealed({"pairs": len(needed.positions), "files": names}))
            sweep(self.directory)
        for other in others:  # it said the same and was not true
            remove(other)

    def marked(self, needed: Sequence[Needed]) -> list[str] | None:
        """The merged files that hold all of `needed`, every byte of them compared with its checksum.

        None where that is not known, or no longer true.
        """
        whole: set[str] = set()
        parts = [self._marked(part, whole) for part in needed]
        return None if None in parts else sorted({name for part in parts for name in part or ()})

    def _marked(self, needed: Needed, whole: set[str]) -> list[str] | None:
        """As `marked`, of one part; `whole` are the names of files that were compared."""
        for path in self._markers(needed):
            try:
                names = read_sealed(path)["files"]
                if gone := [name for name in names if not os.path.exists(self.directory / name)]:
                    raise ValueError(f"{gone[0]} is missing")
                if all(name in whole or is_whole(self.directory / name) for name in names):
                    whole.update(names)
                    return names  # else `mend` says what is damaged
            except (FileNotFoundError, NotADirectoryError):
                continue
            except PermissionError:  # another user's: `claim` makes one beside it
                continue
            except (OSError, ValueError) as error:
                if str(error) in self._told:
                    continue
                self._told.add(str(error))
                logger.warning(
                    "reference cache: %s in %s: every pair is looked up, and computed again where need be",
                    error,
                    self.directory,
                )
        return None

    def was_complete(self, needed: Sequence[Needed]) -> bool:
        """Whether all of `needed` was here once, by a marker or, where that is gone, by the pairs themselves."""
        unmarked = [part for part in needed if not any(map(os.path.exists, self._markers(part)))]
        if unmarked:
            self.open([path.name for path in self._paths("merged") if is_whole(path)])
        chunks = ((part, chunk) for part in unmarked for chunk in range(part.chunks()))
        return all(self.has([pair_key(row) for row in part.rows(chunk)]) for part, chunk in chunks)

    def _markers(self, needed: Needed) -> list[Path]:
        return [self.directory / "complete" / f"{name}.json" for name in needed.names()]

    def unmark(self) -> None:
        """Forget what is known to be complete, so that the next run looks every pair up."""
        for path in (self.directory / "complete").glob("*.json"):
            remove(path)

    def _paths(self, kind: str) -> list[Path]:
        return sorted(self.directory.glob(f"{kind}-*.arrow"))
