"""Rows of a file as a stream, whatever its kind: lines, a JSON array, a table. None is lost without a word."""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minimind_dpo.data.json_text import RowError
from minimind_dpo.errors import UserError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = ".gz"
BOM = b"\xef\xbb\xbf"
_READ_CHARACTERS = 1 << 18
_LARGEST_ROW = 1 << 28  # characters; a JSON array whose row doesn't close within this is taken to be broken
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}"]', re.DOTALL)
_NUMBERS = ("weight", "margin")

Payload = bytes | dict[str, Any] | RowError


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file, or one data set of the `datasets` library; `kind` is jsonl, json, csv, parquet or dataset.

    `weight` is how often its pairs come in an epoch; `source` counts the sources of a mixture from 0.
    """

    name: str
    kind: str
    dataset: Any = field(default=None, repr=False)
    weight: float = 1.0
    source: int = 0

    def place(self, row: int) -> str:
        """Where row `row` stands: a line of a text file, a row of a table; both count from 1."""
        return f"{self.name}:{row}" if self.kind in ("jsonl", "json") else f"{self.name}:row {row}"

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed by gzip."""
        return self.dataset is None and self.name.endswith(PACKED)


def kind_of(path: Path) -> str | None:
    """The kind of a data file by its name, None of any other file."""
    name = Path(path.stem) if path.suffix == PACKED else path
    kind = SUFFIXES.get(name.suffix)
    return None if kind == "parquet" and name is not path else kind


def read_rows(file: DataFile) -> Iterator[tuple[int, Payload]]:
    """A stream of `(row number from 1, undecoded line or row)`; blank lines are left out, yet have a number.

    In the place of a row whose columns can't be told stands the error that says so.

    Raises:
        UserError: the file is damaged in a way that hides where the next row begins.
    """
    if file.kind == "jsonl":
        return _read_lines(file)
    if file.kind == "json":
        return _read_array(file) if _first_byte(file) == b"[" else _read_lines(file)
    if file.kind == "csv":
        return _read_csv(file)
    if file.kind == "parquet":
        return _read_parquet(file)
    return enumerate(_undecoded(file.dataset), 1)


def _undecoded(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set as they are stored: pictures, which no text needs, are not opened."""
    for table in dataset.with_format("arrow").iter(batch_size=256):
        yield from table.to_pylist()


def count_rows(file: DataFile) -> int | None:
    """How many rows a file has, where it says so itself, else None.

    Raises:
        UserError: a parquet file that can't be read.
    """
    if file.kind == "parquet":
        return _open_parquet(file.name).metadata.num_rows
    return len(file.dataset) if file.kind == "dataset" else None


@contextmanager
def _opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked.

    Raises:
        UserError: the file is not what gzip packed, or not all of it.
    """
    with gzip.open(file.name) if file.is_packed else open(file.name, "rb") as handle:
        try:
            yield handle  # type: ignore[misc]
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{file.name}: damaged or cut gzip file: {error}") from None


def _first_byte(file: DataFile) -> bytes:
    with _opened(file) as handle:
        return handle.read(4096).removeprefix(BOM).lstrip()[:1]


def _read_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    with _opened(file) as handle:
        for number, line in enumerate(handle, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line


def _read_array(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The rows of one JSON array, one in memory at a time. A row's number is that of the line it begins on."""
    with _opened(file) as bytes_, io.TextIOWrapper(bytes_, encoding="utf-8-sig", newline="") as handle:
        text, line, allowed = _more(file, handle), 1, "["
        while True:
            rest = text.lstrip(" \t\r\n")
            line += text[: len(text) - len(rest)].count("\n")
            if not rest:
                text = _more(file, handle)
                if not text and allowed:
                    raise _broken_array(file, line, "the file ends before its closing ]")
                if not text:
                    return
                continue
            if not allowed:
                raise _broken_array(file, line, f"found {rest[0]!r} after the closing ]")
            if rest[0] not in allowed:
                raise _broken_array(file, line, f"found {rest[0]!r} where one of {allowed!r} must stand")
            if rest[0] == "{":
                end, rest = _row_end(file, handle, rest, line)
                yield line, rest[:end].encode()
                line += rest[:end].count("\n")
                text, allowed = rest[end:], ",]"
            else:
                text, allowed = rest[1:], {"[": "{]", ",": "{", "]": ""}[rest[0]]


def _row_end(file: DataFile, handle: Any, text: str, line: int) -> tuple[int, str]:
    """Where the object ends with which `text` begins, and the text, of which more may have been read for it."""
    depth = position = 0
    while True:
        for token in _BRACKETS.finditer(text, position):
            mark = token.group()
            if mark == '"':  # a string that goes on behind what was read
                break
            position = token.end()
            depth += (mark in "{[") - (mark in "}]")
            if not depth:
                return position, text
        # Twice as much each time: a long string is looked at again.
        more = _more(file, handle, max(len(text), _READ_CHARACTERS)) if len(text) < _LARGEST_ROW else ""
        if not more:
            raise _broken_array(file, line, "broken JSON: the row that begins here is not closed")
        text += more


def _more(file: DataFile, handle: Any, characters: int = _READ_CHARACTERS) -> str:
    try:
        return handle.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: not UTF-8: {error}; save the file as UTF-8") from None


def _broken_array(file: DataFile, line: int, message: str) -> UserError:
    return UserError(f"{file.place(line)}: {message}; mend the file, or write one row a line (.jsonl)")


def _read_csv(file: DataFile) -> Iterator[tuple[int, Payload]]:
    """The rows under a line of column names; they are all text, but for the columns that are numbers."""
    csv.field_size_limit(sys.maxsize)
    with _opened(file) as bytes_, io.TextIOWrapper(bytes_, encoding="utf-8-sig", newline="") as handle:
        number = 0
        try:
            reader = csv.reader(handle, strict=True)
            names = next(reader, [])
            _check_names(file, names)
            for number, fields in enumerate(filter(None, reader), 1):
                yield number, _csv_row(names, fields, file.place(number))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file.place(number + 1)}: damaged csv: {error}") from None


def _check_names(file: DataFile, names: list[str]) -> None:
    """Refuse a name that two columns have; spreadsheets leave columns without one."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{file.name}: has several columns {', '.join(map(repr, twice))}; rename all but one of each")


def _csv_row(names: list[str], fields: list[str], place: str) -> dict[str, Any] | RowError:
    if len(fields) != len(names):  # which of them is which can't be told
        return RowError("wrong_keys", f"{place}: {len(fields)} fields under {len(names)} names; quote what has commas")
    return {name: _csv_value(name, field) for name, field in zip(names, fields, strict=True)}


def _csv_value(name: str, value: Any) -> Any:
    if name not in _NUMBERS:
        return value
    try:
        return float(value) if value else None
    except (TypeError, ValueError):
        return value


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
    _check_names(file, table.schema_arrow.names)
    try:
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.place(number + 1)}: damaged parquet: {error}") from None
