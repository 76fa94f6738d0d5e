"""Learning rates by hand and against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from minimind_dpo.training.schedule import learning_rate_schedule


def test_minimind_by_hand() -> None:
    """Four steps of lr 1: cos(pi/4), cos(pi/2), cos(3pi/4), cos(pi) in 0.1 + 0.45 (1 + cos)."""
    schedule = learning_rate_schedule("minimind", 1.0, 4, 0.0)
    half = 0.45 * 2**-0.5
    assert [schedule(k) for k in (1, 2, 3, 4)] == pytest.approx([0.55 + half, 0.55, 0.55 - half, 0.1])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"])
def test_against_transformers(name: str) -> None:
    ours = learning_rate_schedule(name, 2e-4, 20, 0.25)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    specific = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else None
    oracle = get_scheduler(
        name, optimizer, num_warmup_steps=5, num_training_steps=20, scheduler_specific_kwargs=specific
    )
    for step in range(1, 21):
        assert ours(step) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        oracle.step()
