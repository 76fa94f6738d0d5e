"""Micro-batches on their way from the data to the step."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers_forks import Forks
from helpers_run import Inputs, train_here, train_lines

from minimind_dpo.data.batch import PairBatch, pack_pairs, pad_pairs
from minimind_dpo.errors import TrainingError

ROW = {
    "chosen_input_ids": [1, 2, 3, 4],
    "chosen_completion_mask": [0, 0, 1, 1],
    "rejected_input_ids": [1, 2, 5],
    "rejected_completion_mask": [0, 0, 1],
}

PROGRAM = """
import resource
import torch
from minimind_dpo.data.order import MicroBatch, StepPlan
from minimind_dpo.objective.layout import PACKED
from minimind_dpo.training.batches import load_steps

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
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
        values += [] if batch.branches is None else [batch.branches.numbers]
        values.append(torch.zeros(len(batch.token_index)))  # what a cached reference adds
        assert not any(isinstance(value, tuple) and any(isinstance(v, torch.Tensor) for v in value) for value in values)
        counts.add(sum(isinstance(value, torch.Tensor) for value in values))
    assert len(counts) == 1 and counts.pop() <= 12


def test_many_pairs_need_few_descriptors(forks: Forks, tmp_path: Path) -> None:
    """Each tensor that a worker hands over takes descriptors: 512 pairs with two workers under `ulimit -n 256`."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(row=ROW))
    codes = forks.run([], tmp_path, program=str(program))
    said = (tmp_path / "log").read_text("utf-8")
    assert codes == [0] and said == "done\n", said[-2000:]


def test_a_run_measured_in_tokens_takes_the_same_steps(inputs: Inputs, tmp_path: Path) -> None:
    """All metrics and weights to rounding, with micro-batches of any size; a run that goes on may change it."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    assert train_here(inputs.flags(tmp_path / "pairs", **options)) == 0
    assert train_here(inputs.flags(tmp_path / "tokens", **options, max_tokens_per_micro_batch=90)) == 0
    for one, other in zip(train_lines(tmp_path / "pairs"), train_lines(tmp_path / "tokens"), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


def test_out_of_memory_says_what_to_set(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers of the micro-batch that did not fit, on a CPU and on a GPU."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def full(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch, pytest.raises(TrainingError) as caught:
            patch.setattr("minimind_dpo.training.step.score_batch", full)
            train_here(inputs.flags(tmp_path / type(error).__name__, **options))
        found = re.search(
            r"step 1, whose largest micro-batch here is 8 pair.s. of (\d+) tokens: set (\w+) to (\d+) or less",
            str(caught.value),
        )
        assert found and found[2] == "max_tokens_per_micro_batch" and int(found[3]) == int(found[1]) // 2
