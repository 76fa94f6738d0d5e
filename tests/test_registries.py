"""What docs/architecture.md says of additions: a loss and a tracker from outside, through the registries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, register_tracker_class
from helpers_run import Inputs, lines, train_here, train_lines
from torch import Tensor

from minimind_dpo import TrainConfig, train_dpo
from minimind_dpo.config import load_config
from minimind_dpo.errors import UserError
from minimind_dpo.losses import LOSSES, Setting, register_loss
from minimind_dpo.losses.bounds import POSITIVE


def squared_loss(logits: Tensor, beta: float, squared_target: float) -> Tensor:
    """(beta logits - target)^2."""
    return (beta * logits - squared_target) ** 2


@pytest.fixture
def squared() -> Iterator[None]:
    register_loss("squared", squared_target=Setting(1.0, "where beta logits are to be", POSITIVE))(squared_loss)
    yield
    del LOSSES["squared"]


def test_a_loss_from_outside(inputs: Inputs, tmp_path: Path, squared: None, capsys: pytest.CaptureFixture[str]) -> None:
    """At the start the logits are 0, so the loss is the target's square; its setting is a flag and kept on a resume."""
    flags = inputs.flags(tmp_path, loss_type="squared", learning_rate=1e-3, squared_target=2.0, save_steps=1)
    assert train_here(flags) == 0
    losses = [line["loss"] for line in train_lines(tmp_path)]
    assert losses[0] == pytest.approx(4, abs=1e-6)
    assert losses[-1] < 3.999
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["squared_target"] == 2.0
    with pytest.raises(UserError, match="squared_target: was 2.0, is 1.0"):
        train_here(inputs.flags(tmp_path, loss_type="squared", learning_rate=1e-3, save_steps=1))
    with pytest.raises(SystemExit):
        load_config(["--help"])
    assert "--squared_target FLOAT" in capsys.readouterr().out


def test_a_loss_from_outside_in_python(inputs: Inputs, tmp_path: Path, squared: None) -> None:
    config = TrainConfig(
        model_name_or_path=str(inputs.model),
        train_data=[str(inputs.train_data)],
        output_dir=str(tmp_path),
        loss_type=["squared", "sft"],
        loss_weights=[1.0, 0.5],
        loss_settings={"squared_target": 3.0},
        max_steps=1,
        logging_steps=1,
    )
    assert train_dpo(config)["steps"] == 1
    (line,) = train_lines(tmp_path)
    assert line["losses/squared"] == pytest.approx(9, abs=1e-5)
    assert line["loss"] == pytest.approx(9 + 0.5 * line["losses/sft"], abs=1e-5)


def test_a_loss_that_nobody_registered(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss_type: 'squared' is none of sigmoid"):
        train_here(inputs.flags(tmp_path, loss_type="squared"))


def test_a_setting_of_the_run_is_no_loss_s_own(inputs: Inputs, tmp_path: Path) -> None:
    register_loss("seeded", seed=Setting(1.0, "taken", POSITIVE))(lambda logits, seed: logits * seed)
    try:
        with pytest.raises(ValueError, match="seed"):
            load_config(inputs.flags(tmp_path))
    finally:
        del LOSSES["seeded"]


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
