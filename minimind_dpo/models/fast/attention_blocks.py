"""Where the queries and keys of packed pairs lie, whatever computes their attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minimind_dpo.data.batch import PairSegment


class QueryBlock(NamedTuple):
    """Queries from `start` to `end`, which see `prefix` and, causally, positions from `first` on.

    A whole branch is the block whose `first` is its `start`; it may be cut into blocks of fewer queries.
    """

    prefix: slice
    first: int
    start: int
    end: int

    @property
    def queries(self) -> slice:
        """Positions of the queries in the row."""
        return slice(self.start, self.end)

    @property
    def own(self) -> slice:
        """Positions of the keys beside the prefix."""
        return slice(self.first, self.end)

    @property
    def shared(self) -> int:
        """Keys of the prefix."""
        return self.prefix.stop - self.prefix.start

    @property
    def keys(self) -> int:
        """Keys that the last query sees."""
        return self.shared + self.end - self.first


def pair_branches(segments: Sequence[PairSegment]) -> Iterator[QueryBlock]:
    """Each pair's prefix with its chosen branch, then its rejected branch: together the row from start to end."""
    for segment in segments:
        chosen_end = segment.start + segment.prefix + segment.chosen
        yield QueryBlock(slice(0, 0), segment.start, segment.start, chosen_end)
        if segment.rejected:
            yield QueryBlock(
                slice(segment.start, segment.start + segment.prefix),
                chosen_end,
                chosen_end,
                segment.start + segment.length,
            )


def visible_states(states: Tensor, block: QueryBlock) -> Tensor:
    """What a block's queries see of [..., T, head_dim]."""
    own = states[..., block.own, :]
    return torch.cat([states[..., block.prefix, :], own], dim=-2) if block.shared else own


@lru_cache(maxsize=16)  # every layer asks for the same ones
def banded_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [Q, K] of bottom-right causal attention; a query sees `window` positions, itself included."""
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position[None]
    hidden = (distance < 0) | (distance >= (keys if window is None else window))
    # a float mask keeps SDPA's fused path on the CPU; a boolean one would leave it
    return torch.zeros_like(distance, dtype=dtype).masked_fill_(hidden, float("-inf"))
