"""TRL's DPO configuration, translated: every field of it has an answer, and the run is the same."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_run import REPOSITORY, environment

from minimind_dpo.config import TrainConfig, make_config
from minimind_dpo.config.foreign import ABSENT, LAUNCHED, RENAMED
from minimind_dpo.config.from_trl import DEFAULTS, LORA_DEFAULTS, OPTIMIZERS, kind_of_key, translate
from minimind_dpo.errors import UserError

trl = pytest.importorskip("trl")
THEIRS = {
    field.name: field for config in (trl.DPOConfig, trl.ScriptArguments, trl.ModelConfig) for field in fields(config)
}


@pytest.mark.parametrize("name", THEIRS)
def test_every_argument_of_trl_has_an_answer(name: str) -> None:
    assert kind_of_key(name) is not None
    assert f"`{name}`" in (REPOSITORY / "docs" / "from_trl.md").read_text("utf-8")


def test_no_name_has_two_answers() -> None:
    tables = [set(RENAMED), set(LAUNCHED), set(ABSENT)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_defaults_that_differ_are_written_out() -> None:
    """Of every argument with the same name, and of those that are renamed by hand."""
    ours, by_hand = TrainConfig(), {"save_total_limit": None, "warmup_ratio": THEIRS["warmup_steps"].default}
    differ = {}
    for name, field in THEIRS.items():
        if kind_of_key(name) != "same" or not hasattr(ours, name) or field.name.startswith(("lora_", "use_")):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        if str(getattr(default, "value", default)) != str(getattr(ours, name)) and default is not None:
            differ[name] = default
    told_apart = {
        "optim",
        "report_to",
        "project",
        "dtype",
        "dataloader_num_workers",
        "output_dir",
        "model_name_or_path",
    }
    assert OPTIMIZERS[str(THEIRS["optim"].default)] == ours.optim and "none" == THEIRS["report_to"].default
    assert {name: value for name, value in differ.items() if name not in told_apart} == {
        name: value for name, value in DEFAULTS.items() if name not in by_hand
    }
    assert DEFAULTS["warmup_ratio"] == by_hand["warmup_ratio"] == 0
    assert {name: THEIRS[name].default for name in LORA_DEFAULTS} == LORA_DEFAULTS


def test_a_configuration_becomes_the_same_run() -> None:
    theirs: dict[str, Any] = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "dataset_name": "trl-lib/ultrafeedback_binarized",
        "learning_rate": 5e-7,
        "max_steps": 200,
        "warmup_steps": 20,
        "optim": "adamw_torch_fused",
        "eval_strategy": "steps",
        "eval_steps": 50.0,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2],
        "bf16": True,
        "padding_free": False,
        "full_determinism": True,
        "precompute_ref_log_probs": True,
        "lora_r": 8,
    }
    ours, lines = translate(theirs)
    config = make_config(ours)
    assert (config.train_data, config.eval_data) == (
        ["trl-lib/ultrafeedback_binarized:train"],
        ["trl-lib/ultrafeedback_binarized:test"],
    )
    assert (config.learning_rate, config.warmup_ratio, config.lr_scheduler_type) == (5e-7, 0.1, "linear")
    assert (config.num_train_epochs, config.per_device_train_batch_size, config.weight_decay) == (3.0, 8, 0.0)
    assert (config.eval_steps, config.save_steps, config.save_total_limit) == (50, 500, 0)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])
    assert config.deterministic and config.reference == "cache" and config.gradient_checkpointing
    assert config.lora_r is None  # without use_peft TRL trains every weight, whatever lora_r is
    assert [line.split("; ")[0].split(": ") for line in lines] == [[name, kind_of_key(name)] for name in theirs]
    said = dict(line.split(": ", 1) for line in lines)
    assert said["bf16"] == "the launcher's business; --mixed_precision bf16"
    assert said["learning_rate"] == "same" and said["dataset_name"].startswith("renamed; train_data: ")
    assert said["padding_free"].startswith("not here; nothing is padded")


def test_lora() -> None:
    config = make_config(
        translate(
            {"model_name_or_path": "m", "dataset_name": "a/b", "use_peft": True, "lora_r": 8, "load_in_4bit": True}
        )[0]
    )
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.quantization) == (8, 32, 0.05, "nf4")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"optim": "lion_32bit"}, "optim: lion_32bit is not here; there are adafactor, adamw"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: polynomial is not here"),
        ({"learning_rte": 1}, "none of TRL 1.16's arguments of a DPO run: learning_rte"),
    ],
)
def test_what_would_be_another_run_is_refused(theirs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        translate(theirs)


def test_what_has_to_be_set_by_hand_is_said() -> None:
    ours, lines = translate({"warmup_steps": 100, "save_steps": 0.25, "eval_strategy": "epoch"})
    assert ours == DEFAULTS
    assert "set warmup_ratio to the share that 100 steps are of all" in lines[0]
    assert "set save_steps to a number of steps" in lines[1] and "set eval_steps to the steps of an epoch" in lines[2]


def test_the_program(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text("model_name_or_path: m\ndataset_name: a/b\nlearning_rate: 5e-7\nbeta: 0.2\n")
    command = [sys.executable, "-m", "minimind_dpo.config.from_trl", str(tmp_path / "trl.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment())
    assert done.returncode == 0, done.stderr
    config = make_config(yaml.safe_load(done.stdout))
    assert (config.learning_rate, config.beta, config.train_data) == (5e-7, 0.2, ["a/b:train"])
    assert "dataset_name: renamed; train_data: ['a/b:train']" in done.stderr
    command[-1] = str(tmp_path / "none.yaml")
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment())
    assert done.returncode == 2 and "not a readable yaml or JSON file" in done.stderr
