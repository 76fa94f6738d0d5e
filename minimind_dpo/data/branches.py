"""Where the pairs of a packed row lie, and what their two branches attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairSegment:
    """Where one pair lies in the packed row: input tokens from `start`, prefix | chosen | rejected."""

    start: int
    prefix: int
    chosen: int
    rejected: int

    @property
    def length(self) -> int:
        """Input tokens of the pair."""
        return self.prefix + self.chosen + self.rejected


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """The branches of a packed row as attention kernels for variable lengths take them.

    The row is already the queries' order, branch after branch; the keys of a rejected branch are its prefix again and
    its own.

    Attributes:
        numbers: int32 [2 (N + 1) + K]: N + 1 ends of the branches' queries, as many of their keys, each beginning with
            0, and the position in the row of each of the K keys. One tensor, for one copy to a device.
        branches: N.
        longest_query, longest_key: the most that a branch has of them.
    """

    numbers: Tensor
    branches: int
    longest_query: int
    longest_key: int

    @property
    def query_ends(self) -> Tensor:
        """[N + 1] where each branch's queries begin, and where the last one's end."""
        return self.numbers[: self.branches + 1]

    @property
    def key_ends(self) -> Tensor:
        """[N + 1] the same of their keys."""
        return self.numbers[self.branches + 1 : 2 * (self.branches + 1)]

    @property
    def key_index(self) -> Tensor:
        """[K] positions in the row whose keys are laid one after another; a prefix comes twice."""
        return self.numbers[2 * (self.branches + 1) :]


def plan_branches(segments: Sequence[PairSegment]) -> BranchPlan:
    """The plan of a packed row, on the host."""
    keys, lengths = [], [(0, 0)]
    for segment in segments:
        chosen_end = segment.start + segment.prefix + segment.chosen
        keys.append(np.arange(segment.start, chosen_end))
        lengths.append((len(keys[-1]), len(keys[-1])))
        if segment.rejected:
            prefix = np.arange(segment.start, segment.start + segment.prefix)
            keys += [prefix, np.arange(chosen_end, segment.start + segment.length)]
            lengths.append((segment.rejected, segment.prefix + segment.rejected))
    ends = np.cumsum(lengths, axis=0)
    longest_query, longest_key = np.max(lengths, axis=0).tolist()
    numbers = np.concatenate([ends[:, 0], ends[:, 1], *keys]).astype(np.int32)
    return BranchPlan(torch.from_numpy(numbers), len(lengths) - 1, longest_query, longest_key)
