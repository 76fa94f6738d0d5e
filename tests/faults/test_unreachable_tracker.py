"""Weights & Biases that gives no answer when a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.runs import Alone, flags_of, group, oracle
from helpers_forks import Forks
from helpers_run import Inputs

NOWHERE = {  # nobody listens on the port "discard" of this machine
    "WANDB_MODE": "online",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_API_KEY": "0" * 40,
    "WANDB_INIT_TIMEOUT": "3",
}


@pytest.mark.faults
@group(None)
def test_a_tracker_out_of_reach_ends_the_run_before_its_first_step(
    forks: Forks, alone: Alone, inputs: Inputs, tmp_path: Path
) -> None:
    """W&B out of reach: one message that names the way out, code 2; offline the same command has the same bits."""
    flags = flags_of(inputs, tmp_path, report_to="wandb")
    assert forks.run(flags, tmp_path, **NOWHERE) == [2]
    log = (tmp_path / "log").read_text("utf-8")
    assert log.count("minimind-dpo: error: report_to: wandb cannot start") == 1, log
    assert "WANDB_MODE=offline" in log and "Traceback" not in log, log
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert forks.run(flags, tmp_path, **NOWHERE | {"WANDB_MODE": "offline"}) == [0], (tmp_path / "log").read_text(
        "utf-8"
    )
    assert oracle(tmp_path) == alone(None)
