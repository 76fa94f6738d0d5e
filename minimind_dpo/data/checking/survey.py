"""One pass over all rows of some data, then what comparing them shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from minimind_dpo.data.checking.findings import Findings, Ledger
from minimind_dpo.data.checking.repeats import find_leaks, find_repeats
from minimind_dpo.data.checking.rows import ROW, CheckedBlock, check_block
from minimind_dpo.data.processes import Row, RowBlock, Settings, map_blocks, row_blocks, worthwhile_processes
from minimind_dpo.data.records import RowError
from minimind_dpo.data.rows import DataFile, read_rows
from minimind_dpo.data.sources import find_files
from minimind_dpo.engine.console import Progress
from minimind_dpo.errors import UserError

_LONGEST_DETAIL = 300  # characters; a row that is refused may be quoted at any length
_WORDS = {
    "duplicate_pair": "the same as",
    "contradictory_pair": "the same answers the other way round at",
    "leak_into_eval": "in the evaluation data, too:",
}


@dataclass(slots=True)
class Source:
    """One source as the user named it: how many rows it has, and what is wrong with them."""

    name: str
    rows: int = 0
    findings: Findings = field(default_factory=Findings)


@dataclass(slots=True)
class Survey:
    """What is known of some data.

    Attributes:
        sources: each with its own findings.
        files: of all sources.
        owners: for each file the number of its source.
        max_length: at which pairs are kept or left out.
        findings: those of all sources.
        pairs: [N] `ROW`s of the pairs that have a signal at some `max_length`, in file order.
    """

    sources: list[Source]
    files: list[DataFile]
    owners: np.ndarray
    max_length: int
    findings: Findings = field(default_factory=Findings)
    pairs: np.ndarray = field(default_factory=lambda: np.empty(0, ROW))

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    def kept(self, source: int | None = None) -> np.ndarray:
        """The pairs that training keeps, of one source or of all."""
        return self.of(source)[self.of(source)["needs"] <= self.max_length]

    def of(self, source: int | None = None) -> np.ndarray:
        """The pairs of one source, or all."""
        return self.pairs if source is None else self.pairs[self.owners[self.pairs["file"]] == source]

    def place(self, pair: np.void) -> str:
        """Where a pair was read."""
        return self.files[pair["file"]].place(int(pair["row"]))

    def note(self, source: int, reason: str, place: str, detail: str, ledger: Ledger) -> None:
        """Count a finding, for its source and in all, and write it down."""
        detail = " ".join(detail.split())
        if len(detail) > _LONGEST_DETAIL:
            detail = f"{detail[: _LONGEST_DETAIL - 4]} ..."
        for findings in (self.findings, self.sources[source].findings):
            findings.add(reason, place, detail)
        ledger.write(reason, place, detail)

    def note_pair(self, pair: np.void, reason: str, other: str, ledger: Ledger) -> None:
        """As `note`, of a pair that has this to do with another one, read at `other`."""
        detail = f"{_WORDS[reason]} {other}"
        self.note(int(self.owners[pair["file"]]), reason, self.place(pair), detail, ledger)

    def stream(self) -> Iterator[Row]:
        """Every row; a file that is damaged in a way that hides its next row ends with an error in a row's place."""
        for number, file in enumerate(self.files):
            row = 0
            try:
                for row, payload in read_rows(file):
                    yield number, row, file.place(row), payload
            except UserError as error:
                place, _, message = str(error).partition(": ")
                yield number, row + 1, place, RowError("damaged_file", f"{message}; nothing after it is read")
            except OSError as error:
                raise UserError(f"{file.name}: can't be read: {error}") from None


def survey(names: list[str], tokenizer: Any, settings: Settings, processes: int | None, ledger: Ledger) -> Survey:
    """Check every row of the data by itself, and rows against each other.

    Memory grows by 60 bytes a row, and while rows are compared by up to 160 more.

    Args:
        names: sources, each anything that `find_files` accepts.
        tokenizer: a fast tokenizer of transformers.
        settings: of training; `on_bad_row` has no effect.
        processes: to check rows in; by default as many as the data's size makes worthwhile.
        ledger: gets every finding: of single rows first, in file order, then those of comparison.

    Raises:
        UserError: no data, or no row at all can be tokenized with this tokenizer or these settings.
    """
    files = [find_files(name) for name in names]
    owners = np.repeat(np.arange(len(names)), [len(part) for part in files])
    found = Survey([Source(name) for name in names], list(chain.from_iterable(files)), owners, settings.max_length)
    work = partial(check_block, tokenizer=tokenizer, settings=settings)
    arrays = [found.pairs]
    with Progress("checking", "rows") as progress:
        for block, checked in map_blocks(row_blocks(found.stream()), work, processes or _processes(found)):
            _take(found, block, checked, ledger)
            arrays.append(checked.rows)
            progress.update(len(block))
    found.pairs = np.concatenate(arrays)
    del arrays
    kept = found.kept()
    for index, reason, other in find_repeats(kept):
        found.note_pair(kept[index], reason, found.place(kept[other]), ledger)
    if not len(kept):
        found.note(0, "no_usable_pair", ", ".join(names), f"none of {found.rows} rows is kept", ledger)
    return found


def note_leaks(found: Survey, evaluation: Survey, ledger: Ledger) -> None:
    """Add the rows of training data that are in the evaluation data too."""
    ours, theirs = found.kept(), evaluation.kept()
    for index, reason, other in find_leaks(ours, theirs):
        found.note_pair(ours[index], reason, evaluation.place(theirs[other]), ledger)


def _take(found: Survey, block: RowBlock, checked: CheckedBlock, ledger: Ledger) -> None:
    for file, _, _, _ in block:
        found.sources[found.owners[file]].rows += 1
    for index, reason, detail in checked.findings:
        file, _, place, _ = block[index]
        found.note(int(found.owners[file]), reason, place, detail, ledger)


def _processes(found: Survey) -> int:
    # late: it imports torch, which --help and a wrong name of a file need not wait for
    from minimind_dpo.engine.cpu import available_cores

    return worthwhile_processes(sum(map(_size, found.files)), available_cores())


def _size(file: DataFile) -> int:
    """Bytes of a file, or of all files behind a data set."""
    if file.dataset is None:
        return os.path.getsize(file.name)
    return sum(os.path.getsize(part["filename"]) for part in file.dataset.cache_files)
