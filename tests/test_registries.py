"""What docs/architecture.md says of additions: a loss and a tracker from outside, through the registries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from helpers_run import Inputs, lines, train_here, train_lines
from torch import Tensor

from minimind_dpo.config import LOSS_TYPES
from minimind_dpo.errors import UserError
from minimind_dpo.objective.losses import LOSSES, Loss, preference_logits, register_loss


def squared_loss(*logps: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(beta logits - 1)^2."""
    return (beta * preference_logits(*logps) - 1) ** 2


@pytest.fixture
def squared() -> Iterator[None]:
    register_loss("squared", Loss(squared_loss))
    yield
    del LOSSES["squared"]
    LOSS_TYPES.remove("squared")


def test_a_loss_from_outside(inputs: Inputs, tmp_path: Path, squared: None) -> None:
    """At the start the logits are 0, so the loss is 1; then it falls."""
    assert train_here(inputs.flags(tmp_path, loss_type="squared", learning_rate=1e-3)) == 0
    losses = [line["loss"] for line in train_lines(tmp_path)]
    assert losses[0] == pytest.approx(1, abs=1e-6)
    assert losses[-1] < 0.999
    with pytest.raises(ValueError, match="there is a loss called 'squared'"):
        register_loss("squared", Loss(squared_loss))


def test_a_loss_that_nobody_registered(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss_type: 'squared' is none of sigmoid"):
        train_here(inputs.flags(tmp_path, loss_type="squared"))


def test_a_loss_without_smoothing_says_so(inputs: Inputs, tmp_path: Path, squared: None) -> None:
    with pytest.raises(UserError, match="label_smoothing: has no meaning for loss_type squared"):
        train_here(inputs.flags(tmp_path, loss_type="squared", label_smoothing=0.1))


def test_every_loss_is_a_choice() -> None:
    assert list(LOSSES) == LOSS_TYPES


class Notebook(GeneralTracker):
    """A tracker as a user writes it: it keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False
    configuration: dict[str, Any] = {}
    logged: list[dict[str, Any]] = []

    def __init__(self, project: str):
        super().__init__()
        self.project = project

    @property
    def tracker(self) -> list[dict[str, Any]]:
        return self.logged

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        type(self).configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append({"step": step} | values)


def test_a_tracker_from_outside(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notebook, "logged", [])
    register_tracker_class(Notebook)
    try:
        flags = inputs.flags(tmp_path, eval_data=inputs.eval_data, report_to="notebook")
        assert train_here(flags) == 0
    finally:
        del LOGGER_TYPE_TO_CLASS["notebook"]
    assert Notebook.configuration["beta"] == 0.5
    assert Notebook.configuration["train_data"] == f'["{inputs.train_data}"]'
    places = {"step", "epoch", "pairs_seen"}
    assert [{name: value for name, value in line.items() if name not in places} for line in Notebook.logged] == [
        {name: value for name, value in line.items() if name not in places} for line in lines(tmp_path)
    ]
    assert [line["step"] for line in Notebook.logged] == [0, 1, 2, 3, 3]
