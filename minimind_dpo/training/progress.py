"""How fast a run goes, and its progress bar."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.objective.sums import PairTotals
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)


def progress_bar(run: Run) -> Any:
    """A bar of optimizer steps, on the main process."""
    return tqdm(
        total=run.state.total_steps,
        initial=run.state.step,
        unit="step",
        dynamic_ncols=True,
        disable=not run.engine.is_main,
    )


def show(progress: Any, totals: PairTotals, clock: Clock) -> None:
    """Advance the bar by a step."""
    means = totals.means()
    progress.update()
    progress.set_postfix_str(
        f"loss {means['loss']:.4f} acc {means['rewards/accuracies']:.2f} "
        f"margin {means['rewards/margins']:.3f} {clock.rates()[0]:.1f} pairs/s",
        refresh=False,
    )


# what is told of an evaluation, most telling first: name, and how it is written
_TOLD = (
    ("loss", "{:.4f}"),
    ("rewards/accuracies", "{:.1%}"),
    ("rewards/margins", "{:.3f}"),
    ("logps/accuracies", "{:.1%}"),
    ("logps/chosen", "{:.2f}"),
)


def tell_evaluation(run: Run, values: dict[str, float]) -> None:
    """A line on the console for each set of held-out pairs."""
    with tqdm.external_write_mode(file=sys.stderr):  # not into the bar
        for prefix, name in _eval_prefixes(values):
            told = ", ".join(f"{metric} {text.format(values[prefix + metric])}" for metric, text in _TOLD)
            logger.info("evaluation at step %d%s: %s", run.state.step, name and f" of {name}", told)


def tell_end(run: Run, summary: dict[str, Any], begun: int, report: Path) -> None:
    """Say what was done, what it changed on held-out pairs, and where things are."""
    steps, best = run.state.step, run.state.best
    for line in _before_and_after(summary.get("eval_before", {}), summary.get("eval_after", {})):
        logger.info(line)
    if best is not None:
        of_it = ", which model/ is of" if summary["model_step"] == best["step"] else ""
        logger.info("best by %s: %.4g at step %d%s", best["metric"], best["value"], best["step"], of_it)
    done = f"done: {steps} steps" + (f", {steps - begun} of them now" if begun else "")
    logger.info(
        "%s, %d pairs, %.1f s; model in %s, report in %s",
        done if begun < steps else f"nothing was left to do: the run had already gone its {steps} steps",
        summary["pairs_seen"],
        run.state.seconds,
        run.output_dir / "model",
        report,
    )


def _before_and_after(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Lines that compare a run's first and last evaluation."""
    lines = []
    for prefix, name in _eval_prefixes(before):
        lines.append(f"held-out pairs{name and f' ({name})'}, before -> after:")
        for metric, text in _TOLD:
            values = [each.get(prefix + metric) for each in (before, after)]
            shown = ["-" if value is None else text.format(value) for value in values]
            lines.append(f"  {metric:<20}{shown[0]:>9} -> {shown[1]:>9}")
    return lines


def _eval_prefixes(values: dict[str, float]) -> list[tuple[str, str]]:
    """What the metrics of each set of held-out pairs begin with, and its name."""
    found = [name.removesuffix("dpo_loss") for name in values if name.endswith("_dpo_loss")]
    return [(prefix, prefix.removeprefix("eval_").removesuffix("_")) for prefix in found]


class Clock:
    """Wall time of the run over all its sessions, and rates since the last `restart`."""

    def __init__(self, state: TrainerState):
        self._begin = time.perf_counter() - state.seconds
        self.restart()

    def restart(self) -> None:
        """Begin to measure rates anew."""
        self._since, self._pairs, self._tokens = time.perf_counter(), 0.0, 0.0

    def count(self, totals: PairTotals) -> None:
        """Take in the pairs of a step."""
        self._pairs += totals.pairs
        self._tokens += totals.tokens

    def rates(self) -> tuple[float, float]:
        """Pairs and tokens a second, over all ranks."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        return self._pairs / elapsed, self._tokens / elapsed

    def store(self, state: TrainerState) -> None:
        """Write the wall time into the run's state."""
        state.seconds = time.perf_counter() - self._begin
