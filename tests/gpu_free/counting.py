"""What a step asks of a GPU, seen on fake tensors: kernels, copies, waits, and the types that products run in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_pin_memory", "lift_fresh"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "device"}  # the last is a question


class Watch(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd.

    Attributes:
        kernels: by operator, those that compute on the device: neither views nor allocations.
        dispatches: all operators on device tensors.
        blocking: copies between host and device that the host waits for.
        copies: the others.
        waits: operators whose result the host has to know.
        products: of matrices, by type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.dispatches = self.copies = 0
        self.blocking: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in WAITS and any(on_device(tensor) for tensor in inputs):
            self.waits.append(name)
        if name == "_efficient_attention_backward":  # torch's own function for fake tensors lacks an argument
            result = tuple(torch.empty_like(state) for state in args[1:4]) + (torch.empty_like(args[1]),)
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._note(func, name, inputs, outputs, args, kwargs)
        return result

    def _note(self, func: Any, name: str, inputs: Any, outputs: Any, args: Any, kwargs: Any) -> None:
        if not any(on_device(tensor) for tensor in (*inputs, *outputs)):
            return
        self.dispatches += 1
        if name in ALLOCATIONS or is_view(func, name):
            return
        if name in ("_to_copy", "copy_") and len({on_device(tensor) for tensor in (*inputs, *outputs)}) == 2:
            self._note_copy(name, args, kwargs)
            return
        self.kernels[name] += 1
        if name in PRODUCTS:
            self.products[str(inputs[0].dtype).removeprefix("torch.")] += 1

    def _note_copy(self, name: str, args: Any, kwargs: Any) -> None:
        """A copy is waited for unless it says `non_blocking`, and from pageable memory even then."""
        source = args[1] if name == "copy_" else args[0]
        asked = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if asked and (on_device(source) or getattr(source, "pinned", False)):
            self.copies += 1
        else:
            self.blocking.append(f"{name} of {list(source.shape)} {'from' if on_device(source) else 'to'} the device")


class Storages(TorchDispatchMode):
    """Knows what of the device's memory was taken since it began, and is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if _is_held(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_held(tensor) and _key(tensor) not in given:
                storage = tensor.untyped_storage()
                self._held[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self) -> int:
        """Bytes."""
        self._held = {reference: size for reference, size in self._held.items() if not reference.expired()}
        return sum(self._held.values())


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and on_device(leaf)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def is_view(func: Any, name: str) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return name in VIEWS or any(alias is not None and not alias.is_write for alias in aliases)
