"""Blocks of rows turned into tokenized pairs, in this process or in several."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

from minimind_dpo.config import TEMPLATE_DATE
from minimind_dpo.data.chat import DroppedRow, TokenizedPair, tokenize_pair
from minimind_dpo.data.records import RowError, logger, parse_line
from minimind_dpo.data.split import Split

RowBlock = list[tuple[int, int, str, bytes | dict[str, Any]]]  # file, row, place, undecoded row


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how a row is tokenized; part of the cache's key."""

    max_length: int
    completion_mask: str
    on_bad_row: str
    template_date: str = TEMPLATE_DATE
    columns: tuple[tuple[str, str], ...] = ()  # ours and the row's name of it
    split: Split | None = None


def tokenize_blocks(
    blocks: Iterator[RowBlock], tokenizer: Any, settings: Settings, processes: int
) -> Iterator[tuple[RowBlock, list[TokenizedPair | DroppedRow | None]]]:
    """Each block with what became of its rows, in order, whatever the number of processes.

    Raises:
        UserError: no row at all can be tokenized with this tokenizer or these settings.
    """
    # The first block is always done here: small data never pays for processes, and notices are given once.
    for block in islice(blocks, 1 if processes > 1 else None):
        yield block, tokenize_block(block, tokenizer, settings)
    if processes > 1 and (second := next(blocks, None)):
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (tokenizer, settings))
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
    payload: bytes | dict[str, Any], place: str, tokenizer: Any, settings: Settings
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


def _in_order(
    pool: Executor, blocks: Iterable[RowBlock], most: int
) -> Iterator[tuple[RowBlock, list[TokenizedPair | DroppedRow | None]]]:
    """Keep `most` blocks in work: bounded, so that a fast reader doesn't fill the memory."""
    pending: deque[tuple[RowBlock, Future[list[TokenizedPair | DroppedRow | None]]]] = deque()
    for block in blocks:
        pending.append((block, pool.submit(_tokenize_here, block)))
        if len(pending) > most:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


_started_with: tuple[Any, Settings] | None = None  # in a process of the pool: its tokenizer and settings


def _start(tokenizer: Any, settings: Settings) -> None:
    global _started_with
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _started_with = tokenizer, settings
    logger.setLevel(logging.ERROR)  # the parent has given the notices


def _tokenize_here(block: RowBlock) -> list[TokenizedPair | DroppedRow | None]:
    assert _started_with is not None
    return tokenize_block(block, *_started_with)
