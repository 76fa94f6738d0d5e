"""How a configuration is told: a yaml file, flags that win over it, Python; every problem is reported at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from minimind_dpo.config.conversions import CONVERSIONS, to_number
from minimind_dpo.config.data import data_problems, to_columns, to_sets, to_sources
from minimind_dpo.config.flags import SETTINGS, kind_of, make_parser
from minimind_dpo.config.foreign import unknown
from minimind_dpo.config.losses import loss_problems, to_names, to_weights, with_loss_settings
from minimind_dpo.config.settings import TrainConfig, as_told, told_apart
from minimind_dpo.config.shipped import find_config
from minimind_dpo.config.text import TextLoader
from minimind_dpo.config.weights import weight_problems
from minimind_dpo.errors import UserError
from minimind_dpo.files import write_text
from minimind_dpo.losses import own_settings

_WITHOUT_WARMUP = ("minimind", "constant")  # schedules
_WARMUP_RATIO = 0.1  # of the others


def load_config(argv: Sequence[str], verb: str = "train") -> TrainConfig:
    """Build the configuration of `minimind-dpo train`, or another verb with its flags, from its arguments.

    `--config FILE` names a yaml file with the same keys, or a recipe of configs/dpo; the command line wins over it.

    Raises:
        UserError: with every problem found in the file, the flags and the values, one a line.
    """
    known, others = make_parser(verb).parse_known_args(argv)
    flags = {name: value for name, value in vars(known).items() if value is not None}
    names = [flag.split("=")[0] for flag in others if flag.startswith("--")]
    problems = [f"{name}: {unknown(name.lstrip('-'), _names())}" for name in names]
    if not problems and others:
        problems.append(f"{others[0]!r}: not a flag (flags are written --name value)")
    values: dict[str, Any] = {}
    if "config" in flags:
        values.update(_read_yaml(flags.pop("config"), problems))
    return make_config(values | flags, problems)


def make_config(values: Mapping[str, Any], problems: Sequence[str] = ()) -> TrainConfig:
    """Convert and check raw values (strings, yaml scalars, or those of another configuration).

    Raises:
        UserError: listing every unknown key, wrong type and wrong value, together with `problems` found before.
    """
    problems = list(problems)
    converted: dict[str, Any] = {}
    own: dict[str, float] = {}
    for name, value in told_apart(values).items():
        try:
            if name in own_settings():
                own[name] = to_number(value)
            else:
                converted[name] = _convert(name, value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    config = _resolve(TrainConfig(**converted, loss_settings=own))
    problems += _check(config, skip={problem.split(":")[0] for problem in problems})
    if problems:
        raise UserError("the configuration has problems:\n  " + "\n  ".join(problems))
    return config


def _resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with the defaults that follow from other settings, and paths from `~` on."""
    warmup = config.warmup_ratio
    if warmup is None:
        warmup = 0.0 if config.lr_scheduler_type in _WITHOUT_WARMUP else _WARMUP_RATIO
    paths = {name: os.path.expanduser(getattr(config, name)) for name in ("output_dir", "resume")}
    best = config.metric_for_best_model or ("loss" if config.load_best_model_at_end else None)
    return with_loss_settings(replace(config, warmup_ratio=warmup, metric_for_best_model=best, **paths))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as yaml; reading it back gives the same configuration."""
    write_text(path, yaml.safe_dump(as_told(config), sort_keys=False, allow_unicode=True))


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.load(find_config("--config", path, "dpo").read_text("utf-8"), TextLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid yaml: {error}") from None
    if loaded in (None, ""):
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: expected 'key: value' lines, found a {type(loaded).__name__}")
    problems += [f"{path}: {key}: {unknown(str(key), _names(), in_file=True)}" for key in loaded if key not in _names()]
    return {key: value for key, value in loaded.items() if key in _names()}


def _names() -> list[str]:
    """Of everything that can be set."""
    return [*SETTINGS, *own_settings()]


def _convert(name: str, value: Any) -> Any:
    """A value of the setting's own type; `none` is the absent value, or the empty list, where a setting has one."""
    if name not in SETTINGS:
        raise ValueError(unknown(name, _names()))
    kind, optional = kind_of(name), "None" in str(SETTINGS[name].type)
    (alone,) = value if isinstance(value, list) and len(value) == 1 else [value]
    if alone in (None, "", "~") or ((optional or kind == "list") and str(alone).lower() in ("none", "null")):
        if not optional and kind != "list":
            if value == SETTINGS[name].default:
                return value
            raise ValueError("is empty; give a value or remove the key")
        return None if optional else []
    return _OWN_CONVERSIONS.get(name, CONVERSIONS[kind])(value)


_OWN_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "columns": to_columns,
    "eval_data": to_sets,
    "train_data": to_sources,
    "loss_type": to_names,
    "loss_weights": to_weights,
}


def _check(config: TrainConfig, skip: set[str]) -> list[str]:
    problems = []
    given = {name: getattr(config, name) for name in SETTINGS if name not in skip}
    if not given.get("model_name_or_path", "set"):
        problems.append("model_name_or_path: missing; name a model directory, hub id or MiniMind .pth file")
    if not given.get("train_data", ["set"]):
        problems.append("train_data: missing; name a preference .jsonl (or .json, .parquet, hub id)")
    for name, value in given.items():
        bounds, choices = SETTINGS[name].metadata["bounds"], SETTINGS[name].metadata["choices"]
        if bounds is not None and value is not None and not bounds.holds(value):
            problems.append(f"{name}: must be {bounds.says}, is {value}")
        for item in (value if isinstance(value, list) else [value]) if choices else ():
            if item not in choices:
                problems.append(f"{name}: {item!r} is none of {', '.join(choices)}")
    if config.reference == "adapter" and config.lora_r is None and "lora_r" not in skip:
        problems.append("reference: adapter is the policy without its LoRA matrices; set lora_r too")
    if config.reference == "adapter" and config.ref_model_name_or_path is not None:
        problems.append("reference: adapter is the policy's own start; remove ref_model_name_or_path")
    if config.ref_num_attention_heads is not None and config.ref_model_name_or_path is None:
        problems.append("ref_num_attention_heads: is for a reference of its own; set ref_model_name_or_path too")
    if config.lr_scheduler_type == "minimind" and config.warmup_ratio:
        problems.append("warmup_ratio: lr_scheduler_type minimind has no warmup; use cosine_with_min_lr")
    problems += data_problems(config, skip)
    problems += [problem for problem in loss_problems(config) if problem.split(":")[0] not in skip]
    if not skip & {"lora_r", "reference", "ref_model_name_or_path"}:
        problems += weight_problems(config)
    return problems
