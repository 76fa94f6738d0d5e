"""The curves of a report, drawn from the lines of `metrics.jsonl` as inline SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[list[float], list[float]]  # optimizer steps, values

BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#f97316", "#1f9d62", "#8b8f98"  # readable on white and on black


def curves(rows: list[dict[str, Any]], starts_at_ln2: bool = True, refers: bool = True) -> list[tuple[str, str]]:
    """(title, inline SVG) of every curve that has at least one finite point.

    Args:
        rows: of metrics.jsonl.
        starts_at_ln2: a loss of ln 2 knows no preference.
        refers: rewards are told against a reference.
    """

    def lines(*names: tuple[str, str, str]) -> list[tuple[str, str, Series]]:
        found = [(label, colour, series(rows, key)) for key, label, colour in names]
        return [line for line in found if line[2][0]]

    plots: list[tuple[str, list[tuple[str, str, Series]], Callable[[Axes], None] | None]] = [
        (
            "Loss (nats a pair)",
            lines(("loss", "training", BLUE), ("eval_loss", "held-out", ORANGE)),
            _ln2 if starts_at_ln2 else None,
        ),
        ("Parts of the loss (unweighted)", lines(*_parts(rows)), None),
        (
            "Accuracy (share of pairs)",
            lines(
                ("rewards/accuracies", "training: chosen reward higher", BLUE),
                ("eval_rewards/accuracies", "held-out: chosen reward higher", ORANGE),
                ("eval_logps/accuracies", "held-out: chosen likelier", GREEN),
            ),
            _half,
        ),
        (
            f"Rewards (beta × summed {'log-ratio to the reference' if refers else 'log-probability'})",
            lines(("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)),
            _zero,
        ),
        (
            "Margin (chosen reward − rejected reward)",
            lines(("rewards/margins", "training", BLUE), ("eval_rewards/margins", "held-out", ORANGE)),
            _zero,
        ),
        ("Learning rate", lines(("learning_rate", "learning rate", BLUE)), None),
        ("Gradient norm (before clipping)", lines(("grad_norm", "gradient norm", BLUE)), None),
    ]
    return [(title, _svg(title, found, extra)) for title, found, extra in plots if found]


def _ln2(axes: Axes) -> None:
    axes.axhline(math.log(2), color=GREY, linewidth=1, linestyle=":", label="ln 2: knows no preference")


def _half(axes: Axes) -> None:
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set_ylim(-0.03, 1.03)


def _zero(axes: Axes) -> None:
    axes.axhline(0.0, color=GREY, linewidth=1, linestyle=":")


def _parts(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(metric, its name, a colour) of each part of a loss that has several."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("losses/"))
    for name, colour in zip(names, cycle((BLUE, ORANGE, GREEN, GREY)), strict=False):
        yield name, name.removeprefix("losses/"), colour


def series(rows: list[dict[str, Any]], key: str) -> Series:
    """Steps and finite values of one metric, in the order of the log."""
    points = [(row.get("step"), row.get(key)) for row in rows]
    kept = [(float(x), float(y)) for x, y in points if is_finite(x) and is_finite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a logged value is a number that can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _svg(title: str, lines: list[tuple[str, str, Series]], extra: Callable[[Axes], None] | None) -> str:
    """One small line chart; text stays text and takes the page's own colour, so that it follows dark mode."""
    # late: only the one rank that writes a report draws
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.subplots()
        if extra is not None:
            extra(axes)
        for label, colour, (steps, values) in lines:
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker=marker, markersize=3)
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue
