"""Kept pairs' rows as they were written: their other columns, and the messages of their prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from minimind_dpo.data.json_text import load_json
from minimind_dpo.data.processes import column_names
from minimind_dpo.data.records import PreferencePair, parse_line
from minimind_dpo.data.rows import BOM, DataFile
from minimind_dpo.data.sources import Source, find_files, read_rows
from minimind_dpo.data.tokenized import TokenizedData
from minimind_dpo.errors import UserError

SOURCE = "source"  # where rows have no such column: the file that they come from


def column_values(source: Sequence[Source], data: TokenizedData, column: str) -> list[str]:
    """The value of a column for each pair of `data`, [N], as text; `none` where a row has none.

    Args:
        source: that `data` was made of.
        data: not a mixture.
        column: by the rows' own name; `source` is the file where rows have none of that name.

    Raises:
        UserError: no row has it.
    """
    values: list[Any] = []
    seen: set[str] = set()
    files: list[str] = []
    for file, _, payload in _kept_rows(source, data):
        row = payload if isinstance(payload, dict) else load_json(payload.removeprefix(BOM).decode("utf-8"), file.name)
        seen |= row.keys()
        values.append(row.get(column))
        files.append(file.name)
    if column not in seen and column == SOURCE:
        return files
    if column not in seen:
        raise UserError(f"--by {column}: no row has this column; they have {', '.join(sorted(seen))}")
    return [_text(value) for value in values]


def kept_pairs(
    source: Sequence[Source], data: TokenizedData, columns: Sequence[str], most: int
) -> Iterator[PreferencePair]:
    """The first `most` pairs of `data` with their messages; `source` and `columns` are what it was made of."""
    names = dict(column_names(columns))
    for count, (file, number, payload) in enumerate(_kept_rows(source, data)):
        if count == most:
            return
        yield parse_line(payload, file.place(number), names)


def _kept_rows(source: Sequence[Source], data: TokenizedData) -> Iterator[tuple[DataFile, int, Any]]:
    """The undecoded row of each pair of `data`, in its order."""
    table = data.dataset.data
    wanted = set(zip(table["file"].to_pylist(), table["row"].to_pylist(), strict=True))
    for number, file in enumerate(find_files(source)):
        for row, payload in read_rows(file):
            if (number, row) in wanted:
                yield file, row, payload


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
