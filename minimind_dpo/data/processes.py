"""Blocks of rows turned into tokenized pairs or into findings, in this process or in several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from minimind_dpo.config import TEMPLATE_DATE
from minimind_dpo.data.chat import TokenizedPair
from minimind_dpo.data.drops import DroppedRow, tokenize_pair
from minimind_dpo.data.records import RowError, logger, parse_line
from minimind_dpo.data.rows import Payload
from minimind_dpo.data.split import Split
from minimind_dpo.ending import STOP_SIGNALS

Row = tuple[int, int, str, Any]  # file, row, place, undecoded row: a `Payload`
RowBlock = list[Row]
Result = TypeVar("Result")

_ROWS_PER_BLOCK = 128
_BYTES_PER_PROCESS = 6 << 20  # smaller data is nearly done when a second process has started (3 s)


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how a row is tokenized; part of the cache's key."""

    max_length: int
    completion_mask: str
    on_bad_row: str
    template_date: str = TEMPLATE_DATE
    columns: tuple[tuple[str, str], ...] = ()  # ours and the row's name of it
    split: Split | None = None


def column_names(columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`prompt=question` texts as pairs: one of our columns, and the rows' own name of it."""
    return tuple((ours, theirs) for ours, _, theirs in (column.partition("=") for column in columns))


def row_blocks(rows: Iterator[Row]) -> Iterator[RowBlock]:
    """A stream of rows in blocks, each the work of one call."""
    while block := list(islice(rows, _ROWS_PER_BLOCK)):
        yield block


def worthwhile_processes(size: int, cores: int) -> int:
    """How many processes `size` bytes of rows are worth."""
    return max(1, min(cores, 16, size // _BYTES_PER_PROCESS))


def tokenize_blocks(
    blocks: Iterator[RowBlock], tokenizer: Any, settings: Settings, processes: int
) -> Iterator[tuple[RowBlock, list[TokenizedPair | DroppedRow | None]]]:
    """Each block with what became of its rows, in order, whatever the number of processes.

    Raises:
        UserError: no row at all can be tokenized with this tokenizer or these settings.
    """
    return map_blocks(blocks, partial(tokenize_block, tokenizer=tokenizer, settings=settings), processes)


def map_blocks(
    blocks: Iterator[RowBlock], work: Callable[[RowBlock], Result], processes: int
) -> Iterator[tuple[RowBlock, Result]]:
    """Each block with what `work` makes of it, in order, whatever the number of processes.

    Args:
        blocks: of rows.
        work: a function that can be pickled; each process gets it once.
        processes: how many; more than one start afresh (spawn).
    """
    # The first block is always done here: small data never pays for processes, and notices are given once.
    for block in islice(blocks, 1 if processes > 1 else None):
        yield block, work(block)
    if processes > 1 and (second := next(blocks, None)):
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (work,))
        try:
            yield from _in_order(pool, chain([second], blocks), 3 * processes)
        finally:
            pool.shutdown(cancel_futures=True)


def tokenize_block(block: RowBlock, tokenizer: Any, settings: Settings) -> list[TokenizedPair | DroppedRow | None]:
    """What becomes of each row of a block; None of one that belongs to the other part of divided data.

    Raises:
        UserError: no row at all can be tokenized with this tokenizer or these settings.
    """
    return [_tokenize_row(payload, place, tokenizer, settings) for _, _, place, payload in block]


def _tokenize_row(
    payload: Payload, place: str, tokenizer: Any, settings: Settings
) -> TokenizedPair | DroppedRow | None:
    try:
        pair = parse_line(payload, place, dict(settings.columns))
    except RowError as error:
        # It belongs to neither part; the one for training speaks of it.
        other = settings.split is not None and settings.split.held_out
        return None if other else DroppedRow(error.reason, str(error), malformed=True)
    if settings.split is not None and not settings.split.has(pair):
        return None
    try:
        return tokenize_pair(
            pair,
            tokenizer,
            max_length=settings.max_length,
            completion_mask=settings.completion_mask,
            template_date=settings.template_date,
        )
    except RowError as error:
        return DroppedRow(error.reason, str(error), malformed=True)


def _in_order(pool: Executor, blocks: Iterable[RowBlock], most: int) -> Iterator[tuple[RowBlock, Any]]:
    """Keep `most` blocks in work: bounded, so that a fast reader doesn't fill the memory."""
    pending: deque[tuple[RowBlock, Future[Any]]] = deque()
    for block in blocks:
        pending.append((block, pool.submit(_work_here, block)))
        if len(pending) > most:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


_work: Callable[[RowBlock], Any] | None = None  # in a process of the pool: what it does with a block


def _start(work: Callable[[RowBlock], Any]) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in STOP_SIGNALS:  # Ctrl-C reaches all processes of a terminal; the parent answers it
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _work = work
    logger.setLevel(logging.ERROR)  # the parent has given the notices


def _leave_with_parent() -> None:
    """End this process when its parent is gone, killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_here(block: RowBlock) -> Any:
    assert _work is not None
    return _work(block)
