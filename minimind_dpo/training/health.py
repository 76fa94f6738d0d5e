"""What goes wrong with preference training while its loss looks well, seen in sums over pairs of many steps.

Each failure is one function: it looks at stretches of a run and answers with what it found and what to do, or None.
Every warning is given once a start. docs/training.md has the table.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from minimind_dpo.config import TrainConfig
from minimind_dpo.objective.sums import PairTotals
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)

_LEAST_STEPS, _MOST_STEPS = 10, 100  # of a stretch; a run has about eight
_LEAST_PAIRS = 64  # for a correlation
_MINIMIND_RATE = 4e-8  # of the original, with which nothing is learned: docs/minimind.md


class Stretch:
    """Sums over the pairs of consecutive steps.

    Attributes:
        steps: how many.
        pairs: of all of them.
    """

    def __init__(self) -> None:
        self.steps, self.pairs = 0, 0.0
        self._sums: Counter[str] = Counter()

    def add(self, totals: PairTotals) -> None:
        """Take in a step."""
        self.steps += 1
        self.pairs += totals.pairs
        self._sums.update(totals.sums | totals.health)

    def mean(self, name: str) -> float:
        """Mean over the pairs of a metric, or of one of `HEALTH_SUMS`."""
        return self._sums[name] / self.pairs

    def sum(self, name: str) -> float:
        """Sum over the pairs."""
        return self._sums[name]


class Findings(NamedTuple):
    """What a check looks at.

    Attributes:
        config: of the run.
        stretches: that are complete, and at the end of the run the last one, in order; at least one.
        step: the run's present one; `at_end` where it is the last.
        summed_rates: the sum of all steps' learning rates.
    """

    config: TrainConfig
    stretches: list[Stretch]
    step: int
    at_end: bool
    summed_rates: float


def nothing_learned(found: Findings) -> str | None:
    """The margin has not left 0 by a tenth of a nat."""
    margin = found.stretches[-1].mean("rewards/margins")
    long_enough = found.step >= (_LEAST_STEPS // 2 if found.at_end else _MOST_STEPS)
    if abs(margin) > 0.1 * found.config.beta or not found.summed_rates or not long_enough:
        return None
    loss = found.stretches[-1].mean("dpo_loss")
    return (
        f"nothing learned after {found.step} steps: the margin is {margin:.4f} and the loss {loss:.4f} (a policy that "
        f"equals its reference has 0, and under the sigmoid losses {math.log(2):.4f}). The learning rates of all steps "
        f"add up to {found.summed_rates:.1e}: raise learning_rate or the number of steps (docs/learning.md)"
    )


def chosen_falls(found: Findings) -> str | None:
    """The chosen answers lose probability and no pair more is told apart for it."""
    if len(found.stretches) < 3:
        return None
    before, now = found.stretches[-3], found.stretches[-1]
    then_shift, shift = (part.mean("rewards/chosen") / found.config.beta for part in (before, now))
    reference = now.mean("logps/chosen") - shift
    gained = now.mean("rewards/accuracies") - before.mean("rewards/accuracies")
    if shift - then_shift > -0.05 * abs(reference) or gained > 0.02:
        return None
    return (
        f"chosen answers lose probability ({then_shift:+.1f} to {shift:+.1f} nats from the reference's "
        f"{reference:.1f}) while accuracy stands at {now.mean('rewards/accuracies'):.2f}: the policy unlearns both "
        "answers. Stop here, or lower learning_rate, raise beta, or clean pairs whose chosen answer is poor"
    )


_LEAST_AT_CERTAINTY = {"sigmoid", "sigmoid_norm", "hinge"}  # losses that are at their least for pairs told apart


def memorised(found: Findings) -> str | None:
    """Every pair of the training data is told apart with certainty."""
    now = found.stretches[-1]
    accuracy, loss = now.mean("rewards/accuracies"), now.mean("dpo_loss")
    flipped = found.config.label_smoothing
    # the least that a pair can cost: with smoothing the entropy of whether it was flipped
    least = -sum(share * math.log(share) for share in (flipped, 1 - flipped) if 0 < share < 1)
    if accuracy < 0.99 or loss > least + 0.02 or not {*found.config.loss_type} <= _LEAST_AT_CERTAINTY:
        return None
    return (
        f"accuracy {accuracy:.2f} at a loss of {loss:.4f}: the training pairs are known by heart, or told apart by "
        "something trivial. Look at eval_data; take fewer epochs, a lower learning_rate, or more pairs"
    )


def ends_drift(found: Findings) -> str | None:
    """The tokens that end a chosen answer have become likelier or less likely."""
    now = found.stretches[-1]
    if not now.sum("end tokens"):
        return None
    drift = now.sum("end logratio") / now.sum("end tokens")
    if abs(drift) < 1.0:
        return None
    consequence = "run on" if drift < 0 else "break off"
    return (
        f"the end of a chosen answer has moved by {drift:+.2f} nats from the reference: replies will {consequence}. "
        "Look at replies; lower learning_rate, or see whether answers were cut off (max_length)"
    )


def length_drives(found: Findings) -> str | None:
    """Margins follow the difference of lengths."""
    now = found.stretches[-1]
    if now.pairs < _LEAST_PAIRS or now.mean("rewards/margins") < 0.1:
        return None
    length, margin = now.mean("d"), now.mean("rewards/margins")
    spread = (now.mean("d d") - length**2) * (now.mean("m m") - margin**2)
    correlation = (now.mean("d m") - length * margin) / math.sqrt(spread) if spread > 0 else 0.0
    if abs(correlation) < 0.8:
        return None
    return (
        f"margins follow the length of answers (correlation {correlation:.2f}; chosen ones have {length:+.1f} tokens "
        "more on average): what is learned is length. Balance lengths in the data, or take loss_type sigmoid_norm"
    )


CHECKS: list[Callable[[Findings], str | None]] = [nothing_learned, chosen_falls, memorised, ends_drift, length_drives]


class HealthWatch:
    """Looks at every step's sums; warns of each failure once, and of spikes.

    Args:
        run: at its start or where it goes on.
        schedule: the learning rate of each step from 1.
    """

    def __init__(self, run: Run, schedule: Callable[[int], float]):
        self._run, self._schedule = run, schedule
        # they tell distances from a reference that stays where it is
        self._checks = list(CHECKS) if run.config.needs_reference and not run.config.sync_ref_model else []
        self._stretches = [Stretch()]
        self._length = min(max(run.state.total_steps // 8, _LEAST_STEPS), _MOST_STEPS)
        self._spikes = Spikes()

    def take(self, step: int, totals: PairTotals, grad_norm: float) -> None:
        """Take in a step that was not skipped."""
        if step == 1 and self._run.config.needs_reference:
            self._compare_starts(totals)
        if text := self._spikes.take(step, totals.means()["dpo_loss"], grad_norm):
            logger.warning("%s", text)
        current = self._stretches[-1]
        current.add(totals)
        at_end = step == self._run.state.total_steps
        if at_end and current.steps < _LEAST_STEPS // 2 and len(self._stretches) > 1:
            self._stretches.pop()  # too short to tell anything
        if current.steps == self._length or at_end:
            rates = sum(map(self._schedule, range(1, step + 1))) if nothing_learned in self._checks else 0.0
            self._look(Findings(self._run.config, self._stretches, step, at_end, rates))
            self._stretches.append(Stretch())

    def _look(self, found: Findings) -> None:
        for check in list(self._checks):
            if (text := check(found)) is not None:
                self._checks.remove(check)
                original = check is nothing_learned and found.config.learning_rate == _MINIMIND_RATE
                logger.log(logging.INFO if original else logging.WARNING, "%s", text)

    def _compare_starts(self, totals: PairTotals) -> None:
        distance = totals.health["distance"] / totals.pairs
        if distance > 0.2:
            logger.warning(
                "policy and reference are far apart at step 1: %.2f nats a token. Is the reference "
                "(ref_model_name_or_path) the model that the policy starts from? Is dropout on?",
                distance,
            )


class Spikes:
    """Losses and gradient norms far above those of the steps before."""

    _REMEMBERED, _LEAST, _QUIET = 50, 20, 50

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self._REMEMBERED)
        self._norms: deque[float] = deque(maxlen=self._REMEMBERED)
        self._quiet_until = 0

    def take(self, step: int, loss: float, grad_norm: float) -> str | None:
        """What to say of a step; at most once in 50 steps."""
        text = None
        if len(self._losses) >= self._LEAST and step >= self._quiet_until:
            usual_loss, usual_norm = median(self._losses), median(self._norms)
            if loss > max(5 * usual_loss, usual_loss + 2):
                text = f"loss {loss:.2f} at step {step}, {usual_loss:.2f} before"
            elif grad_norm > 20 * usual_norm:
                text = f"gradient norm {grad_norm:.2f} at step {step}, {usual_norm:.2f} before"
        self._losses.append(loss)
        self._norms.append(grad_norm)
        if text is None:
            return None
        self._quiet_until = step + self._QUIET
        return f"{text}: look at its pairs (shuffle and seed give them again), or lower learning_rate"
