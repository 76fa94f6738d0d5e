"""What a notebook shows: a run's figure and its summary. (A real kernel has run docs/python.md by hand.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_run import Inputs

from minimind_dpo import plot_run, train_dpo
from minimind_dpo.config import load_config
from minimind_dpo.errors import UserError
from minimind_dpo.report.figure import RunFigure

PNG = b"\x89PNG"


def drawn(figure: RunFigure) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """The lines of each panel by their labels, without those of a policy that knows no preference."""
    return {
        axes.get_title(): {
            str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[call-overload]
            for line in axes.lines
            if line.get_label() != "knows no preference"
        }
        for axes in figure.axes
    }


def test_a_finished_run(inputs: Inputs, tmp_path: Path) -> None:
    config = load_config(inputs.flags(tmp_path, eval_data=inputs.eval_data, eval_steps=2))
    summary = train_dpo(config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    figure = plot_run(tmp_path)
    panels = drawn(figure)
    assert list(panels) == ["loss", "accuracy", "margin", "log-probability of chosen answers"]
    trained, held_out = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert panels["loss"]["training"] == ([1, 2, 3], [line["loss"] for line in trained])
    assert panels["margin"]["held out"] == ([0, 2, 3], [line["eval_rewards/margins"] for line in held_out])
    assert figure._repr_png_().startswith(PNG)
    shown = summary._repr_html_()  # type: ignore[attr-defined]
    before, after = summary["eval_before"]["eval_loss"], summary["eval_after"]["eval_loss"]
    assert f"<td>eval_loss</td><td>{before:.4g} → {after:.4g}</td>" in shown
    assert "src='data:image/png;base64,iVBOR" in shown and str(tmp_path / "report.html") in shown


def test_a_run_under_way(tmp_path: Path) -> None:
    """A line that is half written, a number that is not finite, no configuration yet."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert drawn(plot_run(tmp_path))["loss"] == {"training": ([1], [0.7])}
    with pytest.raises(UserError, match="no metrics of a run can be read there"):
        plot_run(tmp_path / "elsewhere")
