"""The trackers of a run: told what is logged, each value of a step once, whatever happened to earlier sessions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minimind_dpo.checkpoints.state import TrainerState
from minimind_dpo.config import TrainConfig
from minimind_dpo.engine.protocol import Engine
from minimind_dpo.engine.trackers import Guarded
from minimind_dpo.errors import UserError
from minimind_dpo.tracking.held import Has, held_by, nothing
from minimind_dpo.tracking.names import told
from minimind_dpo.tracking.starting import REMEDIES, project_of, run_id_of, starting_settings, store_settings
from minimind_dpo.tracking.tables import Rows, write_table


class _Teller:
    """One tracker, and what it has of the run."""

    def __init__(self, tracker: Guarded, has: Has):
        self._tracker, self._has = tracker, has
        self._last_step: int | None = None

    def record(self, line: dict[str, Any]) -> None:
        step = line["step"]
        values = told(self._tracker.name, line, has_places=step == self._last_step)
        self._last_step = step
        if new := {name: value for name, value in values.items() if not self._has(step, name)}:
            self._tracker.tell(lambda own: own.log(new, step=step))

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        if not self._has(step, name):
            tracker = self._tracker.name
            self._tracker.tell(lambda own: write_table(tracker, own, name, columns, rows, step))


class Trackers:
    """Every tracker that `report_to` names; on other than the main process there are none."""

    def __init__(self, tellers: Sequence[_Teller] = ()):
        self._tellers = tellers

    def record(self, line: dict[str, Any]) -> None:
        """Tell all of them a line of metrics.jsonl; lines come in the order of their steps."""
        for teller in self._tellers:
            teller.record(line)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Show a table of texts and numbers at an optimizer step, in those trackers that have tables."""
        for teller in self._tellers:
            teller.table(name, columns, rows, step)


def start_trackers(config: TrainConfig, engine: Engine, state: TrainerState, lines: list[dict[str, Any]]) -> Trackers:
    """Start what `report_to` names, note their names of the run in `state`, and tell them what they lack of it.

    Args:
        config: of the run.
        engine: on what it goes.
        state: of the run, at the step that it goes on from.
        lines: of metrics.jsonl up to that step; on the main process.

    Raises:
        UserError: a tracker cannot start.
    """
    if not config.report_to:
        return Trackers()
    tellers = []
    try:
        starting = starting_settings(config, state) if engine.is_main else {}
        for tracker in engine.start_trackers(project_of(config), starting):
            run_id = run_id_of(tracker.name, tracker.own)
            resumed = state.tracker_run_ids.get(tracker.name) == run_id
            store_settings(tracker.name, tracker.own, config, resumed)
            state.tracker_run_ids[tracker.name] = run_id
            has = partial(held_by, tracker.name, tracker.own, Path(config.output_dir))
            tellers.append(_Teller(tracker, has(_points(tracker.name, lines)) if resumed else nothing))
    except Exception as error:  # each tracker has errors of its own
        remedies = [REMEDIES[name] for name in config.report_to if name in REMEDIES]
        raise UserError(
            f"report_to: {' or '.join(config.report_to)} cannot start: {error}\n"
            + "; ".join([*remedies, "or use report_to: none"])
        ) from error
    trackers = Trackers(tellers)
    for line in lines:
        trackers.record(line)
    return trackers


def _points(tracker: str, lines: list[dict[str, Any]]) -> set[tuple[int, str]]:
    return {(line["step"], name) for line in lines for name in told(tracker, line, has_places=False)}
