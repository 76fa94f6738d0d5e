"""Chunks of rows turned into tokenized pairs, in this process or in several."""

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

from minimind_dpo.data.chat import (
    Drop,
    EncodedPair,
    RenderedPair,
    TokenizedPair,
    check_settings,
    encode_rendered,
    find_drop,
    finish_pair,
    hidden_turns,
    render_pair,
)
from minimind_dpo.data.records import RowError, logger, parse_line
from minimind_dpo.data.spans import SpanError

Chunk = list[tuple[int, int, str, bytes | dict[str, Any]]]  # file, row, place, undecoded row
Outcome = TokenizedPair | tuple[Drop, bool]  # why there is no pair, and whether the row is malformed


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how a row is tokenized; part of the cache's key."""

    max_length: int
    completion_mask: str
    on_bad_row: str


def tokenize_chunks(
    chunks: Iterator[Chunk], tokenizer: Any, settings: Settings, processes: int
) -> Iterator[tuple[Chunk, list[Outcome]]]:
    """Chunks and their outcomes, in order, whatever the number of processes."""
    # The first chunk is always done here: small data never pays for processes, and notices are given once.
    worker = ChunkTokenizer(tokenizer, settings)
    for chunk in islice(chunks, 1 if processes > 1 else None):
        yield chunk, worker.outcomes(chunk)
    if processes > 1 and (second := next(chunks, None)):
        workers = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (tokenizer, settings))
        try:
            yield from _in_order(workers, chain([second], chunks), 3 * processes)
        finally:
            workers.shutdown(cancel_futures=True)


def _in_order(workers: Executor, chunks: Iterable[Chunk], most: int) -> Iterator[tuple[Chunk, list[Outcome]]]:
    """Keeps `most` chunks in work: bounded, so that a fast reader doesn't fill the memory."""
    waiting: deque[tuple[Chunk, Future[list[Outcome]]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, workers.submit(_work, chunk)))
        if len(waiting) > most:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


class ChunkTokenizer:
    """Tokenizes chunks of rows; what fails in a row becomes its outcome."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        check_settings(tokenizer, settings.max_length, settings.completion_mask)
        self._tokenizer = tokenizer
        self._settings = settings

    def outcomes(self, chunk: Chunk) -> list[Outcome]:
        """What becomes of each row."""
        rendered = [self._render(payload, place) for _, _, place, payload in chunk]
        pairs = [item for item in rendered if isinstance(item, RenderedPair)]
        encoded = iter(encode_rendered(pairs, self._tokenizer))
        return [self._finish(item, next(encoded)) if isinstance(item, RenderedPair) else item for item in rendered]

    def _render(self, payload: bytes | dict[str, Any], place: str) -> RenderedPair | tuple[Drop, bool]:
        try:
            return render_pair(parse_line(payload, place), self._tokenizer, self._settings.completion_mask)
        except RowError as error:
            return Drop(error.reason, str(error)), True
        except SpanError as error:
            return hidden_turns(place, error), False

    def _finish(self, rendered: RenderedPair, encoded: EncodedPair | RowError) -> Outcome:
        if isinstance(encoded, RowError):
            return Drop(encoded.reason, str(encoded)), True
        tokenized = finish_pair(rendered, encoded, self._settings.max_length)
        drop = find_drop(rendered.pair, tokenized)
        return (drop, False) if drop else tokenized


_worker: ChunkTokenizer | None = None


def _start_worker(tokenizer: Any, settings: Settings) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = ChunkTokenizer(tokenizer, settings)
    logger.setLevel(logging.ERROR)  # the parent has given the notices


def _work(chunk: Chunk) -> list[Outcome]:
    assert _worker is not None
    return _worker.outcomes(chunk)
