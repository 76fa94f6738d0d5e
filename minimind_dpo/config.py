"""The training configuration: one dataclass, a yaml file, command-line overrides; every problem reported at once."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from minimind_dpo.errors import UserError
from minimind_dpo.files import write_text

COMPLETION_MASKS = ("all_assistant", "final_turn")
BAD_ROW_POLICIES = ("auto", "fail", "drop")
LOSS_TYPES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo")
SMOOTHED_LOSS_TYPES = ("sigmoid", "sigmoid_norm", "robust")
REFERENCES = ("auto", "live", "offload", "cache", "adapter")
LR_SCHEDULER_TYPES = ("minimind", "cosine", "cosine_with_min_lr", "linear", "constant", "constant_with_warmup")
TRACKERS = ("none", "wandb")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run is told, under Hugging Face's names; a batch counts pairs.

    The defaults are MiniMind's own DPO settings. What the launcher decides (processes, mixed precision, ZeRO)
    is not repeated here: it stays in the accelerate configuration.
    """

    model_name_or_path: str = _option("", "policy start: directory, hub id, run directory or MiniMind .pth")
    ref_model_name_or_path: str | None = _option(None, "reference model (default: the policy's start)")
    tokenizer_name_or_path: str | None = _option(None, "tokenizer directory or hub id (default: the model's)")
    num_attention_heads: int | None = _option(None, "query heads of MiniMind raw weights (default 8)")
    trust_remote_code: bool = _option(False, "run code that comes with a hub model")
    attn_implementation: str = _option(
        "pairs", "pairs: packed shared-prefix batches; sdpa, eager, ...: one padded row a side"
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass")
    lora_r: int | None = _option(None, "rank of LoRA matrices; without it every weight is trained")
    lora_alpha: float = _option(16, "LoRA's product is scaled by lora_alpha / lora_r")
    lora_dropout: float = _option(0.0, "dropout before LoRA's matrices")
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "ends of the names of the adapted layers (default: all linear layers but the output)"},
    )

    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "preference pairs: .jsonl/.json/.parquet files or globs, a datasets directory, or a hub id"},
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "held-out pairs, in the same forms"})
    max_length: int = _option(1024, "tokens a side, truncated on the right")
    completion_mask: str = _option("all_assistant", "tokens that count: " + " | ".join(COMPLETION_MASKS))
    on_bad_row: str = _option(
        "auto", "auto: malformed rows fail, pairs without signal are dropped and counted; fail | drop: both"
    )
    shuffle: bool = _option(True, "a new order each epoch; false keeps file order")

    loss_type: str = _option("sigmoid_norm", " | ".join(LOSS_TYPES))
    beta: float = _option(0.1, "strength of the pull towards the reference")
    label_smoothing: float = _option(0.0, "assumed share of flipped preferences, in [0, 0.5)")
    reference: str = _option("auto", "where reference log-probabilities come from: " + " | ".join(REFERENCES))

    output_dir: str = _option("runs/dpo", "the run directory")
    num_train_epochs: float = _option(1.0, "passes over the training pairs")
    max_steps: int = _option(-1, "optimizer steps; overrides num_train_epochs when positive")
    per_device_train_batch_size: int = _option(4, "pairs a micro-batch on each rank")
    gradient_accumulation_steps: int = _option(1, "micro-batches an optimizer step")
    learning_rate: float = _option(4e-8, "peak learning rate of AdamW")
    lr_scheduler_type: str = _option("minimind", " | ".join(LR_SCHEDULER_TYPES))
    warmup_ratio: float = _option(0.0, "share of the steps with a linearly rising learning rate")
    weight_decay: float = _option(0.01, "AdamW's decoupled weight decay, on every parameter")
    max_grad_norm: float = _option(1.0, "gradient norm clipping; 0 switches it off")

    logging_steps: int = _option(10, "optimizer steps between lines of metrics.jsonl")
    eval_steps: int | None = _option(None, "optimizer steps between evaluations (always before and after)")
    save_steps: int = _option(100, "optimizer steps between checkpoints; 0 saves none but on a signal")
    save_total_limit: int = _option(2, "checkpoints kept; 0 keeps all")
    resume: str = _option("auto", "auto: newest complete checkpoint of output_dir | never | PATH of one")
    report_to: str = _option("none", " | ".join(TRACKERS))
    run_name: str | None = _option(None, "name of the run in the tracker")
    dataloader_num_workers: int | None = _option(
        None, "processes that lay out batches ahead; by default none on a CPU, 2 beside a GPU"
    )
    ddp_timeout: int = _option(1800, "seconds that a rank waits for another before the run fails")
    seed: int = _option(42, "seed of the order and of dropout")

    @property
    def attends_pairs(self) -> bool:
        """Whether the packed shared-prefix layout is asked for."""
        return self.attn_implementation == "pairs"


_FIELDS = {f.name: f for f in fields(TrainConfig)}
_POSITIVE = (
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "beta",
    "logging_steps",
    "num_train_epochs",
    "eval_steps",
    "num_attention_heads",
    "lora_r",
    "lora_alpha",
    "ddp_timeout",
)
_NOT_NEGATIVE = (
    "weight_decay",
    "max_grad_norm",
    "save_steps",
    "save_total_limit",
    "warmup_ratio",
    "seed",
    "label_smoothing",
    "lora_dropout",
    "dataloader_num_workers",
)
_CHOICES = {
    "completion_mask": COMPLETION_MASKS,
    "on_bad_row": BAD_ROW_POLICIES,
    "loss_type": LOSS_TYPES,
    "reference": REFERENCES,
    "lr_scheduler_type": LR_SCHEDULER_TYPES,
    "report_to": TRACKERS,
}


def load_config(argv: list[str], verb: str = "train") -> TrainConfig:
    """Build the configuration of `minimind-dpo train`, or another verb with its flags, from its arguments.

    `--config FILE` names a yaml file with the same keys; the command line wins over it.

    Raises:
        UserError: with every problem found in the file, the flags and the values, one a line.
    """
    parser = _parser(verb)
    known, unknown = parser.parse_known_args(argv)
    flags = {k: v for k, v in vars(known).items() if v is not None}
    problems = [
        f"{flag.split('=')[0]}: {_nearest(flag.lstrip('-').split('=')[0])}" for flag in unknown if flag.startswith("--")
    ]
    if not problems and unknown:
        problems.append(f"{unknown[0]!r}: not a flag (flags are written --name value)")
    values: dict[str, Any] = {}
    if "config" in flags:
        values.update(_read_yaml(flags.pop("config")[0], problems))
    flags.pop("config", None)
    values.update({name: (flag if _kind(name) == "list" else flag[0]) for name, flag in flags.items()})
    return make_config(values, problems)


def make_config(values: dict[str, Any], problems: list[str] | None = None) -> TrainConfig:
    """Convert and check raw values (strings or yaml scalars).

    Raises:
        UserError: listing every key with a wrong type or value, together with `problems` found before.
    """
    problems = list(problems or [])
    converted: dict[str, Any] = {}
    for name, value in values.items():
        try:
            converted[name] = _convert(name, value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    config = TrainConfig(**converted)
    problems += _check(config, skip={p.split(":")[0] for p in problems})
    if problems:
        raise UserError("the configuration has problems:\n  " + "\n  ".join(problems))
    return config


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as yaml; reading it back gives the same configuration."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


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
    for f in fields(TrainConfig):
        default = "" if f.default in (None, "", dataclasses.MISSING) else f" (default: {_plain(f.default)})"
        parser.add_argument(
            f"--{f.name}",
            nargs="+" if _kind(f.name) == "list" else 1,
            metavar=_kind(f.name).upper(),
            help=(f.metadata["help"] + default).replace("%", "%%"),
        )
    return parser


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid yaml: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path}: expected 'key: value' lines, found a {type(loaded).__name__}")
    problems += [f"{path}: {key}: {_nearest(str(key))}" for key in loaded if key not in _FIELDS]
    return {key: value for key, value in loaded.items() if key in _FIELDS}


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.5)
    return "unknown key" + (f"; did you mean {close[0]}?" if close else "; see minimind-dpo train --help")


def _kind(name: str) -> str:
    annotation = str(_FIELDS[name].type).removesuffix(" | None")
    return "list" if annotation.startswith("list") else annotation


def _convert(name: str, value: Any) -> Any:
    kind, optional = _kind(name), "None" in str(_FIELDS[name].type)
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if not optional and kind != "list":
            raise ValueError("is empty; give a value or remove the key")
        return None if optional else []
    if kind == "list":
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"expected one text or a list of texts, found {value!r}")
        return items
    if kind == "str":
        if isinstance(value, bool):
            value = _plain(value)
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"expected one text value, found {value!r}")
        return str(value)
    if kind == "bool":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, found {value!r}")
        return value
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {_plain(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number, found {value!r}") from None
    if kind == "int":
        if number != number or not number.is_integer():
            raise ValueError(f"expected a whole number, found {value!r}")
        return int(value) if isinstance(value, int) else int(number)
    return number


def _check(config: TrainConfig, skip: set[str]) -> list[str]:
    problems = []
    given = {name: getattr(config, name) for name in _FIELDS if name not in skip}
    if not given.get("model_name_or_path", "set"):
        problems.append("model_name_or_path: missing; name a model directory, hub id or MiniMind .pth file")
    if not given.get("train_data", ["set"]):
        problems.append("train_data: missing; name a preference .jsonl (or .json, .parquet, hub id)")
    for name in _POSITIVE:
        if (value := given.get(name)) is not None and not 0 < value < float("inf"):
            problems.append(f"{name}: must be positive, is {value}")
    for name in _NOT_NEGATIVE:
        if (value := given.get(name)) is not None and not 0 <= value < float("inf"):
            problems.append(f"{name}: must not be negative, is {value}")
    for name, allowed in _CHOICES.items():
        if name in given and given[name] not in allowed:
            problems.append(f"{name}: {given[name]!r} is none of {', '.join(allowed)}")
    if "label_smoothing" in given and config.label_smoothing >= 0.5:
        problems.append(f"label_smoothing: must be below 0.5, is {config.label_smoothing}")
    if config.label_smoothing and config.loss_type in set(LOSS_TYPES) - set(SMOOTHED_LOSS_TYPES):
        problems.append(
            f"label_smoothing: has no meaning for loss_type {config.loss_type}; "
            f"use one of {', '.join(SMOOTHED_LOSS_TYPES)} or remove it"
        )
    if "lora_dropout" in given and config.lora_dropout >= 1:
        problems.append(f"lora_dropout: must be below 1, is {config.lora_dropout}")
    if config.reference == "adapter" and config.lora_r is None and "lora_r" not in skip:
        problems.append("reference: adapter is the policy without its LoRA matrices; set lora_r too")
    if config.reference == "adapter" and config.ref_model_name_or_path is not None:
        problems.append("reference: adapter is the policy's own start; remove ref_model_name_or_path")
    if "warmup_ratio" in given and config.warmup_ratio > 1:
        problems.append(f"warmup_ratio: must be at most 1, is {config.warmup_ratio}")
    if config.lr_scheduler_type == "minimind" and config.warmup_ratio:
        problems.append("warmup_ratio: lr_scheduler_type minimind has no warmup; use cosine_with_min_lr")
    if config.eval_steps is not None and not config.eval_data and "eval_data" not in skip:
        problems.append("eval_steps: needs eval_data")
    return problems
