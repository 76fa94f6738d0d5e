"""Preference data as a memory-mapped table of tokens, made once for each content, with a count of what is left out."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from minimind_dpo.config import BAD_ROW_POLICIES, TEMPLATE_DATE
from minimind_dpo.data import cache
from minimind_dpo.data.chat import TokenizedPair, check_settings, load_tokenizer
from minimind_dpo.data.contents import FileDigest, digest_file
from minimind_dpo.data.processes import Settings, column_names, row_blocks, tokenize_blocks, worthwhile_processes
from minimind_dpo.data.records import RowError, logger
from minimind_dpo.data.rows import DataFile, count_rows, read_rows
from minimind_dpo.data.sources import Source, find_files
from minimind_dpo.data.split import Split, mixture, split_limit
from minimind_dpo.engine.console import Progress
from minimind_dpo.engine.cpu import available_cores
from minimind_dpo.errors import UserError

__all__ = ["DropReport", "TokenizedData", "load_tokenizer", "tokenize_files"]


@dataclass(slots=True)
class DropReport:
    """What became of the rows: how many were read and kept, and per reason how many dropped and where the first."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"kept {self.kept} of {self.rows} pairs"
        reasons = sorted(self.dropped, key=lambda reason: -self.dropped[reason])
        counts = [f"{self.dropped[reason]} {reason} (first: {self.examples[reason]})" for reason in reasons]
        return f"{text}; dropped {self.rows - self.kept}: {', '.join(counts)}" if counts else text


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Tokenized pairs in file order.

    `dataset` is a memory-mapped `datasets.Dataset`; its rows have `chosen_input_ids`, `chosen_completion_mask`,
    `rejected_input_ids`, `rejected_completion_mask`, `weight`, `margin`, `id`, `tokens` and `place`. `digest` is the
    sha256 of all ids, masks, weights and margins in order: the same content under another path has the same digest.
    `tokens` [N] (int32) are the input tokens of each pair with the shared prefix stored once.
    """

    dataset: Any
    tokens: np.ndarray
    digest: str
    report: DropReport

    def __len__(self) -> int:
        return len(self.dataset)


def tokenize_files(
    source: Source | Sequence[Source],
    tokenizer: Any,
    *,
    max_length: int,
    completion_mask: str,
    on_bad_row: str,
    template_date: str = TEMPLATE_DATE,
    columns: Sequence[str] = (),
    eval_split: float | None = None,
    held_out: bool = False,
    num_proc: int | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> TokenizedData:
    """The tokenized pairs of a source, made now or taken from the cache of an earlier call.

    The cache lies in `$MINIMIND_DPO_CACHE` (default `~/.cache/minimind_dpo`) and is addressed by content: the files'
    bytes, the tokenizer and the settings. Memory use doesn't grow with the number of pairs.

    Args:
        source: what `find_files` accepts: file, glob, directory, hub id, a mixture, or a list of them.
        tokenizer: a fast tokenizer of transformers.
        max_length, completion_mask, template_date: as in `tokenize_pair`.
        on_bad_row: `fail` raises at the first row that is malformed or has no signal, `drop` drops and counts both,
            `auto` raises at malformed rows and drops those without signal.
        columns: `prompt=question`: which of the rows' columns is meant by one of ours.
        eval_split: the part of the prompts, or number of pairs, that is held out by a hash of the prompt.
        held_out: whether the pairs held out are wanted, or the others, with their sources' weights.
        num_proc: processes to tokenize with; by default as many as the data's size makes worthwhile. More than one
            start afresh (spawn), so a script that asks for them needs the `if __name__ == "__main__"` guard.
        go_on: called every now and then; what it raises ends the work, and nothing is left of it.

    Raises:
        RowError: a row that `on_bad_row` doesn't let pass; the message names its place.
        UserError: no data, no usable pair, or wrong settings.
    """
    if on_bad_row not in BAD_ROW_POLICIES:
        raise UserError(f"on_bad_row must be one of {', '.join(BAD_ROW_POLICIES)}, not '{on_bad_row}'")
    check_settings(tokenizer, max_length, completion_mask)
    files = tuple(find_files(source))
    names = column_names(columns)
    split = None if eval_split is None else Split(held_out, split_limit(eval_split, files, dict(names)))
    settings = Settings(max_length, completion_mask, on_bad_row, template_date, names, split)
    data = _tokenized(files, tokenizer, settings, num_proc, go_on)
    return data if held_out or all(file.weight == 1 for file in files) else _mixed(data, files)


def _tokenized(
    files: tuple[DataFile, ...], tokenizer: Any, settings: Settings, num_proc: int | None, go_on: Callable[[], None]
) -> TokenizedData:
    content = [digest_file(file) for file in files]
    path = cache.entry_path(cache.key_of([digest.sha256 for digest in content], tokenizer, settings))
    if (found := cache.open_entry(path)) is None:
        processes = num_proc or worthwhile_processes(sum(digest.size for digest in content), available_cores())
        rows = _total_rows(files, content)
        with cache.write_entry(path) as writer:
            _tokenize_into(writer, files, tokenizer, settings, processes, rows, go_on)
        found = cache.open_entry(path)
        assert found is not None
    dataset, meta = found
    report = _report(meta, files)
    if _is_first_rank():
        logger.log(logging.WARNING if report.dropped else logging.INFO, "%s", report)
        if settings.split is None:
            _notice_empty(files, dataset.data["file"].to_numpy())
    # The cache keeps numbers; the names are those of the files in use now, which may have moved.
    dataset = dataset.with_transform(partial(_add_places, tuple(replace(file, dataset=None) for file in files)))
    return TokenizedData(dataset, dataset.data["tokens"].to_numpy(), meta["digest"], report)


def _mixed(data: TokenizedData, files: tuple[DataFile, ...]) -> TokenizedData:
    """Each source's pairs as often as its weight says."""
    weights = {file.source: file.weight for file in files}
    sources = np.asarray([file.source for file in files])[data.dataset.data["file"].to_numpy()]
    taken = mixture(sources, [weights[source] for source in range(len(weights))])
    if not len(taken):
        raise UserError(f"no pair is left of {', '.join(file.name for file in files)} with these weights")
    digest = hashlib.sha256(data.digest.encode() + taken.tobytes()).hexdigest()
    return TokenizedData(data.dataset.select(taken, keep_in_memory=True), data.tokens[taken], digest, data.report)


def _tokenize_into(
    writer: cache.TableWriter,
    files: tuple[DataFile, ...],
    tokenizer: Any,
    settings: Settings,
    processes: int,
    rows: int | None,
    go_on: Callable[[], None],
) -> None:
    stream = (
        (number, row, file.place(row), payload) for number, file in enumerate(files) for row, payload in read_rows(file)
    )
    with Progress("tokenizing", "pairs", rows, _is_first_rank()) as progress:
        for block, tokenized in tokenize_blocks(row_blocks(stream), tokenizer, settings, processes):
            go_on()
            for (file, row, _, _), pair in zip(block, tokenized, strict=True):
                if pair is None:
                    continue
                if isinstance(pair, TokenizedPair):
                    writer.add(pair, file, row)
                elif settings.on_bad_row == "fail" or (pair.malformed and settings.on_bad_row == "auto"):
                    raise RowError(pair.reason, f"{pair.message} (on_bad_row: drop leaves such rows out)")
                else:
                    writer.drop(pair.reason, file, row)
            progress.update(len(block))
    report = _report(writer.meta(), files)
    if not report.kept:
        names = ", ".join(file.name for file in files)
        if settings.split is not None and not report.rows:
            part = "held out" if settings.split.held_out else "left to train on"
            raise UserError(f"eval_split: no pair of {names} is {part}; give a number of pairs, or other data")
        raise UserError(f"no usable pair in {names}: {report}")


def _notice_empty(files: tuple[DataFile, ...], kept: np.ndarray) -> None:
    """Say which of several files gave nothing; `kept` [N] has the file of each pair."""
    if empty := [files[number].name for number in np.setdiff1d(np.arange(len(files)), kept)]:
        logger.warning("no pair comes from %s", ", ".join(empty))


def _add_places(files: tuple[DataFile, ...], batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if "row" not in batch:  # single columns are asked for
        return batch
    numbers = zip(batch.pop("file"), batch.pop("row"), strict=True)
    return batch | {"place": [files[file].place(row) for file, row in numbers]}


def _report(meta: dict[str, Any], files: tuple[DataFile, ...]) -> DropReport:
    examples = {reason: files[file].place(row) for reason, (file, row) in meta["examples"].items()}
    return DropReport(rows=meta["rows"], kept=meta["kept"], dropped=dict(meta["dropped"]), examples=examples)


def _total_rows(files: tuple[DataFile, ...], content: list[FileDigest]) -> int | None:
    """Rows to expect, for the progress bar; None where only reading would tell."""
    counts = [
        digest.lines if file.kind == "jsonl" and not file.is_packed else count_rows(file)
        for file, digest in zip(files, content, strict=True)
    ]
    return None if None in counts else sum(count for count in counts if count is not None)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
