"""Several runs on one page: what differs in their settings first, then figures, then one line a run in every chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from minimind_dpo.files import write_text
from minimind_dpo.report.curves import TONES, Chart, Line
from minimind_dpo.report.facts import in_order, number, text
from minimind_dpo.report.html import render
from minimind_dpo.report.page import read_warnings, title_of
from minimind_dpo.report.reading import Metrics, held_out_sets, read_metrics, read_settings

_UNTOLD = {"output_dir", "run_name", "tracker_run_id"}  # differ by nature
_CHARTS = (  # metric, title, how it is read
    ("eval_loss", "Held-out loss", "Lower is better, among runs with the same loss_type and beta."),
    ("loss", "Training loss", "What each run lowers."),
    ("eval_rewards/accuracies", "Held-out accuracy by reward", "Share of pairs that reward the chosen answer more."),
    ("eval_logps/accuracies", "Held-out accuracy by likelihood", "What replies follow; comparable between all runs."),
    (
        "rewards/accuracies",
        "Training accuracy by reward",
        "Share of a step's pairs that reward the chosen answer more.",
    ),
    ("eval_rewards/margins", "Held-out margin", "In units of each run's own beta."),
    ("rewards/margins", "Training margin", "In units of each run's own beta."),
    ("eval_logps/chosen", "Held-out log-probability of chosen answers", "The run that falls least has kept most."),
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("learning_rate", "Learning rate", "Of each step."),
    ("pairs_per_second", "Speed (pairs a second)", "All processes of a run together."),
)


class _RunFiles(NamedTuple):
    """What is read of a run."""

    metrics: Metrics
    summary: dict[str, Any]
    told: dict[str, Any]
    warnings: tuple[list[dict[str, Any]], int]


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that compares runs to `path`, and return it.

    Raises:
        UserError: a directory is no run's, or a file that its run wrote is damaged.
    """
    runs = [_read(run_dir) for run_dir in run_dirs]
    names = _names(run_dirs)
    page = render(
        "comparison.html",
        charts(names, [run.metrics for run in runs]),
        names=names,
        differences=differences([run.told for run in runs]),
        figures=_figures(runs),
        warned=[(name, *run.warnings) for name, run in zip(names, runs, strict=True) if run.warnings[1]],
    )
    write_text(path, page)
    return path


def _read(run_dir: Path) -> _RunFiles:
    record = run_dir / "record"
    data, surroundings = read_settings(record / "data.json"), read_settings(record / "environment.json")
    told = {name: value for name, value in read_settings(run_dir / "config.yaml").items() if name not in _UNTOLD}
    told |= {f"data: {name} pairs": part.get("pairs") for name, part in data.items()}
    told |= {f"environment: {name}": value for name, value in surroundings.items()}
    return _RunFiles(read_metrics(run_dir), read_settings(run_dir / "summary.json"), told, read_warnings(record))


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """What runs are called; where two have one name, by their directories."""
    names = [title_of(run_dir, read_settings(run_dir / "config.yaml")) for run_dir in run_dirs]
    counts = Counter(names)
    return [name if counts[name] == 1 else str(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)]


def differences(told: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of what is not the same in all; – where a run was not told it."""
    names = dict.fromkeys(name for settings in told for name in settings)
    rows = [(name, [text(settings[name]) if name in settings else "–" for settings in told]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _figures(runs: Sequence[_RunFiles]) -> list[tuple[str, list[str]]]:
    """(figure, its value in each run): of the last evaluation, then of the whole run."""
    evaluated = [
        {
            name.removeprefix("eval_"): curve.values[-1]
            for name, curve in run.metrics.curves.items()
            if name.startswith("eval_") and len(curve.values)
        }
        for run in runs
    ]
    metrics = in_order({name: None for values in evaluated for name in values})
    rows = [(f"eval_{name}", [number(values.get(name, "–")) for values in evaluated]) for name in metrics]
    for name, logged in (("steps", "step"), ("pairs_seen", "pairs_seen"), ("seconds", ""), ("peak_memory_gib",) * 2):
        rows.append((name, [number(run.summary.get(name, run.metrics.last.get(logged, "–"))) for run in runs]))
    return rows


def charts(names: Sequence[str], metrics: Sequence[Metrics]) -> list[Chart]:
    """A chart for each metric that any run has, with one line a run."""
    sets = {prefix: name for run in metrics for prefix, name in held_out_sets(run.curves).items()}
    wanted = [
        (prefix + key.removeprefix("eval_"), f"{title} ({name})" if name else title, reading)
        for key, title, reading in _CHARTS
        for prefix, name in (sets.items() if key.startswith("eval_") else [("", "")])
    ]
    found = []
    for key, title, reading in wanted:
        lines = [
            Line(name, tone, run.curves[key])
            for name, run, tone in zip(names, metrics, cycle(TONES), strict=False)
            if len(run.curves[key].steps)
        ]
        found += [Chart(title, reading, lines)] if lines else []
    return found
