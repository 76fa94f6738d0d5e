"""What an optimizer step leaves, read back from the device, and what happens where it is not finite."""

from __future__ import annotations

import json
import logging
import math
from typing import Any, NamedTuple

from torch import Tensor

from minimind_dpo.errors import TrainingError
from minimind_dpo.files import write_text, writing
from minimind_dpo.objective.sums import PairTotals, read_totals
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)

_MOST_SKIPPED, _AMONG = 10, 100  # skipped steps, among so many


class StepResult(NamedTuple):
    """What an optimizer step leaves on the device.

    Attributes:
        step: its number.
        learning_rate: that it used.
        sums: of its pairs' metrics on all ranks, in the layout of `objective/sums.py`.
        stop_requests: ranks that were asked to stop, a scalar.
        grad_norm: before clipping, a scalar.
    """

    step: int
    learning_rate: float
    sums: Tensor
    stop_requests: Tensor
    grad_norm: Tensor


class StepNumbers(NamedTuple):
    """A step's result read back.

    Attributes:
        totals: of its pairs.
        grad_norm: before clipping.
        stops: whether any rank was asked to stop.
        skipped: whether the step changed nothing, since loss or gradient are not finite.
    """

    totals: PairTotals
    grad_norm: float
    stops: bool
    skipped: bool


def read_step(run: Run, result: StepResult) -> StepNumbers:
    """Wait for the device and read a step's result.

    Raises:
        TrainingError: the loss or the gradient norm is not finite, and `on_nonfinite` is `stop`, or too many steps have
            been skipped.
    """
    totals, grad_norm = read_totals(result.sums, run.preference.parts), float(result.grad_norm)
    wrong = [name for name, value in totals.sums.items() if not math.isfinite(value)][:1]
    if not (run.engine.skips_overflows or math.isfinite(grad_norm)):
        wrong.append("gradient norm")
    if wrong:
        _answer(run, result.step, wrong[0], grad_norm)
    return StepNumbers(totals, grad_norm, stops=float(result.stop_requests) > 0, skipped=bool(wrong))


def _answer(run: Run, step: int, what: str, grad_norm: float) -> None:
    """Skip a step that is not finite, or end the run; the step's pairs are written down either way."""
    pairs = [run.train_data.dataset[int(pair)] for pair in run.order.step_pairs(step)]
    file = run.output_dir / "nonfinite" / f"step-{step:06d}.jsonl"
    if run.engine.is_main:
        text = "".join(json.dumps(_described(run, pair), ensure_ascii=False) + "\n" for pair in pairs)
        with writing(file, "output_dir"):
            write_text(file, text)
    named = ", ".join(pair["place"] for pair in pairs[:8]) + (", ..." if len(pairs) > 8 else "")
    found = f"the {what} of optimizer step {step} is not finite"
    where = f"Pairs of the step: {named}; all of them, with their tokens, are in {file}."
    advice = "Try a lower learning_rate, or bf16 instead of fp16."
    if run.config.on_nonfinite == "stop" or math.isfinite(grad_norm):  # with a finite gradient the weights have moved
        raise TrainingError(
            f"{found}; the run ends before that step. {where} {advice} on_nonfinite: skip goes on without such steps."
        )
    run.state.skipped_steps.append(step)
    if sum(other > step - _AMONG for other in run.state.skipped_steps) > _MOST_SKIPPED:
        raise TrainingError(
            f"{found}, and more than {_MOST_SKIPPED} of the last {_AMONG} steps were skipped; the run ends. "
            f"{where} {advice}"
        )
    logger.warning("%s: skipped, weights and optimizer stay as they were. %s", found, where)


def _described(run: Run, pair: dict[str, Any]) -> dict[str, Any]:
    texts = {f"{side}_text": run.tokenizer.decode(pair[f"{side}_input_ids"]) for side in ("chosen", "rejected")}
    return pair | texts
