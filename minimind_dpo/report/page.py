"""A run's report: one self-contained HTML page made from the files of a run directory.

Everything on the page is read from `metrics.jsonl`, `summary.json`, `config.yaml`, `record/` and, where a run has
them, `replies.jsonl` and `samples.jsonl`. A piece that is missing leaves its part of the page out; the same files give
the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minimind_dpo.files import write_text
from minimind_dpo.report.curves import Chart, curves
from minimind_dpo.report.facts import (
    before_note,
    data_table,
    evaluation_table,
    headlines,
    number,
    percent,
    refers,
    settings,
    starts_at_ln2,
    text,
)
from minimind_dpo.report.html import render
from minimind_dpo.report.reading import Metrics, read_extra, read_metrics, read_settings
from minimind_dpo.report.samples import STEPS, coloured, histograms, judged, live_replies
from minimind_dpo.report.thinning import MOST

_MOST_WARNINGS = 30
_FEW = 5  # logged steps


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write a run's page to `path`, by default `run_dir/report.html`, and return where it is.

    `replies.jsonl` holds one object a line: "prompt", "before", "after", "before_ok", "after_ok"; `samples.jsonl` those
    made on the way: "step", "prompt", "reply".

    Raises:
        UserError: `run_dir` has no `metrics.jsonl`, or a file that the run itself wrote there is damaged.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    summary, config = read_settings(run_dir / "summary.json"), read_settings(run_dir / "config.yaml")
    replies = [row for name in ("replies.jsonl", "samples.jsonl") for row in read_extra(run_dir / name, "replies")]
    figures = summary or metrics.evaluations()
    told, left = settings(config)
    parts: dict[str, Any] = {
        **_recorded(run_dir / "record", metrics),
        "evaluation": [(name, cells) for name, *cells in evaluation_table(figures)],
        "judged": judged(replies),
        "live": live_replies(replies),
        "told": told,
        "left": left,
    }
    page = render(
        "run.html",
        run_charts(metrics, config),
        title=title_of(run_dir, config),
        finished=bool(summary),
        headlines=headlines(figures, metrics.last, parts["judged"]),
        curve_note=_curve_note(metrics, config),
        before=before_note(config),
        token_steps=STEPS,
        sections=_sections(parts),
        **parts,
    )
    path = path or run_dir / "report.html"
    write_text(path, page)
    return path


def title_of(run_dir: Path, config: dict[str, Any]) -> str:
    """What a run is called."""
    return str(config.get("run_name") or run_dir.resolve().name)


def run_charts(metrics: Metrics, config: dict[str, Any]) -> list[Chart]:
    """The charts of a run."""
    return curves(metrics.curves, starts_at_ln2(config), refers(config))


def read_warnings(record: Path) -> tuple[list[dict[str, Any]], int]:
    """The last warnings of a run, and how many there are."""
    rows = read_extra(record / "warnings.jsonl", "warnings")
    return rows[-_MOST_WARNINGS:], len(rows)


def _recorded(record: Path, metrics: Metrics) -> dict[str, Any]:
    """What the files in record/ give, for the template; the spread of rewards over the run goes to `metrics`."""
    rewards = read_extra(record / "rewards.jsonl", "spread of rewards")
    for row in rewards:
        prefix = f"eval_{row['set']}_" if row.get("set") else "eval_"
        for place, value in enumerate(row.get("margins", ())):
            metrics.curves[f"{prefix}margins/{place}"].add(row["step"], value)
        metrics.curves[f"{prefix}length_correlation"].add(row["step"], row.get("length_correlation"))
    by_set = _by_set(rewards)
    warnings, count = read_warnings(record)
    data = read_settings(record / "data.json")
    return {
        "spreads": [(name, pictures) for name, rows in by_set.items() if (pictures := histograms(rows))],
        "lengths": [
            (name, rows[-1].get("length_correlation"), [_length_row(group) for group in rows[-1].get("by_length", ())])
            for name, rows in by_set.items()
        ],
        "pairs": [
            pair | {"place": Path(pair["place"]).name} | {side: coloured(pair[side]) for side in ("chosen", "rejected")}
            for pair in read_extra(record / "pairs.jsonl", "pairs")
        ],
        "warnings": warnings,
        "warning_count": count,
        "data": data_table(data) if data else [],
        "data_parts": list(data),
        "environment": [(name, text(value)) for name, value in read_settings(record / "environment.json").items()],
    }


def _by_set(rewards: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of rewards.jsonl of each set of held-out pairs."""
    names = dict.fromkeys(str(row.get("set", "")) for row in rewards)
    return {name: [row for row in rewards if str(row.get("set", "")) == name] for name in names}


def _length_row(group: dict[str, Any]) -> tuple[str, list[str]]:
    low, high = group["from"], group["to"]
    name = _signed(low) if low == high else f"{_signed(low)} to {_signed(high)}"
    return name, [number(group["pairs"]), percent(group["accuracy"]), f"{group['margin']:.3g}"]


def _signed(tokens: int) -> str:
    return f"{tokens:+d}".replace("-", "−") if tokens else "0"


def _curve_note(metrics: Metrics, config: dict[str, Any]) -> str:
    """What to know of the curves before they are read."""
    if (longest := max((len(curve.steps) for curve in metrics.curves.values()), default=0)) > MOST:
        return f"Lines are means of {longest // MOST} logged steps or more, shaded from the lowest to the highest. "
    logged, every = len(metrics.curves["loss"].steps), config.get("logging_steps")
    few = (
        f"Only {logged} training step{'s were' if logged != 1 else ' was'} logged (logging_steps: {every}): a smaller "
    )
    return f"{few}number shows more. " if 0 < logged < _FEW and isinstance(every, int) and every > 1 else ""


def _sections(parts: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(anchor, name, whether it is there) of each part after the curves."""
    return [
        ("rewards", "Rewards", bool(parts["spreads"])),
        ("length", "Length", bool(parts["lengths"])),
        ("evaluation", "Evaluation", bool(parts["evaluation"])),
        ("pairs", "Worst and best pairs", bool(parts["pairs"])),
        ("replies", "Replies", bool(parts["judged"] or parts["live"])),
        ("data", "Data", bool(parts["data"])),
        ("configuration", "Configuration", bool(parts["told"] or parts["left"])),
        ("environment", "Environment", bool(parts["environment"])),
    ]
