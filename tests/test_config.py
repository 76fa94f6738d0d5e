"""The configuration: yaml and flags, types, all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from minimind_dpo.config import TrainConfig, load_config, make_config, save_config
from minimind_dpo.errors import UserError

REQUIRED = ["--model_name_or_path", "m", "--train_data", "a.jsonl"]


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model_name_or_path: m\ntrain_data: a.jsonl\nlearning_rate: 4e-8\nshuffle: false\nbeta: 0.3\n")
    config = load_config(["--config", str(file), "--beta", "0.2", "--shuffle=true", "--train_data", "b", "c"])
    assert config.learning_rate == 4e-8  # a string to yaml 1.1
    assert (config.beta, config.shuffle, config.train_data) == (0.2, True, ["b", "c"])


def test_defaults_are_minimind() -> None:
    config = load_config(REQUIRED)
    assert (config.loss_type, config.beta, config.learning_rate, config.max_length) == ("sigmoid_norm", 0.1, 4e-8, 1024)
    assert (config.per_device_train_batch_size, config.max_grad_norm, config.weight_decay) == (4, 1.0, 0.01)
    assert (config.lr_scheduler_type, config.completion_mask, config.num_train_epochs) == (
        "minimind",
        "all_assistant",
        1.0,
    )


def test_every_problem_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rte: 1\nbeta: much\nlabel_smoothing: 0.7\nloss_type: sigmod\n")
    with pytest.raises(UserError) as error:
        load_config(["--config", str(file), "--max_lenght", "5", "--shuffle", "perhaps", "--max_steps", "1.5"])
    message = str(error.value)
    for part in [
        "learning_rte: unknown key; did you mean learning_rate?",
        "--max_lenght: unknown key; did you mean max_length?",
        "beta: expected a number, found 'much'",
        "label_smoothing: must be below 0.5",
        "loss_type: 'sigmod' is none of",
        "shuffle: expected true or false",
        "max_steps: expected a whole",
        "model_name_or_path: missing",
        "train_data: missing",
    ]:
        assert part in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing: has no meaning for loss_type hinge"),
        ({"beta": 0}, "beta: must be positive"),
        ({"beta": float("nan")}, "beta: must be positive"),
        ({"warmup_ratio": 0.1}, "lr_scheduler_type minimind has no warmup"),
        ({"eval_steps": 5}, "eval_steps: needs eval_data"),
        ({"seed": True}, "seed: expected a number, found true"),
        ({"train_data": [1]}, "train_data: expected one text"),
        ({"beta": None}, "beta: is empty"),
    ],
)
def test_wrong_values(values: dict[str, object], part: str) -> None:
    with pytest.raises(UserError, match=part):
        make_config({"model_name_or_path": "m", "train_data": "a"} | values)


def test_saved_config_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(model_name_or_path="m", train_data=["数据.jsonl"], learning_rate=5e-7, shuffle=False)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_missing_config_file() -> None:
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read"):
        load_config(["--config", "nowhere.yaml"])
