"""What docs/losses.md says holds: its table, its example, and the picture."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_run import REPOSITORY, Inputs, train_lines

from minimind_dpo.losses import LOSSES
from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses

PAGE = (REPOSITORY / "docs" / "losses.md").read_text("utf-8")
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| [`")]
ROWS = {cells[0]: cells[2:] for cells in CELLS}
LAWS = {"1 / (4 beta²)": lambda beta: 1 / (4 * beta**2), "1 / (2 beta²)": lambda beta: 1 / (2 * beta**2)}


def test_the_table_is_right() -> None:
    """What a loss reads; and its value where the policy is its reference, if that says nothing of the policy itself."""
    assert list(ROWS) == [f"[`{name}`](#{name})" for name in LOSSES]
    yes = {True: "yes", False: "no"}
    for (name, loss), (reference, over_step, smoothing, start) in zip(LOSSES.items(), ROWS.values(), strict=True):
        assert (reference, over_step) == (yes[loss.needs_reference], yes[loss.over_step]), name
        assert smoothing == ("needed" if name == "exo_pair" else yes["label_smoothing" in loss.names]), name
        for beta in (0.1, 2.0):
            first, second = start_of(name, beta, [-40.0, -9.0]), start_of(name, beta, [-30.0, -8.0])
            assert (first == pytest.approx(second)) == bool(start), name
            if start:
                said = LAWS[start](beta) if start in LAWS else float(start)
                assert first == pytest.approx(said, abs=6e-4), name


def start_of(name: str, beta: float, chosen_logps: list[float]) -> float:
    """The mean loss of two pairs to which policy and reference give the same log-probabilities."""
    chosen, rejected, tokens = (torch.tensor(values).double() for values in (chosen_logps, [-31, -12], [20, 3]))
    zero = torch.zeros_like(chosen)
    same = PairLogps(chosen, rejected, chosen, rejected, -chosen, tokens, tokens + 1, zero, zero + 1)
    settings = {setting: declared.default for setting, declared in LOSSES[name].settings.items()}
    smoothing = 0.001 if name == "exo_pair" else 0.0
    preference = Preference({name: 1.0}, beta=beta, label_smoothing=smoothing, settings=settings)
    return dpo_losses(same, preference).total.mean().item()


@pytest.fixture
def unregistered() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def test_the_example_runs(
    inputs: Inputs, tmp_path: Path, unregistered: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there, but for the paths; at the start the policy is the reference, so its loss is ln 2."""
    (source,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    for theirs, ours in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", inputs.model),
        ("pairs.jsonl", inputs.train_data),
        ("runs/dpop", tmp_path / "run"),
    ):
        assert source.count(f'"{theirs}"') == 1
        source = source.replace(theirs, str(ours))
    names: dict[str, Any] = {}
    exec(compile(source, "docs/losses.md", "exec", dont_inherit=True), names)
    lines = train_lines(tmp_path / "run")
    assert lines[0]["losses/dpop"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["loss"] == pytest.approx(lines[0]["losses/dpop"] + 0.1 * lines[0]["losses/sft"], abs=1e-5)
    assert f"{names['summary']['steps']} steps" in capsys.readouterr().out
    # log-ratios of -1 and -3: the margin of 2 less 10 for the chosen answer that fell by 1
    fallen = names["dpop_loss"](torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5, dpop_lambda=10.0)
    assert fallen.item() == pytest.approx(math.log1p(math.exp(4)))


def test_the_picture() -> None:
    """It has every loss, in the size of a picture; its curves are the losses and their gradients."""
    svg = (REPOSITORY / "docs" / "pictures" / "losses.svg").read_text("utf-8")
    assert [name for name in re.findall(r">(\w+)</text>", svg) if name in LOSSES] == list(LOSSES)
    assert len(svg) < 200_000
    curve = runpy.run_path(str(REPOSITORY / "scripts" / "draw_losses.py"))["curve"]
    middle, right = 100, 150  # margins of 0 and 2
    for name in ("sigmoid", "aot"):  # all pairs at once, and one at a time
        losses, chosen, rejected = curve(name, 0.0)
        assert losses[[middle, right]].tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-2))])
        assert chosen[middle].item() == pytest.approx(-0.5) and rejected[middle].item() == pytest.approx(0.5)
    assert curve("sft", 0.0).rejected_slopes.eq(0).all()
