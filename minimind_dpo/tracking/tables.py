"""A table of texts, as each tracker shows one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Rows = Sequence[Sequence[Any]]


def write_table(tracker: str, own: Any, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    """Give a tracker a table at a step; one that has no tables is told nothing.

    Args:
        tracker: its name.
        own: accelerate's tracker.
        name: of the table.
        columns: their names.
        rows: each as long as `columns`; texts and numbers.
        step: the optimizer step.
    """
    if tracker in _WRITERS:
        _WRITERS[tracker](own, name, list(columns), [list(row) for row in rows], step)
    elif hasattr(own, "log_table"):  # as accelerate's trackers have it
        own.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)


def _wandb(own: Any, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    import wandb  # late: only where it is asked for

    own.log({name: wandb.Table(columns=[*columns], data=rows), "train/global_step": step}, step=step)


def _tensorboard(own: Any, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    own.tracker.add_text(name, text, global_step=step)
    own.tracker.flush()


def _cell(value: Any) -> str:
    """A value in a table of Markdown, whose page shows HTML as HTML."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("\r\n", "\n").replace("\n", "<br>")


def _swanlab(own: Any, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    import swanlab  # late: only where it is asked for

    table = swanlab.echarts.Table()
    table.add(columns, rows)
    own.log({name: table}, step=step)


def _trackio(own: Any, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    import trackio  # late: only where it is asked for

    own.log({name: trackio.Table(columns=columns, data=rows)}, step=step)


def _mlflow(own: Any, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """One file a step: mlflow appends to a file that is there."""
    import mlflow  # late: only where it is asked for

    by_column = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
    mlflow.log_table(by_column, f"{name}/step-{step:06d}.json", run_id=own.tracker.info.run_id)


_WRITERS: dict[str, Callable[[Any, str, list[str], list[list[Any]], int], None]] = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
