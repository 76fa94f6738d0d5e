"""A run in a notebook: its curves as a figure of matplotlib, its summary as a table with them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minimind_dpo.errors import UserError

# title -> the metric, and what a policy has that knows no preference
_PANELS = {
    "loss": ("loss", math.log(2)),
    "accuracy": ("rewards/accuracies", 0.5),
    "margin": ("rewards/margins", 0.0),
    "log-probability of chosen answers": ("logps/chosen", None),
}
_LN2_LOSSES = "sigmoid"  # and those whose names begin so: at the start they are ln 2


class RunFigure(Figure):
    """A figure that a notebook shows as it is, whatever backend is set; `savefig` writes it to a file."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(self).print_png(buffer)
        return buffer.getvalue()


def plot_run(run: str | Path) -> RunFigure:
    """The curves of a run, finished or under way: loss, accuracy, margin, chosen answers; training and held-out pairs.

    Args:
        run: the run directory.

    Raises:
        UserError: there is no metrics.jsonl in it.
    """
    lines = _read(Path(run).expanduser() / "metrics.jsonl")
    figure = RunFigure(figsize=(10, 5.6), layout="constrained")
    for axes, (title, (metric, neutral)) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for label, prefix, style in (("training", "", "-"), ("held out", "eval_", "o-")):
            steps, values = curve(lines, prefix + metric)
            if steps:
                axes.plot(steps, values, style, label=label, markersize=4, linewidth=1.5)
        if neutral is not None and axes.lines and (metric != "loss" or _starts_at_ln2(Path(run).expanduser())):
            axes.axhline(neutral, color="grey", linewidth=1, linestyle=":", label="knows no preference")
        axes.set(title=title, xlabel="optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def curve(lines: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is a number."""
    found = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def _starts_at_ln2(run: Path) -> bool:
    config = run / "config.yaml"
    return config.is_file() and f"loss_type:\n- {_LN2_LOSSES}" in config.read_text("utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that is just being written is left out."""
    try:
        complete = path.read_text("utf-8").split("\n")[:-1]
    except OSError as error:
        raise UserError(
            f"{path}: no metrics of a run can be read there ({error.strerror}); name its directory"
        ) from None
    return [json.loads(line) for line in complete]


class Summary(dict[str, Any]):
    """What `train_dpo` returns: summary.json of the run, which a notebook shows with the run's curves.

    Attributes:
        output_dir: the run directory.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        super().__init__(json.loads((self.output_dir / "summary.json").read_text("utf-8")))

    def _repr_html_(self) -> str:
        plain = {name: value for name, value in self.items() if not isinstance(value, dict)}
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{_text(value)}</td></tr>" for name, value in plain.items())
        before, after = self.get("eval_before", {}), self.get("eval_after", {})
        changes = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{_text(before[name])} → {_text(after.get(name))}</td></tr>"
            for name in before
        )
        picture = base64.b64encode(plot_run(self.output_dir)._repr_png_()).decode()
        report = html.escape(str(self.output_dir / "report.html"))
        return (
            f"<table>{rows}{changes}</table><img alt='curves of the run' src='data:image/png;base64,{picture}'>"
            f"<p>report: {report}</p>"
        )


def _text(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
