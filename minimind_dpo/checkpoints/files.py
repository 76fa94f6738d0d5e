"""The tensors of a checkpoint: every rank writes what it holds, any number of ranks reads what it needs.

A file holds fragments (`engine/fragments.py`) under keys `kind|name|start`; a fragment that a reader needs is put
together from whatever fragments the writers held. Nothing is gathered, and no more than `FILE_BYTES` is copied at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimind_dpo.engine.fragments import Fragment

FILE_BYTES = 1 << 30


def write_fragments(
    directory: Path, rank: int, fragments: Iterable[Fragment], file_bytes: int = FILE_BYTES
) -> list[Path]:
    """Write one rank's fragments as `state-RANK-PART.safetensors`, each about `file_bytes` large; the files."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    written: list[Path] = []
    size = 0

    def flush() -> None:
        nonlocal size
        written.append(directory / f"state-{rank:05d}-{len(written):05d}.safetensors")
        save_file(tensors, written[-1], metadata={"shapes": json.dumps(shapes)})
        tensors.clear()
        shapes.clear()
        size = 0

    for fragment in fragments:
        for kind, state in fragment.states.items():
            tensors[f"{kind}|{fragment.name}|{fragment.start}"] = state.detach().to("cpu", copy=True)
            size += state.numel() * state.element_size()
        shapes[fragment.name] = fragment.shape
        if size >= file_bytes:
            flush()
    if tensors:
        flush()
    return written


class _StoredFragment(NamedTuple):
    start: int
    length: int
    path: Path
    key: str


class FragmentReader:
    """The tensors of one checkpoint, read fragment by fragment.

    Attributes:
        shapes: of every parameter, by name.
    """

    def __init__(self, directory: Path):
        """Index every file of `directory`; their headers are read, not their tensors."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[tuple[str, str], list[_StoredFragment]] = {}
        for path in sorted(directory.glob("state-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                shapes = json.loads(file.metadata()["shapes"])
                self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
                for key in file.keys():
                    kind, name, start = key.split("|")
                    length = file.get_slice(key).get_shape()[0]
                    self._stored.setdefault((kind, name), []).append(_StoredFragment(int(start), length, path, key))

    def read(self, kind: str, name: str, start: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[length] values of one parameter's weight or state from element `start` on, on the CPU.

        Raises:
            KeyError: the checkpoint does not hold all of them.
        """
        values = torch.empty(length, dtype=dtype)
        missing = length
        for stored in self._stored.get((kind, name), []):
            first, last = max(start, stored.start), min(start + length, stored.start + stored.length)
            if first < last:
                with safe_open(stored.path, framework="pt") as file:
                    values[first - start : last - start] = file.get_slice(stored.key)[
                        first - stored.start : last - stored.start
                    ]
                missing -= last - first
        if missing:
            raise KeyError(f"{kind} of {name}: {missing} of {length} values are not in the checkpoint")
        return values

    def weight(self, name: str) -> Tensor:
        """The whole weight of one parameter, fp32."""
        shape = self.shapes[name]
        return self.read("weight", name, 0, torch.Size(shape).numel()).view(shape)

    def fill(self, fragment: Fragment) -> None:
        """Write the checkpoint's values into a fragment's states."""
        for kind, state in fragment.states.items():
            state.copy_(self.read(kind, fragment.name, fragment.start, state.numel(), state.dtype))
