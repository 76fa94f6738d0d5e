"""Reference log-probabilities: scored live beside the policy, or once and read back from a cache on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minimind_dpo.data.batch import PairBatch, pair_key
from minimind_dpo.data.cache import cache_root
from minimind_dpo.engine import whole
from minimind_dpo.errors import StoppedEarly, UserError
from minimind_dpo.scoring import PairLayout, PairScorer

logger = logging.getLogger(__name__)

Autocast = Callable[[], AbstractContextManager[Any]]

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logps", pa.list_(pa.float32()))])
_CHUNK_PAIRS = 256


class Reference(Protocol):
    """Where reference log-probabilities come from."""

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """[M] log-probabilities (nats) of the counted tokens of `batch`, in its canonical order, no gradient."""
        ...


class LiveReference:
    """A frozen model that scores every batch beside the policy, made ready by `engine.freeze`."""

    def __init__(self, scorer: nn.Module, autocast: Autocast):
        self.scorer = scorer
        self.autocast = autocast

    @torch.no_grad()
    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Score the batch with the frozen model."""
        with self.autocast():
            return self.scorer(batch).per_token_logps


class AdapterReference:
    """The policy itself with its adapters switched off."""

    def __init__(self, scorer: PairScorer, autocast: Autocast):
        self.scorer = scorer
        self.autocast = autocast

    @torch.no_grad()
    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Score the batch with the policy's base model."""
        training = self.scorer.training
        self.scorer.eval()
        self.scorer.model.disable_adapters()
        try:
            with self.autocast():
                return self.scorer(batch).per_token_logps
        finally:
            self.scorer.model.enable_adapters()
            self.scorer.train(training)


def reference_digest(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """sha256 of a model's configuration and weights (names, types, shapes, bytes), whatever path they came from.

    Args:
        model: whole or sharded; if sharded, every rank must call this.
        dtype: the type that the engine rounds all weights to before it computes with them, if it does.
    """
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with whole([tensor]):
            values = tensor.detach().to(dtype or tensor.dtype).cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_directory(digest: str, numerics: dict[str, Any]) -> Path:
    """Where the log-probabilities of one reference under given numeric settings lie.

    Args:
        digest: of the reference (`reference_digest`).
        numerics: settings that change the numbers: precision, layout, device type.
    """
    settings = hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()
    return cache_root() / "reference" / f"{digest[:32]}-{settings[:8]}"


class ReferenceCache:
    """Log-probabilities by pair content: one Arrow file a chunk of pairs, each written aside and renamed.

    A chunk is a fixed group of pairs, scored as a whole or not at all, so the numbers do not depend on where an
    earlier fill was interrupted, nor on the number of ranks.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._keys = np.zeros(0, dtype="S16")
        self._columns: list[pa.ChunkedArray] = []
        self._where = np.zeros((0, 2), dtype=np.int32)  # of each key: its column and the row in it
        self.refresh()

    def refresh(self) -> None:
        """Index every chunk on disk; files are memory-mapped, not read. A damaged chunk is set aside."""
        keys: list[np.ndarray] = []
        columns: list[pa.ChunkedArray] = []
        where: list[np.ndarray] = []
        for path in sorted(self.directory.glob("*.arrow")):
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                chunk_keys = np.frombuffer(b"".join(table["key"].to_pylist()), dtype="V16")
            except (pa.ArrowInvalid, OSError, KeyError) as error:
                logger.warning("reference cache: %s is damaged (%s) and will be computed again", path, error)
                path.unlink(missing_ok=True)
                continue
            keys.append(chunk_keys)
            where.append(np.stack(
                [np.full(len(chunk_keys), len(columns)), np.arange(len(chunk_keys))], axis=1).astype(np.int32))
            columns.append(table["logps"])
        flat = np.concatenate(keys) if keys else np.zeros(0, dtype="V16")
        self._keys, first = np.unique(_sortable(flat), return_index=True)
        self._columns = columns
        self._where = np.concatenate(where)[first] if where else self._where[:0]

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def _find(self, key: bytes) -> int | None:
        wanted = _sortable(np.frombuffer(key, dtype="V16"))
        index = int(np.searchsorted(self._keys, wanted[0]))
        return index if index < len(self._keys) and self._keys[index] == wanted[0] else None

    def get(self, key: bytes) -> np.ndarray:
        """The per-token log-probabilities of one pair, float32, chosen then rejected.

        Raises:
            KeyError: the pair was never scored.
        """
        index = self._find(key)
        if index is None:
            raise KeyError(key.hex())
        column, row = self._where[index]
        return self._columns[column][int(row)].values.to_numpy(zero_copy_only=False)

    def write_chunk(self, keys: Sequence[bytes], logps: Sequence[np.ndarray]) -> None:
        """Store one chunk atomically under a name made of its keys."""
        table = pa.table({"key": list(keys), "logps": [row.astype(np.float32) for row in logps]}, schema=_SCHEMA)
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        partial = self.directory / f".{name}.{os.getpid()}.partial"
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(table)
        descriptor = os.open(partial, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(partial, self.directory / f"{name}.arrow")


def _sortable(keys: np.ndarray) -> np.ndarray:
    """Keys as fixed-length bytes that numpy can order (it drops trailing zeros alike on both sides)."""
    return keys.view("S16")


class CachedReference:
    """Reads every pair's log-probabilities from a filled cache."""

    def __init__(self, cache: ReferenceCache):
        self.cache = cache

    def per_token_logps(self, batch: PairBatch) -> Tensor:
        """Look the batch's pairs up."""
        try:
            logps = np.concatenate([self.cache.get(key) for key in batch.keys])
        except KeyError as error:
            raise UserError(
                f"reference cache: {self.cache.directory} lacks pair {error}, although it was filled. Was a file of "
                "it removed? On several nodes MINIMIND_DPO_CACHE must name a directory that all of them share"
            ) from None
        return torch.from_numpy(logps).to(batch.input_ids.device)


class CacheFiller:
    """Scores pairs into a cache, chunks dealt out to the ranks in turn.

    Args:
        cache: to fill.
        scorer: of the reference, ready for forward passes.
        layout: of its batches.
        accelerator: of the run.
        batch_size: pairs a forward pass.
        together: a forward pass needs all ranks; those with nothing left to score then repeat a batch.
    """

    def __init__(self, cache: ReferenceCache, scorer: nn.Module, layout: PairLayout, accelerator: Accelerator,
                 batch_size: int, together: bool):
        self.cache, self.scorer, self.layout = cache, scorer, layout
        self.accelerator, self.batch_size, self.together = accelerator, batch_size, together

    @torch.no_grad()
    def fill(self, needed: Sequence[tuple[Any, Sequence[int]]], stop: Callable[[], bool]) -> None:
        """Score what the cache lacks; every rank must call it.

        Args:
            needed: tokenised datasets with the positions that will be looked up.
            stop: asked before each chunk whether to end early.

        Raises:
            StoppedEarly: `stop` said so on any rank; finished chunks are kept.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        chunks = [chunk for dataset, positions in needed for chunk in _chunks(dataset, positions)]
        rounds = tqdm(range(0, len(chunks), world_size), desc="reference log-probabilities", unit="chunk",
                      unit_scale=world_size, disable=not self.accelerator.is_main_process)
        for first in rounds:
            if self._any(stop()):  # also keeps the ranks in step, so that none waits longer than a chunk takes
                raise StoppedEarly("while computing reference log-probabilities")
            rows, complete = [], True
            if first + rank < len(chunks):
                dataset, positions = chunks[first + rank]
                rows = [dataset[int(position)] for position in positions]
                complete = all(pair_key(row) in self.cache for row in rows)
            if self.together and self._any(not complete):
                dataset, positions = chunks[first]
                longest = max(len(chunk) for _, chunk in chunks[first : first + world_size])
                self._score(rows or [dataset[int(positions[0])]], math.ceil(longest / self.batch_size),
                            keep=not complete)
            elif not complete:
                self._score(rows, 0, keep=True)
        self.accelerator.wait_for_everyone()
        self.cache.refresh()

    def _any(self, flag: bool) -> bool:
        count = self.accelerator.reduce(torch.tensor(int(flag), device=self.accelerator.device), "sum")
        return bool(count > 0)

    def _score(self, rows: list[dict[str, Any]], passes: int, keep: bool) -> None:
        """Score one chunk, in at least `passes` forward passes, and write it to the cache if it is to be kept."""
        logps: list[np.ndarray] = []
        starts = list(range(0, len(rows), self.batch_size))
        for index in range(max(len(starts), passes)):
            start = starts[min(index, len(starts) - 1)]
            batch = self.layout(rows[start : start + self.batch_size]).to(self.accelerator.device)
            with self.accelerator.autocast():
                per_token_logps = self.scorer(batch).per_token_logps.float().cpu()
            if index < len(starts):
                sides = [part.numpy() for part in per_token_logps.split(batch.side_sizes)]
                logps += [np.concatenate(pair) for pair in zip(sides[::2], sides[1::2], strict=True)]
        if keep:
            self.cache.write_chunk([pair_key(row) for row in rows], logps)


def _chunks(dataset: Any, positions: Sequence[int]) -> list[tuple[Any, Sequence[int]]]:
    """Chunks of fixed size of the pairs at `positions`: the dataset and the positions in it, nothing read yet."""
    return [(dataset, positions[start : start + _CHUNK_PAIRS]) for start in range(0, len(positions), _CHUNK_PAIRS)]
