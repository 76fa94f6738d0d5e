"""`minimind-dpo data inspect`: one pair as the model sees it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from minimind_dpo.config import read_columns
from minimind_dpo.data.arguments import data_parser
from minimind_dpo.data.chat import TokenizedPair, check_settings, cut, load_tokenizer, shared_prefix_length
from minimind_dpo.data.drops import DroppedRow, encode_whole, find_drop
from minimind_dpo.data.processes import column_names
from minimind_dpo.data.records import PreferencePair, parse_line
from minimind_dpo.data.sources import find_files, read_rows
from minimind_dpo.errors import UserError


def run_inspect(argv: list[str]) -> int:
    """Show the pair that `argv` asks for. Returns the exit code, 0.

    Raises:
        UserError: no such pair, a row that can't be used, or no tokenizer.
    """
    args = _parser().parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    pair = find_pair(args.data, args.index, dict(column_names(read_columns(args.columns))))
    check_settings(tokenizer, args.max_length, args.completion_mask)
    whole = encode_whole(pair, tokenizer, args.completion_mask, args.template_date)
    if isinstance(whole, DroppedRow):
        raise UserError(whole.message)
    drop, tokenized = find_drop(pair, whole, args.max_length), cut(whole, args.max_length)
    if drop is not None:
        print(f"this pair would be dropped ({drop.reason}): {drop.message}", file=sys.stderr)
    if args.json:
        print(json.dumps(describe(tokenized, tokenizer, args.index), ensure_ascii=False))
    else:
        _show(tokenized, tokenizer)
    return 0


def find_pair(source: str | list[str], index: int, columns: Mapping[str, str] | None = None) -> PreferencePair:
    """The pair of row `index` (from 0, blank lines don't count); the rows before it are read and not checked.

    Args:
        source: what `find_files` accepts.
        index: of the row.
        columns: for each of our columns the rows' own name of it, where that is another.

    Raises:
        UserError: there is no such row, or it can't be used.
    """
    rows = 0
    for file in find_files(source):
        for number, payload in read_rows(file):
            if rows == index:
                return parse_line(payload, file.place(number), columns)
            rows += 1
    remedy = f"an index lies between 0 and {rows - 1}" if rows else "there is nothing to inspect"
    raise UserError(f"--index {index}: the data has {rows} rows, {remedy}")


def describe(pair: TokenizedPair, tokenizer: Any, index: int) -> dict[str, Any]:
    """The object that `--json` prints: ids, completion mask and text of both sides, and what they share."""
    sides = {
        name: {"input_ids": ids, "completion_mask": mask, "text": _decode(tokenizer, ids)}
        for name, ids, mask in _sides(pair)
    }
    shared = shared_prefix_length(pair.chosen_input_ids, pair.rejected_input_ids)
    return {"index": index, **sides, "shared_prefix_tokens": shared}


def _show(pair: TokenizedPair, tokenizer: Any) -> None:
    """Print both sides: side by side and in colour in a terminal, else as plain text."""
    if not _wants_colour():
        print(plain_text(pair, tokenizer))
        return
    # late: --json and plain text do without
    from rich.console import Console

    # late: so does what draws with it
    from minimind_dpo.data.side_by_side import side_by_side

    console = Console(highlight=False)
    console.print(side_by_side(pair, tokenizer, console.width))


def plain_text(pair: TokenizedPair, tokenizer: Any) -> str:
    """Both sides as text, one after the other, completion tokens between « and »."""
    blocks = []
    for name, ids, mask in _sides(pair):
        text = ""
        for counts, run in groupby(zip(mask, ids, strict=True), key=lambda item: item[0]):
            words = _decode(tokenizer, [token for _, token in run])
            text += f"«{words}»" if counts else words
        blocks.append(f"== {name}: {len(ids)} tokens, {sum(mask)} count ==\n{text.rstrip()}")
    shared = shared_prefix_length(pair.chosen_input_ids, pair.rejected_input_ids)
    blocks.append(f"{pair.place}: the two sides share their first {shared} tokens")
    return "\n\n".join(blocks)


def _sides(pair: TokenizedPair) -> list[tuple[str, list[int], list[int]]]:
    return [
        ("chosen", pair.chosen_input_ids, pair.chosen_completion_mask),
        ("rejected", pair.rejected_input_ids, pair.rejected_completion_mask),
    ]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _index(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = data_parser(
        "data inspect", "Show one preference pair as the model sees it: token ids, completion mask, shared prefix."
    )
    parser.add_argument("--index", type=_index, default=0, help="which row, from 0 (default 0)")
    return parser
