"""The charts of a page: which metrics lie in one, what its title is, and how it is read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from minimind_dpo.report.reading import Curve, held_out_sets
from minimind_dpo.report.thinning import picked, thin

TONES = ("blue", "orange", "green", "violet", "red", "teal", "brown", "grey")
_ROWS = 12  # of a chart's table


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        label: in the legend.
        tone: a colour of the page's style.
        curve: its points.
        ends: "low" or "high" where the line is an edge of a band that is shaded.
    """

    label: str
    tone: str
    curve: Curve
    ends: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with what is said of it.

    Attributes:
        title: with the unit.
        reading: how it is read, in a sentence or two.
        lines: its curves; none is empty.
        level: (value, label) of a dotted line that something is held against.
        limits: of the vertical axis, where they are known.
    """

    title: str
    reading: str
    lines: list[Line]
    level: tuple[float, str] | None = None
    limits: tuple[float, float] | None = None

    def drawn(self) -> dict[str, Any]:
        """What the page's script draws."""
        lines = [{"label": line.label, "tone": line.tone, "ends": line.ends} | thin(line.curve) for line in self.lines]
        return {"lines": lines, "level": self.level, "limits": self.limits}

    def told(self) -> str:
        """The chart in words, for those who do not see it."""
        parts = [f"{line.label}: {_course(line.curve)}" for line in self.lines]
        return f"Line chart over optimizer steps. {'. '.join(parts)}."

    def rows(self) -> list[list[str]]:
        """The same numbers as a table: a step, and each curve's value then or at its last point before."""
        steps = sorted({step for line in self.lines for step in line.curve.steps})
        return [[f"{step:.0f}", *(_value_at(line.curve, step) for line in self.lines)] for step in picked(steps, _ROWS)]


def figure(value: float) -> str:
    """A number with four figures that count."""
    return f"{value:.4g}"


def _course(curve: Curve) -> str:
    steps, values = curve
    if len(values) == 1:
        return f"{figure(values[0])} at step {steps[0]:.0f}"
    return (
        f"from {figure(values[0])} at step {steps[0]:.0f} to {figure(values[-1])} at step {steps[-1]:.0f}, "
        f"lowest {figure(min(values))}, highest {figure(max(values))}"
    )


def _value_at(curve: Curve, step: float) -> str:
    place = bisect_right(curve.steps, step)
    return figure(curve.values[place - 1]) if place else ""


def curves(found: Mapping[str, Curve], starts_at_ln2: bool = True, refers: bool = True) -> list[Chart]:
    """Every chart that has at least one point.

    Args:
        found: the curve of each metric; of each set of held-out pairs also `length_correlation` and `margins/0` to 4.
        starts_at_ln2: a loss of ln 2 knows no preference.
        refers: rewards are told against a reference.
    """
    charts = [*_of_success(found, starts_at_ln2, refers), *_of_health(found), *_of_replies(found), *_of_cost(found)]
    return [chart for chart in charts if chart.lines]


def lines_of(found: Mapping[str, Curve], *wanted: tuple[str, str, str]) -> list[Line]:
    """The curves that have points, of (metric, label, tone) each; "low " or "high " before a label makes it an edge."""
    lines = []
    for key, label, tone in wanted:
        curve, first = found.get(key), label.split(" ")[0]
        if curve is not None and len(curve.steps):
            ends = first if first in ("low", "high") else ""
            lines.append(Line(label.removeprefix(f"{ends} "), tone, curve, ends))
    return lines


def of_sets(found: Mapping[str, Curve], *wanted: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """(metric, label, tone) of every set of held-out pairs, of metrics without `eval_`; labels tell several apart."""
    sets, tones = held_out_sets(found), cycle(TONES[1:])
    return [
        (prefix + metric, f"{label} ({name})" if name else label, next(tones) if len(sets) > 1 else tone)
        for metric, label, tone in wanted
        for prefix, name in sets.items()
    ]


def _of_success(found: Mapping[str, Curve], starts_at_ln2: bool, refers: bool) -> Iterable[Chart]:
    yield Chart(
        "Loss (nats a pair)",
        "What training lowers. Held-out loss should fall with it; where it turns up while training loss still falls, "
        "pairs are being learned by heart.",
        lines_of(found, ("loss", "training", "blue"), *of_sets(found, ("loss", "held-out", "orange"))),
        level=(math.log(2), "ln 2: knows no preference") if starts_at_ln2 else None,
    )
    yield Chart(
        "Parts of the loss (unweighted)",
        "Each loss of the sum on its own: one that stands still has too little weight, or nothing left to teach.",
        lines_of(found, *_parts(found)),
    )
    yield Chart(
        "Accuracy (share of pairs)",
        "Pairs whose chosen answer is preferred: by reward (a tie, as before the first step, counts 0), and by the "
        "model's own likelihood a token, which is what replies follow. One half is chance.",
        lines_of(
            found,
            ("rewards/accuracies", "training: chosen reward higher", "blue"),
            *of_sets(
                found,
                ("rewards/accuracies", "held-out: chosen reward higher", "orange"),
                ("logps/accuracies", "held-out: chosen likelier", "green"),
            ),
        ),
        level=(0.5, "one half"),
        limits=(-0.03, 1.03),
    )
    yield Chart(
        f"Rewards (beta × summed {'log-ratio to the reference' if refers else 'log-probability'})",
        "How far the policy has moved from its reference on either side. The two should part; where both fall "
        "together, it unlearns the chosen answers too.",
        lines_of(found, ("rewards/chosen", "chosen", "blue"), ("rewards/rejected", "rejected", "orange")),
        level=(0.0, "as the reference"),
    )
    yield Chart(
        "Margin (chosen reward − rejected reward)",
        "Should rise above 0 and level off. One that grows without end belongs to a rate that is too high, or to pairs "
        "that something trivial tells apart.",
        lines_of(
            found, ("rewards/margins", "training", "blue"), *of_sets(found, ("rewards/margins", "held-out", "orange"))
        ),
        level=(0.0, "none"),
    )


def _of_health(found: Mapping[str, Curve]) -> Iterable[Chart]:
    yield Chart(
        "Log-probability of answers (nats, summed)",
        "What the policy itself thinks of whole answers. Stop where that of held-out chosen answers begins to fall "
        "steadily while accuracy by likelihood no longer rises.",
        lines_of(
            found,
            ("logps/chosen", "training chosen", "blue"),
            *of_sets(
                found, ("logps/chosen", "held-out chosen", "orange"), ("logps/rejected", "held-out rejected", "violet")
            ),
        ),
    )
    for prefix, name in held_out_sets(found).items():
        quantiles = ("5 %", "grey"), ("low 25 %", "blue"), ("median", "blue"), ("high 75 %", "blue"), ("95 %", "grey")
        yield Chart(
            f"Held-out margins, by quantile{f' ({name})' if name else ''}",
            "Half of the pairs lie in the shaded band, nine tenths between the outer lines. Pairs below 0 are ranked "
            "the wrong way round.",
            lines_of(found, *((f"{prefix}margins/{place}", *line) for place, line in enumerate(quantiles))),
            level=(0.0, "none"),
        )
    yield Chart(
        "Margin and length (correlation)",
        "Near 0, length plays no part. Towards 1 or −1 what is learned is the length of an answer.",
        lines_of(
            found, *of_sets(found, ("length_correlation", "held-out: margin with difference of lengths", "orange"))
        ),
        level=(0.0, "none"),
        limits=(-1.05, 1.05),
    )
    yield Chart(
        "Gradient norm (before clipping)",
        "Single peaks are normal; a level that keeps rising, or peaks with a loss that does not come back, ask for a "
        "lower learning rate.",
        lines_of(found, ("grad_norm", "gradient norm", "blue")),
    )


def _of_replies(found: Mapping[str, Curve]) -> Iterable[Chart]:
    yield Chart(
        "Replies: length (tokens)",
        "Mean of the policy's replies to the same prompts. A jump up or down is a change of manner: read the replies.",
        lines_of(found, ("eval_replies/tokens", "tokens a reply", "orange")),
    )
    yield Chart(
        "Replies: ended and repeated (shares)",
        "Replies that end by themselves, and 4-grams that a reply has said before. Falling ends or rising repetition "
        "tell of a policy that has moved too far.",
        lines_of(
            found,
            ("eval_replies/ended", "replies ended", "orange"),
            ("eval_replies/repetition", "4-grams repeated", "violet"),
        ),
        limits=(-0.03, 1.03),
    )


def _of_cost(found: Mapping[str, Curve]) -> Iterable[Chart]:
    yield Chart(
        "Learning rate",
        "What each step used. A run is judged by its end: while the rate is high, the curves above are noisier.",
        lines_of(found, ("learning_rate", "learning rate", "blue")),
    )
    yield Chart(
        "Speed (pairs a second)",
        "Since the line before, all processes together; it dips where a checkpoint or an evaluation lies between.",
        lines_of(found, ("pairs_per_second", "pairs a second", "blue")),
    )


def _parts(found: Mapping[str, Curve]) -> list[tuple[str, str, str]]:
    """(metric, its name, a tone) of each part of a loss that has several."""
    names = [name for name in found if name.startswith("losses/")]
    return [(name, name.removeprefix("losses/"), tone) for name, tone in zip(names, cycle(TONES), strict=False)]
