"""Draws docs/pictures/losses.svg: every loss and its gradient against a pair's margin.

    python scripts/draw_losses.py [--output docs/pictures/losses.svg]

One pair, whose margin comes half from the chosen answer and half from the rejected one. What is fixed: beta 1, answers
of one token each, so that a sum is a mean, and a reference that gives both -2.5 nats. A loss over the step sees a step
of pairs that are all like this one. The same matplotlib writes the same bytes again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from minimind_dpo.losses import LOSSES
from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses

BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#f97316", "#1f9d62", "#8b8f98"  # readable on white and on black
OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "losses.svg"
REFERENCE = -2.5  # nats, of either answer
MARGINS = torch.linspace(-4, 4, 201, dtype=torch.float64)
SMOOTHING = 0.1
LEAST_SMOOTHING = {"exo_pair": 0.001}  # which is not defined at 0
COLUMNS = 6
STYLE: dict[str, Any] = {
    "svg.hashsalt": "losses",
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.3,
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}


class Curve(NamedTuple):
    """A loss at each of `MARGINS`, and its gradient in the policy's log-probabilities of the two answers."""

    losses: Tensor
    chosen_slopes: Tensor
    rejected_slopes: Tensor


def curve(name: str, label_smoothing: float) -> Curve:
    """A loss along the margin; pairs that it would look at together one at a time."""
    settings = {setting: declared.default for setting, declared in LOSSES[name].settings.items()}
    preference = Preference({name: 1.0}, beta=1.0, label_smoothing=label_smoothing, settings=settings)
    parts = []
    for margins in MARGINS.split(1 if LOSSES[name].over_step else len(MARGINS)):
        chosen = (REFERENCE + margins / 2).requires_grad_()
        rejected = (REFERENCE - margins / 2).requires_grad_()
        reference, one = torch.full_like(margins, REFERENCE), torch.ones_like(margins)
        pairs = PairLogps(chosen, rejected, reference, reference, -chosen, one, one, 0 * one, one)
        losses = dpo_losses(pairs, preference).total
        slopes = torch.autograd.grad(losses.sum(), (chosen, rejected), materialize_grads=True)
        parts.append(torch.stack([losses.detach(), *slopes]))
    return Curve(*torch.cat(parts, dim=1))


def draw(axes: Axes, name: str) -> None:
    """One small picture."""
    plain = curve(name, LEAST_SMOOTHING.get(name, 0.0))
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.axvline(0, color=GREY, linewidth=0.5)
    axes.plot(MARGINS, plain.losses, color=BLUE, linewidth=1.8, label="loss")
    if "label_smoothing" in LOSSES[name].names:
        smoothed = curve(name, SMOOTHING).losses
        axes.plot(MARGINS, smoothed, "--", color=BLUE, linewidth=1, label=f"loss, label_smoothing {SMOOTHING}")
    axes.plot(MARGINS, plain.chosen_slopes, color=GREEN, linewidth=1.2, label="gradient in log π(chosen)")
    axes.plot(MARGINS, plain.rejected_slopes, color=ORANGE, linewidth=1.2, label="gradient in log π(rejected)")
    axes.set_title(name, fontsize=9)
    axes.set(xlim=(-4, 4), ylim=(-2.2, 5.2), xticks=[-3, 0, 3])
    axes.patch.set_alpha(0)


def picture() -> Figure:
    """All losses, in the order of `LOSSES`; on no ground of its own, so that a page may be light or dark."""
    rows = -(-len(LOSSES) // COLUMNS)
    figure = Figure(figsize=(10.5, 1.8 * rows), layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True).ravel()
    for axes, name in zip(panels, LOSSES, strict=False):
        draw(axes, name)
    for axes in panels[len(LOSSES) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.supxlabel("margin (logits), nats", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), options.output.open("w", encoding="utf-8") as file:
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        FigureCanvasSVG(picture()).print_svg(file, metadata=metadata)


if __name__ == "__main__":
    main()
