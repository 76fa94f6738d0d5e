"""The reference cache: interrupted anywhere, merged, damaged, shared, and found again by content."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers_model import random_row, tiny_model
from torch import nn

from minimind_dpo.config import TrainConfig
from minimind_dpo.data.batch import pack_pairs, pair_key
from minimind_dpo.data.order import MicroBatch, StepPlan
from minimind_dpo.data.tokenized import DropReport, TokenizedData
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.errors import StoppedEarly, UserError
from minimind_dpo.objective.layout import PACKED
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.reference import cache as reference_cache
from minimind_dpo.reference import filling
from minimind_dpo.reference.cache import Needed, ReferenceCache
from minimind_dpo.reference.filling import CacheFiller, split_by_tokens
from minimind_dpo.reference.sources import CachedReference, LiveReference
from minimind_dpo.training.batches import load_steps

PAIRS, CHUNK = 23, 4  # six chunks, the last of three pairs


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 pairs, files of 2 chunks, batches of at most 60 tokens."""
    monkeypatch.setattr(reference_cache, "CHUNK_PAIRS", CHUNK)
    monkeypatch.setattr(reference_cache, "MERGED_CHUNKS", 2)
    monkeypatch.setattr(filling, "MERGED_CHUNKS", 2)
    monkeypatch.setattr(filling.split_by_tokens, "__defaults__", (60,))


class Scorer(nn.Module):
    """A tiny model's scorer that counts the pairs it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PairScorer(tiny_model("llama")).eval()
        self.scored = 0

    def forward(self, batch: Any) -> Any:
        self.scored += len(batch)
        return self.inner(batch)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


def make_data(seed: int = 0, pairs: int = PAIRS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = np.random.Generator(np.random.PCG64(seed)).integers(1, 12, (pairs, 3)).tolist()
    return [
        random_row(generator, prefix=prefix, chosen=chosen, rejected=rejected, mask="final_turn")
        for prefix, chosen, rejected in sizes
    ]


def needed(rows: list[dict[str, Any]], positions: Sequence[int] | None = None) -> Needed:
    digest = b"".join(map(pair_key, rows)).hex()
    data = TokenizedData(Dataset.from_list(rows), np.zeros(len(rows)), digest, DropReport())
    return Needed(data, range(len(rows)) if positions is None else positions)


def engine() -> Engine:
    """One process on the CPU."""
    return start_engine(TrainConfig(model_name_or_path="none", train_data=["none"]))


def fill(directory: Path, scorer: Scorer, pairs: Needed, stop: Callable[[], bool] = lambda: False) -> int:
    """Pairs that had to be scored."""
    filler = CacheFiller(ReferenceCache(directory), scorer, PACKED, engine())
    before = scorer.scored
    scored = filler.fill(pairs, stop)
    assert scorer.scored - before == scored
    return scored


def contents(directory: Path, pairs: Needed) -> list[bytes]:
    """The bytes of every needed pair's values, looked up as training does."""
    cache = ReferenceCache(directory)
    names = cache.marked([pairs])
    assert names is not None
    cache.open(names)
    keys = [pair_key(pairs.data.dataset[int(position)]) for position in pairs.positions]
    assert cache.has(keys)
    return [value.tobytes() for value in cache.get(keys)]


def files(directory: Path, kind: str) -> list[Path]:
    return sorted(directory.glob(f"{kind}-*.arrow"))


def test_values_are_the_live_ones(tmp_path: Path, scorer: Scorer) -> None:
    rows = make_data()
    assert fill(tmp_path, scorer, needed(rows)) == PAIRS
    assert not files(tmp_path, "chunk") and len(files(tmp_path, "merged")) == 3
    cache = ReferenceCache(tmp_path)
    cache.open(cache.marked([needed(rows)]) or [])
    batch = pack_pairs(rows[3:9])
    live = LiveReference(scorer, engine().autocast)
    torch.testing.assert_close(
        CachedReference(cache).per_token_logps(batch), live.per_token_logps(batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chunks", range(7))
def test_interrupted_anywhere(tmp_path: Path, scorer: Scorer, chunks: int) -> None:
    """Stopped after `chunks` chunks and started again: each pair is scored once, with the same bits."""
    rows = needed(make_data())
    fill(tmp_path / "whole", scorer, rows)
    asked = count()
    scored = 0
    try:
        scored = fill(tmp_path / "parts", scorer, rows, lambda: next(asked) >= chunks)
        assert chunks == 6
    except StoppedEarly:
        assert ReferenceCache(tmp_path / "parts").marked([rows]) is None
        scored = min(PAIRS, chunks * CHUNK)
    assert scored + fill(tmp_path / "parts", scorer, rows) == PAIRS
    assert contents(tmp_path / "parts", rows) == contents(tmp_path / "whole", rows)


@pytest.mark.parametrize("operations", range(16))
def test_killed_between_files(tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, operations: int) -> None:
    """Of (two chunks, merged file, two deletions) three times and a marker only the first `operations` happened."""
    rows = needed(make_data())
    fill(tmp_path / "whole", scorer, rows)
    replace, unlink, done, chunks = os.replace, Path.unlink, count(), 0

    def replace_some(source: Path, target: Path) -> None:
        nonlocal chunks
        if next(done) >= operations:
            raise KeyboardInterrupt
        chunks += target.name.startswith("chunk")
        replace(source, target)

    def unlink_some(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("chunk") and next(done) >= operations:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_some)
        patched.setattr(Path, "unlink", unlink_some)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "killed", scorer, rows)
    assert fill(tmp_path / "killed", scorer, rows) == PAIRS - min(PAIRS, chunks * CHUNK)
    assert contents(tmp_path / "killed", rows) == contents(tmp_path / "whole", rows)
    assert not files(tmp_path / "killed", "chunk")
    assert next(done) > operations


def test_a_complete_cache_is_not_looked_through(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker of the whole data answers for a part of it, and for other positions their own does."""
    rows = make_data()
    some = needed(rows, [1, 5, 7])
    assert fill(tmp_path / "some", scorer, some) == 3
    assert ReferenceCache(tmp_path / "some").marked([some]) is not None
    assert ReferenceCache(tmp_path / "some").marked([needed(rows, [1, 5, 8])]) is None
    fill(tmp_path / "all", scorer, needed(rows))
    monkeypatch.setattr(Needed, "rows", None)  # no pair is read
    for pairs in (needed(rows), needed(rows, [2, 3])):
        assert ReferenceCache(tmp_path / "all").marked([pairs]) is not None


def test_found_by_content_when_the_data_changed(tmp_path: Path, scorer: Scorer) -> None:
    """A row at the end costs its chunk; a new order, and fewer rows, cost nothing."""
    rows = make_data()
    fill(tmp_path, scorer, needed(rows))
    before = contents(tmp_path, needed(rows))
    longer = rows + make_data(seed=1, pairs=1)
    assert fill(tmp_path, scorer, needed(longer)) == CHUNK
    assert fill(tmp_path, scorer, needed(longer)) == 0
    assert fill(tmp_path, scorer, needed(rows[::-1])) == 0
    assert fill(tmp_path, scorer, needed(rows[5:])) == 0
    assert contents(tmp_path, needed(rows)) == before


def damage(path: Path, kind: str) -> None:
    """Harm a file as disks do."""
    content = bytearray(path.read_bytes())
    if kind == "gone":
        return path.unlink()
    if kind == "cut":
        content = content[:-200]
    elif kind == "not arrow":
        content[:] = b"?" * 999
    elif kind == "zeroed":
        content[64 : len(content) // 2] = bytes(len(content) // 2 - 64)
    elif kind == "empty":
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut", "gone", "not arrow", "zeroed", "empty"])
def test_a_damaged_file_is_computed_again(
    tmp_path: Path, scorer: Scorer, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    rows = needed(make_data())
    fill(tmp_path, scorer, rows)
    before = contents(tmp_path, rows)
    damage(files(tmp_path, "merged")[1], kind)
    assert ReferenceCache(tmp_path).marked([rows]) is None
    assert ReferenceCache(tmp_path).was_complete([rows])
    assert 0 < fill(tmp_path, scorer, rows) <= 2 * CHUNK
    assert len(caplog.records) == 1
    assert ("is missing in" if kind == "gone" else "is damaged: ") in caplog.text
    assert contents(tmp_path, rows) == before


def test_a_file_of_another_reference_is_none_of_this_one(
    tmp_path: Path, scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    """The same pairs, whole to the last byte, beside the markers of their own reference or without any."""
    rows, other = needed(make_data()), Scorer()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    fill(tmp_path / "one", scorer, rows)
    fill(tmp_path / "two", other, rows)
    before = contents(tmp_path / "one", rows)
    assert before != contents(tmp_path / "two", rows)
    for path in [*files(tmp_path / "one", "merged"), *(tmp_path / "one" / "complete").iterdir()]:
        path.unlink()
    for path in files(tmp_path / "two", "merged"):
        shutil.copy(path, tmp_path / "one")
    assert fill(tmp_path / "one", scorer, rows) == PAIRS
    assert "it is of another reference, two" in caplog.text
    assert contents(tmp_path / "one", rows) == before


def test_a_flipped_bit_costs_its_chunk(tmp_path: Path, scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is, the values are those of before; in a value it costs one chunk, in the file's frame nothing."""
    rows = needed(make_data())
    fill(tmp_path, scorer, rows)
    before = contents(tmp_path, rows)
    random, scored = np.random.Generator(np.random.PCG64(0)), []
    for _ in range(40):
        path = random.choice(files(tmp_path, "merged"))  # type: ignore[arg-type]
        content = bytearray(path.read_bytes())
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        caplog.clear()
        assert ReferenceCache(tmp_path).marked([rows]) is None
        scored.append(fill(tmp_path, scorer, rows))
        assert [record.getMessage().count("is damaged") for record in caplog.records] == [1]
        assert contents(tmp_path, rows) == before
    assert scored.count(CHUNK) > 5 and scored.count(0) > 5


def test_a_damaged_chunk_of_an_interrupted_fill_is_scored_again(tmp_path: Path, scorer: Scorer) -> None:
    rows = needed(make_data())
    fill(tmp_path / "whole", scorer, rows)
    asked = count()
    with pytest.raises(StoppedEarly):
        fill(tmp_path / "parts", scorer, rows, lambda: next(asked) >= 2)
    path = files(tmp_path / "parts", "chunk")[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(np.float32(1).tobytes(), b"") + b"x")
    fill(tmp_path / "parts", scorer, rows)
    assert contents(tmp_path / "parts", rows) == contents(tmp_path / "whole", rows)


def test_a_value_damaged_while_it_is_used_is_no_value(tmp_path: Path) -> None:
    cache, key = ReferenceCache(tmp_path), b"k" * 16
    cache.write_chunk([key], [np.array([-2.0, -1.0], np.float32)])
    cache.open(cache.merge())
    (path,) = files(tmp_path, "merged")
    content = path.read_bytes()
    place = content.index(np.array([-2.0, -1.0], np.float32).tobytes())
    with path.open("r+b") as file:  # the mapped file itself
        file.seek(place)
        file.write(b"\1")
    with pytest.raises(KeyError):
        cache.get([key])


@pytest.mark.parametrize("text", ["", "{}", '{"files": 3}', "[1]", "[" * 100_000, '{"checksum": 1, "value": {}}', None])
def test_a_damaged_marker_means_looking(tmp_path: Path, scorer: Scorer, text: str | None) -> None:
    rows = needed(make_data())
    fill(tmp_path, scorer, rows)
    (marker,) = (tmp_path / "complete").glob("*.json")
    assert json.loads(marker.read_text())["value"]["pairs"] == PAIRS
    if text is None:
        marker.unlink()
    else:
        marker.write_text(text)
    assert ReferenceCache(tmp_path).marked([rows]) is None
    assert ReferenceCache(tmp_path).was_complete([rows])
    assert fill(tmp_path, scorer, rows) == 0
    assert ReferenceCache(tmp_path).marked([rows]) is not None
    assert not ReferenceCache(tmp_path).was_complete([needed(make_data(seed=1))])


def test_a_missing_pair_is_told_and_looked_for_the_next_time(tmp_path: Path, scorer: Scorer) -> None:
    rows = needed(make_data())
    fill(tmp_path, scorer, rows)
    cache = ReferenceCache(tmp_path)
    cache.open((cache.marked([rows]) or [])[1:])
    with pytest.raises(UserError, match="lacks pair .* Start again"):
        CachedReference(cache).per_token_logps(pack_pairs(list(rows.data.dataset)))
    assert cache.marked([rows]) is None


def test_batches_bring_their_values_along(tmp_path: Path, scorer: Scorer) -> None:
    """Looked up by the processes that lay batches out; a pair that they miss is the run's own to tell of."""
    rows = make_data()
    fill(tmp_path, scorer, needed(rows[:8]))
    cache = ReferenceCache(tmp_path)
    cache.open([path.name for path in files(tmp_path, "merged")])
    reference, steps = CachedReference(cache), [StepPlan(1, 8, [MicroBatch([0, 1, 2], []), MicroBatch([7], [])])]
    loaded = load_steps(rows, steps, reference.collating(PACKED), 1, torch.device("cpu"))
    first_logps = reference.per_token_logps(pack_pairs(rows[:3]))
    for batch, members in zip(next(loaded).batches, (rows[:3], rows[7:8]), strict=True):
        assert batch.ref_per_token_logps is not None
        plain = reference.per_token_logps(pack_pairs(members))
        assert torch.equal(batch.ref_per_token_logps, plain)
        assert reference.per_token_logps(batch) is batch.ref_per_token_logps
    sent = pickle.dumps(reference.collating(PACKED))  # to workers that are not forked
    assert len(sent) < 2000 and torch.equal(pickle.loads(sent)(rows[:3]).ref_per_token_logps, first_logps)
    lacking = reference.collating(PACKED)(rows[7:9])
    assert lacking.ref_per_token_logps is None
    with pytest.raises(UserError, match="lacks pair"):
        reference.per_token_logps(lacking)


def test_two_runs_share_a_directory(tmp_path: Path, scorer: Scorer) -> None:
    """A second run fills while the first is at every one of its chunks, and merges and deletes the first's files."""
    rows = needed(make_data())
    fill(tmp_path / "alone", scorer, rows)

    def other_run() -> bool:
        fill(tmp_path / "shared", scorer, rows)
        return False

    filler = CacheFiller(ReferenceCache(tmp_path / "shared"), scorer, PACKED, engine())
    assert filler.fill(rows, other_run) == PAIRS
    assert contents(tmp_path / "shared", rows) == contents(tmp_path / "alone", rows)


def test_values_of_a_pair_scored_twice(tmp_path: Path) -> None:
    """Whichever file came first, and merged or not, the same one of two values is found."""
    key, others = b"k" * 16, [bytes([n]) * 16 for n in range(4)]
    low, high = np.array([-2.0, -1.0], np.float32), np.array([-2.0, -1.5], np.float32)
    found = set()
    for index, (order, merged) in enumerate(
        [((low, high), True), ((high, low), True), ((low, high), False), ((high, low), False)]
    ):
        cache = ReferenceCache(tmp_path / str(index))
        for other, value in zip(others, order, strict=False):
            cache.write_chunk([key, other], [value, value])
            if not merged:
                cache.merge()
        cache.open(cache.merge())
        found.add(cache.get([key])[0].tobytes())
    assert len(found) == 1


def test_what_a_killed_fill_left_goes_after_a_day(tmp_path: Path, scorer: Scorer) -> None:
    old, new = tmp_path / ".chunk-a.arrow.1.partial", tmp_path / ".chunk-b.arrow.2.partial"
    for path, age in ((old, 25), (new, 1)):
        path.write_bytes(b"cut off")
        os.utime(path, (time.time() - age * 3600,) * 2)
    fill(tmp_path, scorer, needed(make_data()))
    assert not old.exists() and new.exists()


def test_keys_may_end_in_zeros(tmp_path: Path) -> None:
    keys = [b"\0" * 16, b"a" + b"\0" * 15, b"a" * 15 + b"\0", b"\xff" * 16, b"\0" * 15 + b"a"]
    cache = ReferenceCache(tmp_path)
    cache.write_chunk(keys, [np.full(n + 1, n, np.float32) for n in range(len(keys))])
    cache.open(cache.merge())
    assert [value.tolist() for value in cache.get(keys)] == [[n] * (n + 1) for n in range(len(keys))]
    assert not cache.has([b"b" * 16]) and not cache.has([keys[0], b"\xff" * 15 + b"\0"])


def test_batches_follow_from_the_chunk_alone() -> None:
    rows = make_data(pairs=40)
    batches = split_by_tokens(rows, most=50)
    sizes = [[len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in batch] for batch in batches]
    assert [row for batch in batches for row in batch] == rows
    assert all(sum(size) <= 50 or len(size) == 1 for size in sizes)
    assert all(sum(size) + following[0] > 50 for size, following in zip(sizes, sizes[1:], strict=False))
    assert split_by_tokens(rows, most=1) == [[row] for row in rows] and split_by_tokens([]) == []
