"""Pairs laid out for one forward pass: packed without padding, the shared prefix of a pair stored once.

Packed (`pack_pairs`), one row for all pairs, here two pairs with prefixes a b c and p, chosen rests d e and q r,
rejected rests x y z and s t (capital letters would be the last token of each branch: a target, never an input):

    tokens of pair 1   chosen  a b c d E      rejected  a b c x y Z
    input_ids          a b c d x y   | p q s         one row [1, T]
    position_ids       0 1 2 3 3 4   | 0 1 1
    predicts           b c . E . Z   | . R T         and the prefix's last token (c, p) predicts d and x, q and s

Plain (`pad_pairs`), one right-padded row a side: the fallback for models that cannot attend over segments, and the
oracle of the tests. Both layouts give log-probabilities in the same canonical order: for each pair the counted
tokens of the chosen side, then those of the rejected side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimind_dpo.data.branches import BranchPlan, PairSegment, plan_branches
from minimind_dpo.data.chat import shared_prefix_length
from minimind_dpo.engine.devices import held_dtype


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B pairs ready for one forward pass.

    Attributes:
        input_ids: [rows, T] token ids; rows is 1 (packed) or 2 B (plain: chosen, rejected, chosen, ...).
        position_ids: [rows, T] positions, restarting at the prefix length for a packed rejected branch.
        attention_mask: [rows, T], 1 for real tokens; plain layout only.
        segments: one a pair, and `branches` what their attention needs on a GPU; packed layout only.
        logit_positions: [K] positions in the flattened rows whose next token counts.
        target_ids: [K] those next tokens.
        state_positions: [S] the same positions ascending, each once.
        token_index: [M] each counted token's entry in the K, in canonical order; one of the prefix comes twice.
        side_numbers: [2, 2 B + 1] of the M counted tokens: where those of each side (chosen, rejected, chosen, ...)
            begin and the last ones end; and how many each side has, then 0.
        side_sizes: the latter on the host, without the 0: no device is waited for.
        sequence_positions, sequence_lengths: each side's input in the flattened rows; the 2 B lengths on the host.
        weights, margins: [B] per-pair weights, and target margins (0 where a pair has none).
        ref_per_token_logps: [M] the reference's log-probabilities, where they are known beforehand.
        keys: B digests of each pair's token ids and masks.
        num_tokens: real input tokens in the rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[PairSegment, ...] | None
    branches: BranchPlan | None
    logit_positions: Tensor
    target_ids: Tensor
    state_positions: Tensor
    token_index: Tensor
    side_numbers: Tensor
    side_sizes: tuple[int, ...]
    sequence_positions: Tensor
    sequence_lengths: tuple[int, ...]
    weights: Tensor
    margins: Tensor
    keys: tuple[bytes, ...]
    num_tokens: int
    ref_per_token_logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def chosen_tokens(self) -> Tensor:
        """[B] counted tokens of the chosen sides."""
        return self.side_numbers[1, :-1:2]

    @property
    def rejected_tokens(self) -> Tensor:
        """[B] counted tokens of the rejected sides."""
        return self.side_numbers[1, 1::2]

    def pin_memory(self) -> PairBatch:
        """The same batch in memory that a GPU reads by itself (what DataLoader asks of a batch)."""
        return self._moved(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch with every tensor on `device`, in the type in which that can hold it."""
        return self._moved(lambda tensor: tensor.to(device, held_dtype(tensor.dtype, device), non_blocking=True))

    @property
    def sequences(self) -> tuple[Tensor, ...]:
        """2 B arrays of positions in the flattened rows: the input of each side."""
        return self.sequence_positions.split(self.sequence_lengths)

    def _moved(self, move: Callable[[Any], Any]) -> PairBatch:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        moved: dict[str, Any] = {name: move(value) for name, value in values if isinstance(value, Tensor)}
        if self.branches is not None:
            moved["branches"] = replace(self.branches, numbers=move(self.branches.numbers))
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of one pair in numpy: token ids, and the indices >= 1 of the tokens that count."""

    ids: np.ndarray
    targets: np.ndarray


def _sides(row: dict[str, Any]) -> tuple[_Side, _Side]:
    sides = []
    for name in ("chosen", "rejected"):
        ids = np.asarray(row[f"{name}_input_ids"], dtype=np.int64)
        targets = np.flatnonzero(np.asarray(row[f"{name}_completion_mask"], dtype=np.int64))
        sides.append(_Side(ids, targets[targets > 0]))  # nothing predicts the first token
    return sides[0], sides[1]


def pair_key(row: dict[str, Any]) -> bytes:
    """16 bytes that name a pair by content: its token ids and completion masks, both sides."""
    digest = hashlib.sha256()
    for name in ("chosen_input_ids", "chosen_completion_mask", "rejected_input_ids", "rejected_completion_mask"):
        values = np.asarray(row[name], dtype=np.int32)
        digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    return digest.digest()[:16]


def pack_pairs(rows: Sequence[dict[str, Any]]) -> PairBatch:
    """The packed layout of B rows (columns of `data/tokenized.py`), the shared prefix of a pair stored once."""
    input_ids, position_ids, logit_positions, target_ids = [], [], [], []
    token_index, sequences, segments, counts = [], [], [], []
    start = entries = 0
    for row in rows:
        chosen, rejected = _sides(row)
        prefix = shared_prefix_length(chosen.ids, rejected.ids)
        segment = PairSegment(start, prefix, len(chosen.ids) - 1 - prefix, len(rejected.ids) - 1 - prefix)
        rejected_shift = start + segment.chosen  # of a rejected token after the prefix
        input_ids += [chosen.ids[:-1], rejected.ids[prefix:-1]]
        position_ids += [np.arange(prefix + segment.chosen), np.arange(prefix, prefix + segment.rejected)]
        shared = np.union1d(chosen.targets[chosen.targets < prefix], rejected.targets[rejected.targets < prefix])
        chosen_own = chosen.targets[chosen.targets >= prefix]
        rejected_own = rejected.targets[rejected.targets >= prefix]
        before_rejected = np.where(rejected_own == prefix, start, rejected_shift)
        logit_positions += [start + shared - 1, start + chosen_own - 1, before_rejected + rejected_own - 1]
        target_ids += [chosen.ids[shared], chosen.ids[chosen_own], rejected.ids[rejected_own]]
        own_start = entries + len(shared)
        token_index += [
            entries + np.searchsorted(shared, chosen.targets[chosen.targets < prefix]),
            np.arange(own_start, own_start + len(chosen_own)),
            entries + np.searchsorted(shared, rejected.targets[rejected.targets < prefix]),
            np.arange(own_start + len(chosen_own), own_start + len(chosen_own) + len(rejected_own)),
        ]
        counts.append((len(chosen.targets), len(rejected.targets)))
        branch = np.arange(start + prefix + segment.chosen, start + segment.length)
        sequences += [
            np.arange(start, start + prefix + segment.chosen),
            np.concatenate([np.arange(start, start + prefix), branch]),
        ]
        segments.append(segment)
        start += segment.length
        entries = own_start + len(chosen_own) + len(rejected_own)
    return _batch(
        rows,
        _joined(input_ids)[None],
        _joined(position_ids)[None],
        None,
        tuple(segments),
        logit_positions,
        target_ids,
        token_index,
        counts,
        sequences,
        num_tokens=start,
    )


def pad_pairs(rows: Sequence[dict[str, Any]]) -> PairBatch:
    """The plain layout of B rows: one right-padded row a side, nothing shared."""
    sides = [side for row in rows for side in _sides(row)]
    width = max(len(side.ids) for side in sides) - 1
    shape = (len(sides), width)
    input_ids, attention_mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    logit_positions, target_ids, sequences = [], [], []
    for index, side in enumerate(sides):
        length = len(side.ids) - 1
        input_ids[index, :length] = side.ids[:-1]
        attention_mask[index, :length] = 1
        logit_positions.append(index * width + side.targets - 1)
        target_ids.append(side.ids[side.targets])
        sequences.append(index * width + np.arange(length))
    counts = [(len(a.targets), len(b.targets)) for a, b in zip(sides[::2], sides[1::2], strict=True)]
    token_index = [np.arange(sum(map(sum, counts)))]
    return _batch(
        rows,
        torch.from_numpy(input_ids),
        torch.arange(width).expand(shape),
        torch.from_numpy(attention_mask),
        None,
        logit_positions,
        target_ids,
        token_index,
        counts,
        sequences,
        num_tokens=int(attention_mask.sum()),
    )


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _batch(
    rows: Sequence[dict[str, Any]],
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[PairSegment, ...] | None,
    logit_positions: list[np.ndarray],
    target_ids: list[np.ndarray],
    token_index: list[np.ndarray],
    counts: list[tuple[int, int]],
    sequences: list[np.ndarray],
    num_tokens: int,
) -> PairBatch:
    sizes = [size for pair in counts for size in pair]
    return PairBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        segments=segments,
        branches=None if segments is None else plan_branches(segments),
        logit_positions=_joined(logit_positions),
        target_ids=_joined(target_ids),
        state_positions=torch.from_numpy(np.unique(np.concatenate(logit_positions))),
        token_index=_joined(token_index),
        side_numbers=torch.from_numpy(np.stack([np.cumsum([0, *sizes]), [*sizes, 0]])),
        side_sizes=tuple(sizes),
        sequence_positions=_joined(sequences),
        sequence_lengths=tuple(map(len, sequences)),
        weights=torch.tensor([float(row.get("weight", 1.0)) for row in rows]),
        margins=torch.tensor([float(row.get("margin") or 0.0) for row in rows], dtype=torch.float64),
        keys=tuple(pair_key(row) for row in rows),
        num_tokens=num_tokens,
    )
