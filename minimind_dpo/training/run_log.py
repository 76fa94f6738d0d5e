"""Where the numbers of a run go while it is trained, and how that is opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from minimind_dpo.checkpoints.directory import set_aside_later
from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import save_config
from minimind_dpo.engine.ranks import decide
from minimind_dpo.files import sweep, writing
from minimind_dpo.objective.sums import PairTotals
from minimind_dpo.tracking.trackers import Trackers, start_trackers
from minimind_dpo.training.callbacks import Callback, tell_values
from minimind_dpo.training.metrics import MetricsFile
from minimind_dpo.training.progress import Clock, StepProgress
from minimind_dpo.training.record import Record
from minimind_dpo.training.run import Run
from minimind_dpo.training.schedule import is_due
from minimind_dpo.training.spread import PairRewards, describe_extremes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLog:
    """Where the numbers of a run go: metrics.jsonl on the main process, the trackers, the console, callbacks.

    Attributes:
        metrics, callbacks: none on all other processes; the latter are the user's own.
        samples: the policy's replies; None there too, and where it is asked for none.
        progress: of the steps, as it is seen.
        page: keeps what the page of the run shows beside them; None on all other processes.
    """

    metrics: MetricsFile | None = None
    samples: MetricsFile | None = None
    trackers: Trackers = field(default_factory=Trackers)
    callbacks: Sequence[Callback] = ()
    progress: StepProgress | None = None
    page: Record | None = None

    def record(self, run: Run, values: dict[str, float]) -> None:
        """Write the values of the run's present step, with its place."""
        step = run.state.step
        place = {"epoch": step / run.order.steps_per_epoch, "pairs_seen": run.order.pairs_seen(step)}
        line = {"step": step} | place | values
        if self.metrics is not None:
            self.metrics.append(line)
        self.trackers.record(line)
        if self.progress is not None:
            self.progress.log(values)
        tell_values(self.callbacks, step, place | values)

    def show(self, totals: PairTotals, clock: Clock) -> None:
        """Advance what is seen of the run by a step."""
        if self.progress is not None:
            self.progress.show(totals, clock)

    def record_replies(self, replies: list[dict[str, Any]]) -> None:
        """Write what the policy answered at the run's present step, as `training/replies.py` has it."""
        if self.samples is not None:
            for reply in replies:
                self.samples.append(reply)
        if replies:
            columns = [name for name in replies[0] if name != "step"]
            rows = [[reply[name] for name in columns] for reply in replies]
            self.trackers.table("replies", columns, rows, int(replies[0]["step"]))

    def record_rewards(self, run: Run, rewards: Mapping[str, PairRewards]) -> None:
        """Keep how an evaluation's rewards are spread, and after the last step the pairs at both ends. Collective."""
        last = run.state.step == run.state.total_steps
        pairs: list[dict[str, Any]] = []
        for name, of_set in rewards.items():
            values = of_set.gather(run.engine.sum)
            pairs += describe_extremes(run, name, values) if last else []
            if self.page is not None:
                self.page.add_rewards(name, values)
        if self.page is not None and last:
            self.page.write_pairs(pairs)
        self.refresh_page()

    def refresh_page(self) -> None:
        """Write the page as the run stands, if there is time for it."""
        if self.page is not None:
            self.page.refresh_page()

    def keeping_warnings(self) -> AbstractContextManager[Any]:
        """While the run trains: its warnings are kept for the page."""
        return self.page or nullcontext()

    def lacks_evaluation(self, run: Run) -> bool:
        """Whether the run's present step has an evaluation, which is not recorded. Collective."""
        step = run.state.step
        has_one = run.eval_sets and (step in (0, run.state.total_steps) or is_due(run.config.eval_steps, step))
        if not has_one:
            return False
        lines = [] if self.metrics is None else self.metrics.lines()
        return not decide(any(line["step"] == step and eval_metrics(line) for line in lines))

    def sync(self, state: TrainerState) -> None:
        """Make what is written survive a power cut, and note in `state` how much it is."""
        if self.metrics is not None:
            state.metrics = self.metrics.written()
            self.metrics.sync()


def open_run(run: Run, resumed: bool, callbacks: Sequence[Callback] = ()) -> RunLog:
    """Prepare the run directory for the steps to come, and start the trackers. Collective."""
    metrics = samples = page = None
    if run.engine.is_main:
        with writing(run.output_dir, "output_dir"):
            sweep(run.output_dir)
            if resumed:
                set_aside_later(run.output_dir / "checkpoints", run.state.step)
            save_config(run.config, run.output_dir / "config.yaml")
        last_step = run.state.step if resumed else None
        metrics = MetricsFile(run.output_dir / "metrics.jsonl", last_step)
        samples = MetricsFile(run.output_dir / "samples.jsonl", last_step) if run.prompts else None
        _compare(metrics, run.state)
        page = Record(run, resumed)
    trackers = start_trackers(run.config, run.engine, run.state, [] if metrics is None else metrics.lines())
    run.engine.wait()
    return RunLog(metrics, samples, trackers, callbacks if run.engine.is_main else (), page=page)


def _compare(metrics: MetricsFile, state: TrainerState) -> None:
    """Say so if the lines of before a resume are not those that were written."""
    if state.metrics is not None and metrics.written() != state.metrics:
        logger.warning(
            "%s: the lines up to step %d are not those that were written: %d there, %d written; what is missing stays "
            "missing in the report",
            metrics.path,
            state.step,
            metrics.written()[0],
            state.metrics[0],
        )


def eval_metrics(line: dict[str, Any]) -> dict[str, float]:
    """What a line of metrics.jsonl has of an evaluation."""
    return {name: value for name, value in line.items() if name.startswith("eval_")}
