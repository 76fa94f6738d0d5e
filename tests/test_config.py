"""The configuration: yaml and flags, types, all problems at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from minimind_dpo.config import TrainConfig, as_told, identity, load_config, make_config, save_config
from minimind_dpo.engine import trackers
from minimind_dpo.errors import UserError
from minimind_dpo.training.settle import identity_before

REQUIRED = ["--model_name_or_path", "m", "--train_data", "a.jsonl"]


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model_name_or_path: m\ntrain_data: a.jsonl\nlearning_rate: 4e-8\nshuffle: false\nbeta: 0.3\n")
    config = load_config(["--config", str(file), "--beta", "0.2", "--shuffle=true", "--train_data", "b", "c"])
    assert config.learning_rate == 4e-8  # a string to yaml 1.1
    assert (config.beta, config.shuffle, config.train_data) == (0.2, True, ["b", "c"])


def test_defaults_are_trls_with_a_cosine() -> None:
    config = load_config(REQUIRED)
    assert (config.loss_type, config.beta, config.learning_rate, config.max_length) == (["sigmoid"], 0.1, 1e-6, 1024)
    assert (config.per_device_train_batch_size, config.max_grad_norm, config.weight_decay) == (4, 1.0, 0.01)
    assert (config.lr_scheduler_type, config.warmup_ratio, config.completion_mask, config.num_train_epochs) == (
        "cosine",
        0.1,
        "final_turn",
        1.0,
    )


@pytest.mark.parametrize(("schedule", "warmup"), [("minimind", 0.0), ("constant", 0.0), ("linear", 0.1)])
def test_warmup_follows_the_schedule(schedule: str, warmup: float) -> None:
    assert load_config([*REQUIRED, "--lr_scheduler_type", schedule]).warmup_ratio == warmup
    assert load_config([*REQUIRED, "--lr_scheduler_type", "cosine", "--warmup_ratio", "0"]).warmup_ratio == 0.0


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("run_name: 2026-11-26", "run_name", "2026-11-26"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 1_000", "run_name", "1_000"),
        ("run_name: yes", "run_name", "yes"),
        ("run_name: null", "run_name", None),
        ("run_name: ~", "run_name", None),
        ("run_name:", "run_name", None),
        ("model_name_or_path: 1.10", "model_name_or_path", "1.10"),
        ("train_data: [2026-11-26, 0o17]", "train_data", ["2026-11-26", "0o17"]),
        ("shuffle: no", "shuffle", False),
        ("learning_rate: 1e-6", "learning_rate", 1e-6),
        ("learning_rate: 0", "learning_rate", 0.0),
        ("max_steps: 12", "max_steps", 12),
        ("report_to: []", "report_to", []),
    ],
)
def test_yaml_scalars_are_what_stands_there(tmp_path: Path, line: str, name: str, value: object) -> None:
    file = tmp_path / "c.yaml"
    others = {"model_name_or_path": "m", "train_data": "a"}
    file.write_text("".join(f"{key}: {other}\n" for key, other in others.items() if key != name) + line + "\n")
    assert getattr(load_config(["--config", str(file)]), name) == value


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("beta: 0.1\nbeta: 0.2", "beta is there twice"),
        ("beta:", "beta: is empty"),
        ("output_dir: ~", "output_dir: is empty"),
        ("max_steps: 0", "max_steps: must be positive, or -1, is 0"),
        ("max_steps: -2", "max_steps: must be positive, or -1, is -2"),
        ("- beta", "expected 'key: value' lines"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, line: str, part: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=part):
        load_config(["--config", str(file), *REQUIRED])


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/runs/x\nresume: ~/runs/x/checkpoints/step-000001\n")
    config = load_config(["--config", "~/c.yaml", *REQUIRED])
    assert config.output_dir == str(tmp_path / "runs/x")
    assert config.resume == str(tmp_path / "runs/x/checkpoints/step-000001")


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
        "label_smoothing: must be in [0, 0.5)",
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
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "minimind"}, "lr_scheduler_type minimind has no warmup"),
        ({"eval_steps": 5}, "eval_steps: needs eval_data"),
        ({"seed": True}, "seed: expected a number, found true"),
        ({"train_data": [1]}, "train_data: expected one text"),
        ({"beta": None}, "beta: is empty"),
        ({"weight_decay": -0.1}, "weight_decay: must be 0 or more, is -0.1"),
        ({"warmup_ratio": 1.5, "lr_scheduler_type": "cosine"}, r"warmup_ratio: must be in \[0, 1\]"),
        ({"lora_dropout": 1.0}, r"lora_dropout: must be in \[0, 1\)"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm: must be 0 or more"),
        ({"reference": "none"}, "reference: 'none' is none of auto, live"),
        ({"learning_rte": 1}, "learning_rte: unknown key; did you mean learning_rate"),
    ],
)
def test_wrong_values(values: dict[str, object], part: str) -> None:
    with pytest.raises(UserError, match=part):
        make_config({"model_name_or_path": "m", "train_data": "a"} | values)


def test_saved_config_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(model_name_or_path="m", train_data=["数据.jsonl"], warmup_ratio=0.2, shuffle=False)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_missing_config_file() -> None:
    with pytest.raises(UserError, match="--config nowhere.yaml: no such file, nor a name"):
        load_config(["--config", "nowhere.yaml"])


def test_every_setting_says_whether_a_resume_may_change_it() -> None:
    assert [
        setting.name for setting in fields(TrainConfig) if not isinstance(setting.metadata.get("identity"), bool)
    ] == []
    assert [setting.name for setting in fields(TrainConfig) if not setting.metadata.get("help")] == []


def test_every_number_has_bounds() -> None:
    numbers = [setting for setting in fields(TrainConfig) if str(setting.type).startswith(("int", "float"))]
    assert [setting.name for setting in numbers if setting.metadata["bounds"] is None] == []


def test_defaults_keep_their_own_bounds() -> None:
    config = make_config({"model_name_or_path": "m", "train_data": "a"})
    assert make_config(as_told(config)) == make_config(vars(config)) == config


def test_identity_is_what_checkpoints_hold() -> None:
    """The keys and values that former versions wrote: their checkpoints must resume."""
    config = make_config({"model_name_or_path": "m", "train_data": "a", "lora_r": 4, "lora_target_modules": "q_proj"})
    now = identity(config)
    absent_then = {
        "dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        "loss_weights": [],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
        "deterministic": False,
        "torch_compile": False,
    }
    assert {name: now.pop(name) for name in absent_then} == absent_then
    decided_later = {name: now.pop(name) for name in ("matmul", "weight_rounding")}
    assert decided_later == {"matmul": "auto", "weight_rounding": "auto"}
    assert (
        identity_before() | {"matmul": "torch", "weight_rounding": "nearest", "dtype": "float32"} == identity_before()
    )
    assert now == {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "shuffle": True,
        "seed": 42,
        "lora_r": 4,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj"],
        "optim": "adamw",
        "quantization": "none",
        "eval_split": None,
        "template_date": "2024-07-26",
    }


@pytest.mark.parametrize("told", ["none", None, [], ["none"], "None"])
def test_none_is_the_empty_list(told: object) -> None:
    config = make_config({"model_name_or_path": "m", "train_data": "a", "report_to": told, "eval_data": told})
    assert (config.report_to, config.eval_data) == ([], [])


def test_trackers_are_a_list(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("report_to: wandb\n")
    yaml = ["--config", str(file)]
    assert load_config(REQUIRED).report_to == []
    assert load_config([*REQUIRED, *yaml]).report_to == ["wandb"]
    assert load_config([*REQUIRED, *yaml, "--report_to", "none"]).report_to == []
    assert load_config([*REQUIRED, *yaml, "--report_to", "tensorboard", "trackio"]).report_to == [
        "tensorboard",
        "trackio",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wnadb"], "report_to: 'wnadb' is no tracker; there are aim, .* wandb, or none"),
        (["none", "wandb"], "report_to: 'none' is no tracker"),
        (["absent_one"], r"report_to: absent_one is not installed \(pip install absent-one\)"),
    ],
)
def test_trackers_that_cannot_start(names: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [*trackers.LoggerType.list(), "absent_one"]
    monkeypatch.setattr(trackers.LoggerType, "list", lambda: known)
    with pytest.raises(UserError, match=message):
        trackers.check_trackers(names)


def test_a_tracker_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "mine", object)  # as accelerate's register_tracker_class does
    trackers.check_trackers(["mine", "wandb"])


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--data_path", "here it is train_data"),
        ("--dataset_name", "here it is train_data"),
        ("--max_seq_len", "here it is max_length"),
        ("--use_peft", "here it is lora_r"),
        ("--bf16", "is the launcher's business: --mixed_precision bf16"),
        ("--config_file", "is the launcher's business: --accelerate_config"),
        ("--adam_beta1", "has no counterpart here: AdamW's betas are"),
        ("--hidden_size", "has no counterpart here: read off the weights"),
        ("--learning_rte", "unknown key; did you mean learning_rate?"),
        ("--nothing_like_it", "unknown key; see minimind-dpo train --help"),
    ],
)
def test_names_of_other_tools_are_known(flag: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        load_config([*REQUIRED, flag, "5"])
    assert f"{flag}: {part}" in str(error.value)


def test_a_launchers_key_has_no_place_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("num_processes: 4\n")
    with pytest.raises(UserError, match="num_processes: is the launcher's business: .* write it on the command line"):
        load_config(["--config", str(tmp_path / "c.yaml"), *REQUIRED])


def test_a_switch_alone_means_true() -> None:
    config = load_config(["--gradient_checkpointing", *REQUIRED, "--deterministic"])
    assert config.gradient_checkpointing and config.deterministic and not config.use_dora
    assert not load_config([*REQUIRED, "--shuffle", "false"]).shuffle
