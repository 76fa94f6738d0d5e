"""How fast a run goes, and its progress bar."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.objective.sums import PairTotals
from minimind_dpo.training.run import Run


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
