"""How fast a run goes, and what is seen of it meanwhile: a bar on a terminal, elsewhere a line for each logged step."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.engine.console import duration, shows_bars
from minimind_dpo.objective.sums import PairTotals
from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)


class StepProgress:
    """The optimizer steps of a run, on the main process; a context manager.

    While there is a bar, what is logged appears above it.
    """

    def __init__(self, run: Run):
        self._state, self._bars = run.state, run.engine.is_main and shows_bars()
        self._first, self._begin = run.state.step, time.monotonic()

    def __enter__(self) -> StepProgress:
        self._stack = ExitStack()
        if self._bars:
            self._stack.enter_context(logging_redirect_tqdm())
        self._bar: Any = self._stack.enter_context(
            tqdm(
                total=self._state.total_steps,
                initial=self._first,
                unit=" steps",
                dynamic_ncols=True,
                disable=not self._bars,
            )
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def show(self, totals: PairTotals, clock: Clock) -> None:
        """Advance the bar by a step."""
        if self._bars:
            self._bar.update()
            self._bar.set_postfix_str(brief(totals.means(), clock.rates()[0]), refresh=False)

    def log(self, values: dict[str, float]) -> None:
        """A line for the present step, where there is no bar; an evaluation has none. Only the main process is heard.

        Args:
            values: of the step, by the names of metrics.jsonl.
        """
        if self._bars or "loss" not in values:
            return
        state = self._state
        left = (time.monotonic() - self._begin) / max(state.step - self._first, 1) * (state.total_steps - state.step)
        logger.info(
            "step %*d/%d  %s  rate %.3g  %s left",
            len(str(state.total_steps)),
            state.step,
            state.total_steps,
            brief(values, values["pairs_per_second"]),
            values["learning_rate"],
            duration(left),
        )


def brief(values: dict[str, float], pairs_per_second: float) -> str:
    """What tells most of a step."""
    return (
        f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.2f}  "
        f"margin {values['rewards/margins']:.3f}  {pairs_per_second:.1f} pairs/s"
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
