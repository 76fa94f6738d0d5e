"""What a user may name as data: files, globs, directories saved by `datasets`, hub ids. Rows are read as a stream."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind_dpo.errors import UserError
from minimind_dpo.files import looks_local

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
BOM = b"\xef\xbb\xbf"
_READ_CHARACTERS = 1 << 18
_LARGEST_ROW = 1 << 28  # characters; a JSON array whose row doesn't close within this is taken to be broken


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file, or one data set of the `datasets` library; `kind` is jsonl, json, parquet or dataset."""

    name: str
    kind: str
    dataset: Any = field(default=None, repr=False)

    def place(self, row: int) -> str:
        """Where row `row` stands: a line of a text file, a row of a table; both count from 1."""
        return f"{self.name}:{row}" if self.kind in ("jsonl", "json") else f"{self.name}:row {row}"


def find_files(source: str | list[str]) -> list[DataFile]:
    """The files of a source, or of a list of sources in their order; the matches of a glob are sorted by name.

    Raises:
        UserError: nothing is found, or it is not of an accepted kind.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise UserError("no data given: name a .jsonl, .json or .parquet file, a glob, a directory or a hub id")
    return [file for name in sources for file in _find(str(name))]


def read_rows(file: DataFile) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """A stream of `(row number from 1, undecoded line or row)`; blank lines are left out, yet have a number.

    Raises:
        UserError: the file is damaged in a way that hides where the next row begins.
    """
    if file.kind == "jsonl":
        return _read_lines(file)
    if file.kind == "json":
        return _read_array(file) if _first_byte(file.name) == b"[" else _read_lines(file)
    if file.kind == "parquet":
        return _read_parquet(file)
    return enumerate(file.dataset, 1)


def count_rows(file: DataFile) -> int | None:
    """How many rows a file has, where it says so itself, else None.

    Raises:
        UserError: a parquet file that can't be read.
    """
    if file.kind == "parquet":
        return _open_parquet(file.name).metadata.num_rows
    return len(file.dataset) if file.kind == "dataset" else None


def _find(name: str) -> list[DataFile]:
    path = Path(name).expanduser()
    if path.is_file():
        return [_data_file(path)]
    if path.is_dir():
        return [_saved_dataset(path)]
    if glob.has_magic(name):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(f"{name}: no file matches this pattern (looked from {Path.cwd()})")
        return [_data_file(Path(match)) for match in matches]
    if looks_local(name) or path.suffix in SUFFIXES or "/" not in name:
        raise UserError(
            f"{name}: no such file or directory (looked from {Path.cwd()}); data is a .jsonl, .json or "
            ".parquet file, a glob, a directory saved by datasets, or a hub id owner/name"
        )
    return [_hub_dataset(name)]


def _data_file(path: Path) -> DataFile:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file '{path.suffix}'; data files end in {', '.join(SUFFIXES)}")
    return DataFile(str(path), SUFFIXES[path.suffix])


def _saved_dataset(path: Path) -> DataFile:
    import datasets  # late: it takes a second, which files of text do without

    if not any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        raise UserError(
            f"{path}: not a directory saved by datasets' save_to_disk; for the files in it give a glob, "
            f"'{path}/*.jsonl'"
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: can't be read as a saved data set: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(
                f"{path}: has no split 'train', only {', '.join(loaded)}; name the directory of one "
                f"split, '{path / next(iter(loaded), 'train')}'"
            )
        loaded = loaded["train"]
    return DataFile(str(path), "dataset", loaded)


def _hub_dataset(name: str) -> DataFile:
    import datasets  # late: it takes a second, which files of text do without

    try:
        return DataFile(name, "dataset", datasets.load_dataset(name, split="train"))
    except Exception as error:  # the hub's client raises errors of many families
        raise UserError(
            f"{name}: no such file or directory (looked from {Path.cwd()}), and as a hub data set with a "
            f"split 'train' it can't be loaded: {error}"
        ) from None


def _first_byte(name: str) -> bytes:
    with open(name, "rb") as handle:
        return handle.read(4096).removeprefix(BOM).lstrip()[:1]


def _read_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    with open(file.name, "rb") as handle:
        for number, line in enumerate(handle, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line


def _read_array(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one JSON array, one in memory at a time. A row's number is that of the line it begins on."""
    decoder = json.JSONDecoder()
    with open(file.name, encoding="utf-8-sig") as handle:
        text, line, allowed = _more(file, handle), 1, "["
        while True:
            rest = text.lstrip(" \t\r\n")
            line += text[: len(text) - len(rest)].count("\n")
            if not rest:
                text = _more(file, handle)
                if not text:
                    raise _broken_array(file, line, "the file ends before its closing ]")
                continue
            if rest[0] not in allowed:
                raise _broken_array(file, line, f"found {rest[0]!r} where one of {allowed!r} must stand")
            if rest[0] == "]":
                return
            if rest[0] == "{":
                row, end, rest = _decode_row(file, handle, decoder, rest, line)
                yield line, row
                line += rest[:end].count("\n")
                text, allowed = rest[end:], ",]"
            else:
                text, allowed = rest[1:], "{]" if rest[0] == "[" else "{"


def _decode_row(
    file: DataFile, handle: Any, decoder: json.JSONDecoder, text: str, line: int
) -> tuple[dict[str, Any], int, str]:
    while True:
        try:
            row, end = decoder.raw_decode(text)
            return row, end, text
        except (ValueError, RecursionError) as error:
            # A row that isn't complete yet and a broken one look alike: read on, twice as much each time.
            more = _more(file, handle, max(len(text), _READ_CHARACTERS)) if len(text) < _LARGEST_ROW else ""
            if not more:
                raise _broken_array(file, line, f"broken JSON in the row that begins here: {error}") from None
            text += more


def _more(file: DataFile, handle: Any, characters: int = _READ_CHARACTERS) -> str:
    try:
        return handle.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8: {error}; save the file as UTF-8") from None


def _broken_array(file: DataFile, line: int, message: str) -> UserError:
    return UserError(f"{file.place(line)}: {message}; mend the file, or write one row a line (.jsonl)")


def _open_parquet(name: str) -> Any:
    # late: files of text do without
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(name)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: can't be read as parquet: {error}") from None


def _read_parquet(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # late: files of text do without

    table, number = _open_parquet(file.name), 0
    try:
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.place(number + 1)}: damaged parquet: {error}") from None
