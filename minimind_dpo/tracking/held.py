"""What a tracker has of a run that is resumed: a session that was killed may have told it more, or less, than is kept.

A tracker that writes ahead of the checkpoint would get steps twice, and one that buffers (wandb and swanlab offline:
up to a block of their files) would have a gap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minimind_dpo.tracking.records import read_records

logger = logging.getLogger(__name__)

Has = Callable[[int, str], bool]  # whether a tracker has a name's value of a step


def nothing(step: int, name: str) -> bool:
    """Of a run that is new to it."""
    return False


def held_by(name: str, own: Any, output_dir: Path, all_told: set[tuple[int, str]]) -> Has:
    """What a started tracker has of the run that it goes on with.

    Args:
        name: of the tracker.
        own: accelerate's tracker.
        output_dir: the run directory.
        all_told: (step, name) of what it was told up to the checkpoint: it has that, if it can't be asked.
    """
    points = all_told
    try:
        if name == "wandb" and not own.tracker.offline:
            begins = own.tracker.starting_step
            return lambda step, _: step < begins
        if name in _POINTS:
            points = set(_POINTS[name](own, output_dir))
    except Exception as error:  # each tracker has errors of its own
        logger.warning(
            "report_to: what %s has of the run can't be read (%s: %s); it is taken to have all",
            name,
            type(error).__name__,
            error,
        )
    return lambda step, name: (step, name) in points


def _wandb(own: Any, output_dir: Path) -> Iterator[tuple[int, str]]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # late: only where it is asked for

    run = own.tracker.id
    for path in output_dir.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb"):
        for data in read_records(path):
            row = Record.FromString(data).history
            for item in row.item:
                yield row.step.num, item.key or item.nested_key[0]


def _swanlab(own: Any, output_dir: Path) -> Iterator[tuple[int, str]]:
    """Online it has nothing to be asked for: what is sent twice is ignored there."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record  # late: only where it is asked for

    if own.tracker.mode == "online":
        return
    run = own.tracker.id
    for path in output_dir.glob(f"swanlog/run-*-{run}/run-{run}.swanlab"):
        for data in read_records(path):
            record = Record.FromString(data)
            for value in (record.scalar, record.media):
                if value.key:
                    yield value.step, value.key


def _trackio(own: Any, output_dir: Path) -> Iterator[tuple[int, str]]:
    from trackio.sqlite_storage import SQLiteStorage  # late: only where it is asked for

    for row in SQLiteStorage.get_logs(own.run_name, own.tracker.name, run_id=own.tracker.id):
        yield from ((row["step"], name) for name in row)


def _mlflow(own: Any, output_dir: Path) -> Iterator[tuple[int, str]]:
    import mlflow  # late: only where it is asked for

    client, run = mlflow.MlflowClient(), own.tracker.info.run_id
    for name in client.get_run(run).data.metrics:
        yield from ((metric.step, name) for metric in client.get_metric_history(run, name))
    for table in client.list_artifacts(run):
        for file in client.list_artifacts(run, table.path) if table.is_dir else ():
            if (step := Path(file.path).stem.removeprefix("step-")).isdigit():
                yield int(step), table.path


_POINTS: dict[str, Callable[[Any, Path], Iterator[tuple[int, str]]]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
