"""Which pairs are held out, and how often those of a mixture's sources come: pure functions of rows and settings."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minimind_dpo.data.json_text import RowError
from minimind_dpo.data.records import PreferencePair, parse_line
from minimind_dpo.data.rows import DataFile, read_rows
from minimind_dpo.data.said import asked


@dataclass(frozen=True, slots=True)
class Split:
    """One part of data that is divided: `held_out` has the prompts whose hash is below `limit`, the other the rest."""

    held_out: bool
    limit: float

    def has(self, pair: PreferencePair) -> bool:
        """Whether a pair belongs to this part."""
        return (prompt_hash(pair) < self.limit) == self.held_out


def prompt_hash(pair: PreferencePair) -> float:
    """A number in [0, 1) of what is asked (see `asked`): of roles and words, whatever their white space.

    It knows nothing of the answers, of the row's place or of other rows.
    """
    told = [{"role": role, "content": words} for role, words in asked(pair)]
    text = json.dumps(told, sort_keys=True, ensure_ascii=False)
    # 53 bits, all that a float in [0, 1) holds
    return (int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 11) / 2**53


def split_limit(size: float, files: Iterable[DataFile], columns: Mapping[str, str]) -> float:
    """Below which hash a prompt is held out.

    Args:
        size: a share of the prompts, below 1, or a number of pairs: then as many whole prompts, in the order of their
            hashes, as have no more pairs than that, and at least one.
        files: all the data; read only for a number of pairs.
        columns: see `parse_line`.
    """
    if size < 1:
        return size
    pairs: Counter[float] = Counter()
    for file in files:
        for row, payload in read_rows(file):
            try:
                pairs[prompt_hash(parse_line(payload, file.place(row), columns))] += 1
            except RowError:
                continue  # tokenizing says what is done about it
    hashes = sorted(pairs)
    totals = np.cumsum([pairs[value] for value in hashes])
    taken = max(1, int(np.searchsorted(totals, size, side="right")))
    return hashes[taken] if taken < len(hashes) else 1.0


def mixture(sources: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Which pairs an epoch consists of, in order: pair i of a source comes floor((i+1)w) - floor(iw) times.

    Args:
        sources: [N] the source of each pair, counted from 0.
        weights: of each source; 2 takes each pair twice, 0.5 every second one.
    """
    counts = np.zeros(len(sources), dtype=np.int64)
    for source, weight in enumerate(weights):
        mine = np.flatnonzero(sources == source)
        counts[mine] = np.diff(np.floor(np.arange(len(mine) + 1) * weight + 1e-9).astype(np.int64))
    return np.repeat(np.arange(len(sources)), counts)
