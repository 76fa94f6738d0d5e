"""Micro-batches on their way from the data to the step."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from minimind_dpo.data.batch import PairBatch, pack_pairs, pad_pairs

ROW = {
    "chosen_input_ids": [1, 2, 3, 4],
    "chosen_completion_mask": [0, 0, 1, 1],
    "rejected_input_ids": [1, 2, 5],
    "rejected_completion_mask": [0, 0, 1],
}

PROGRAM = """
import torch
from minimind_dpo.data.order import MicroBatch, StepPlan
from minimind_dpo.objective.layout import PACKED
from minimind_dpo.training.batches import load_steps

places = list(range(512))
plans = [StepPlan(step, 512, [MicroBatch(places, places)]) for step in (1, 2, 3)]
for plan, batches in load_steps([{row}] * 512, plans, PACKED, 2, torch.device("cpu")):
    (batch,) = batches
    assert len(batch) == 512
print("done")
"""


@pytest.mark.parametrize("layout", [pack_pairs, pad_pairs])
def test_a_batch_is_a_few_tensors_whatever_its_pairs(layout: object) -> None:
    counts = set()
    for pairs in (1, 7, 512):
        batch = layout([ROW] * pairs)  # type: ignore[operator]
        values = [getattr(batch, field.name) for field in fields(PairBatch)]
        assert not any(isinstance(value, tuple) and any(isinstance(v, torch.Tensor) for v in value) for value in values)
        counts.add(sum(isinstance(value, torch.Tensor) for value in values))
    assert len(counts) == 1 and counts.pop() <= 12


def test_many_pairs_need_few_descriptors(tmp_path: Path) -> None:
    """Each tensor that a worker hands over takes descriptors: 512 pairs with two workers under `ulimit -n 256`."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(row=ROW))

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120, preexec_fn=few)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-2000:]
