"""Functions of a user's own that a run calls, for what no setting says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch


class Callback:
    """What `train_dpo(config, callbacks=[...])` takes: a class of your own with any of these three methods.

    They are called on the main process only, between two steps, and the other ranks wait. They get copies of numbers
    and not the run, and what they draw of random numbers is given back: a run with callbacks has the bits of one
    without.
    An exception ends the run with its traceback; what was saved before stays, and the same call goes on from there.
    """

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """After every `logging_steps` steps: a line of metrics.jsonl (docs/training.md has the names)."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation: its metrics under `eval_` names."""

    def on_save(self, step: int, path: Path) -> None:
        """After a checkpoint: its directory, which is complete."""


def tell_values(callbacks: Sequence[Callback], step: int, values: Mapping[str, float]) -> None:
    """Hand on the values of a line of metrics.jsonl, of training or of an evaluation."""
    evaluated = any(name.startswith("eval_") for name in values)
    for callback in callbacks:
        with _undisturbed():
            (callback.on_evaluate if evaluated else callback.on_log)(step, MappingProxyType(dict(values)))


def tell_saved(callbacks: Sequence[Callback], step: int, path: Path) -> None:
    """Hand on a checkpoint that is complete."""
    for callback in callbacks:
        with _undisturbed():
            callback.on_save(step, path)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Around a callback: generators of random numbers and autograd are afterwards as before."""
    own, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield
    random.setstate(own)
    np.random.set_state(numpy)
