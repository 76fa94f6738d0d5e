"""How a configuration is told: a yaml file, flags that win over it, Python; every problem is reported at once."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import yaml

from minimind_dpo.config.conversions import CONVERSIONS, plain, to_number
from minimind_dpo.config.data import data_problems, to_columns, to_sets, to_sources
from minimind_dpo.config.losses import loss_problems, to_names, to_weights, with_loss_settings
from minimind_dpo.config.settings import TrainConfig, as_told, told_apart
from minimind_dpo.config.text import TextLoader
from minimind_dpo.config.weights import weight_problems
from minimind_dpo.errors import UserError
from minimind_dpo.files import write_text
from minimind_dpo.losses import own_settings

_WITHOUT_WARMUP = ("minimind", "constant")  # schedules
_WARMUP_RATIO = 0.1  # of the others
_SETTINGS = {setting.name: setting for setting in fields(TrainConfig) if setting.name != "loss_settings"}


def load_config(argv: Sequence[str], verb: str = "train") -> TrainConfig:
    """Build the configuration of `minimind-dpo train`, or another verb with its flags, from its arguments.

    `--config FILE` names a yaml file with the same keys; the command line wins over it.

    Raises:
        UserError: with every problem found in the file, the flags and the values, one a line.
    """
    known, unknown = _parser(verb).parse_known_args(argv)
    flags = {name: value for name, value in vars(known).items() if value is not None}
    problems = [
        f"{flag.split('=')[0]}: {_nearest(flag.lstrip('-').split('=')[0])}" for flag in unknown if flag.startswith("--")
    ]
    if not problems and unknown:
        problems.append(f"{unknown[0]!r}: not a flag (flags are written --name value)")
    values: dict[str, Any] = {}
    if "config" in flags:
        values.update(_read_yaml(flags.pop("config")[0], problems))
    values.update({name: (flag if _kind(name) == "list" else flag[0]) for name, flag in flags.items()})
    return make_config(values, problems)


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


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"minimind-dpo {verb}",
        usage=f"minimind-dpo {verb} [--config FILE] [--KEY VALUE ...]",
        allow_abbrev=False,
        description={
            "train": "Train a causal language model on preference pairs with DPO.",
            "precompute": "Fill the reference cache for a training run; its flags.",
        }[verb],
    )
    parser.add_argument("--config", nargs=1, metavar="FILE", help="yaml file with the keys below")
    add_settings(parser, _SETTINGS)
    if taken := own_settings().keys() & _SETTINGS.keys():
        raise ValueError(f"a loss has a setting with a name that is taken: {', '.join(sorted(taken))}")
    add_loss_settings(parser)
    return parser


def add_settings(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Flags of settings, whose values `make_config` takes; None where a flag is not given."""
    for name in names:
        setting = _SETTINGS[name]
        default = "" if setting.default in (None, "", MISSING) else f" (default: {plain(setting.default)})"
        parser.add_argument(
            f"--{name}",
            nargs="+" if _kind(name) == "list" else 1,
            metavar=_kind(name).upper(),
            help=(setting.metadata["help"] + default).replace("%", "%%"),
        )


def add_loss_settings(parser: argparse.ArgumentParser) -> None:
    """Flags of the settings that losses have for themselves."""
    group = parser.add_argument_group("settings of one loss each")
    for name, own in own_settings().items():
        group.add_argument(f"--{name}", nargs=1, metavar="FLOAT", help=f"{own.help} (default: {own.default})")


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.load(Path(path).expanduser().read_text("utf-8"), TextLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid yaml: {error}") from None
    if loaded in (None, ""):
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: expected 'key: value' lines, found a {type(loaded).__name__}")
    known = {*_SETTINGS, *own_settings()}
    problems += [f"{path}: {key}: {_nearest(str(key))}" for key in loaded if key not in known]
    return {key: value for key, value in loaded.items() if key in known}


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, [*_SETTINGS, *own_settings()], n=1, cutoff=0.5)
    return "unknown key" + (f"; did you mean {close[0]}?" if close else "; see minimind-dpo train --help")


def _kind(name: str) -> str:
    if name not in _SETTINGS:
        return "float"  # of a loss's own
    annotation = str(_SETTINGS[name].type).removesuffix(" | None")
    return "list" if annotation.startswith("list") else annotation


def _convert(name: str, value: Any) -> Any:
    """A value of the setting's own type; `none` is the absent value, or the empty list, where a setting has one."""
    if name not in _SETTINGS:
        raise ValueError(_nearest(name))
    kind, optional = _kind(name), "None" in str(_SETTINGS[name].type)
    (alone,) = value if isinstance(value, list) and len(value) == 1 else [value]
    if alone in (None, "", "~") or ((optional or kind == "list") and str(alone).lower() in ("none", "null")):
        if not optional and kind != "list":
            if value == _SETTINGS[name].default:
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
    given = {name: getattr(config, name) for name in _SETTINGS if name not in skip}
    if not given.get("model_name_or_path", "set"):
        problems.append("model_name_or_path: missing; name a model directory, hub id or MiniMind .pth file")
    if not given.get("train_data", ["set"]):
        problems.append("train_data: missing; name a preference .jsonl (or .json, .parquet, hub id)")
    for name, value in given.items():
        bounds, choices = _SETTINGS[name].metadata["bounds"], _SETTINGS[name].metadata["choices"]
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
