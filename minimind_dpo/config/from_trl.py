"""A `DPOConfig` of TRL as our yaml, with a word on each of its keys.

    python -m minimind_dpo.config.from_trl dpo_config.yaml > run.yaml

The file is what TRL's own script takes (`trl dpo --config`), yaml or JSON: arguments of DPOConfig, ScriptArguments and
ModelConfig together. The yaml on standard output makes the same run, with TRL's defaults written out where ours differ;
what became of each key is told on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minimind_dpo.config.flags import SETTINGS
from minimind_dpo.config.foreign import ABSENT, LAUNCHED, RENAMED
from minimind_dpo.ending import Ending
from minimind_dpo.errors import EXIT_DONE, EXIT_USAGE, UserError
from minimind_dpo.losses import own_settings

# TRL 1.16's defaults where ours are others, by our names; a test compares them with TRL's own.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "gradient_checkpointing": True,
    "save_steps": 500,
    "save_total_limit": 0,
}
LORA_DEFAULTS: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}  # with use_peft
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}
_TABLES = {"renamed": RENAMED, "the launcher's business": LAUNCHED, "not here": ABSENT}


class Answer(NamedTuple):
    """What a key of theirs comes to.

    Attributes:
        settings: ours, with their values; none where there is nothing to set.
        note: for people, where there is more to say.
    """

    settings: dict[str, Any] = {}
    note: str = ""


def kind_of_key(name: str) -> str | None:
    """What a key of theirs is here: same, renamed, the launcher's business, not here; None if it is none of theirs."""
    if name in SETTINGS or name in own_settings():
        return "same"
    return next((kind for kind, names in _TABLES.items() if name in names), None)


def translate(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our settings, and a line for each key that was said.

    Raises:
        UserError: keys that are none of TRL's, or values without which it would be another run.
    """
    if unknown := [name for name in theirs if kind_of_key(name) is None]:
        raise UserError(f"none of TRL 1.16's arguments of a DPO run: {', '.join(unknown)}")
    ours = DEFAULTS | (LORA_DEFAULTS if theirs.get("use_peft") else {})
    lines = []
    for name, value in theirs.items():
        if value is None:
            continue
        kind = str(kind_of_key(name))
        answer = _answer(name, value, theirs)
        ours |= answer.settings
        became = ", ".join(f"{key}: {said}" for key, said in answer.settings.items()) if kind != "same" else ""
        lines.append(f"{name}: {kind}" + "".join(f"; {part}" for part in (became, answer.note) if part))
    return ours, lines


def _answer(name: str, value: Any, theirs: Mapping[str, Any]) -> Answer:
    if name in _OWN_ANSWERS:
        return _OWN_ANSWERS[name](value, theirs)
    if kind_of_key(name) == "same":
        return Answer({name: value})
    return Answer(note=next(names[name] for names in _TABLES.values() if name in names))


def _optim(value: Any, theirs: Mapping[str, Any]) -> Answer:
    if value not in OPTIMIZERS:
        raise UserError(f"optim: {value} is not here; there are {', '.join(sorted(set(OPTIMIZERS.values())))}")
    return Answer({"optim": OPTIMIZERS[value]})


def _schedule(value: Any, theirs: Mapping[str, Any]) -> Answer:
    known = SETTINGS["lr_scheduler_type"].metadata["choices"]
    if value not in known:
        raise UserError(f"lr_scheduler_type: {value} is not here; there are {', '.join(known)}")
    return Answer({"lr_scheduler_type": value})


def _warmup(value: Any, theirs: Mapping[str, Any]) -> Answer:
    steps, length = float(value), float(theirs.get("max_steps") or -1)
    if steps >= 1 and length <= 0:
        return Answer(note=f"set warmup_ratio to the share that {steps:g} steps are of all")
    return Answer({"warmup_ratio": steps if steps < 1 else steps / length})


def _steps(name: str) -> Callable[[Any, Mapping[str, Any]], Answer]:
    def answer(value: Any, theirs: Mapping[str, Any]) -> Answer:
        if 0 < float(value) < 1:
            return Answer(note=f"a share of the run there: set {name} to a number of steps")
        return Answer({name: int(value)})

    return answer


def _eval_steps(value: Any, theirs: Mapping[str, Any]) -> Answer:
    evaluates = str(theirs.get("eval_strategy", "no")) == "steps"
    return _steps("eval_steps")(value, theirs) if evaluates else Answer(note="left out: eval_strategy is not steps")


def _eval_strategy(value: Any, theirs: Mapping[str, Any]) -> Answer:
    if value == "steps" and theirs.get("eval_steps") is None:
        return Answer({"eval_steps": int(theirs.get("logging_steps", 10))})
    each_epoch = "set eval_steps to the steps of an epoch; before and after the run it is evaluated anyway"
    return Answer(note=each_epoch if value == "epoch" else "")


def _save_strategy(value: Any, theirs: Mapping[str, Any]) -> Answer:
    if value == "no":
        return Answer({"save_steps": 0})
    return Answer(note="set save_steps to the steps of an epoch" if value == "epoch" else "")


def _save_steps(value: Any, theirs: Mapping[str, Any]) -> Answer:
    return Answer() if theirs.get("save_strategy") == "no" else _steps("save_steps")(value, theirs)


def _data(split: str, value: Any, theirs: Mapping[str, Any]) -> list[str]:
    config = theirs.get("dataset_config")
    return [f"{value}/{config}:{split}" if config else f"{value}:{split}"]


def _dataset(value: Any, theirs: Mapping[str, Any]) -> Answer:
    evaluates = str(theirs.get("eval_strategy", "no")) != "no"
    held_out = {"eval_data": _data(theirs.get("dataset_test_split", "test"), value, theirs)} if evaluates else {}
    train = _data(theirs.get("dataset_train_split", "train"), value, theirs)
    return Answer({"train_data": train} | held_out, "of files and folders write the path alone")


def _with_lora(value: Any, theirs: Mapping[str, Any], name: str) -> Answer:
    return Answer({name: value}) if theirs.get("use_peft") else Answer(note="left out: use_peft is not set")


def _only_if_true(settings: dict[str, Any]) -> Callable[[Any, Mapping[str, Any]], Answer]:
    return lambda value, theirs: Answer(settings if value else {})


def _said(note: str) -> Callable[[Any, Mapping[str, Any]], Answer]:
    return lambda value, theirs: Answer(note=note)


_OWN_ANSWERS: dict[str, Callable[[Any, Mapping[str, Any]], Answer]] = {
    "optim": _optim,
    "lr_scheduler_type": _schedule,
    "warmup_steps": _warmup,
    "logging_steps": _steps("logging_steps"),
    "eval_steps": _eval_steps,
    "eval_strategy": _eval_strategy,
    "save_steps": _save_steps,
    "save_strategy": _save_strategy,
    "dataset_name": _dataset,
    "dataset_train_split": _said("see train_data"),
    "dataset_test_split": _said("see eval_data"),
    "dataset_config": _said("see train_data"),
    "use_peft": _said("LoRA with TRL's defaults, where nothing else is said"),
    "load_in_4bit": _only_if_true({"quantization": "nf4"}),
    "full_determinism": _only_if_true({"deterministic": True}),
    "precompute_ref_log_probs": _only_if_true({"reference": "cache"}),
    "disable_dropout": lambda value, theirs: Answer(note="" if value else "set dropout to the model's own"),
    "resume_from_checkpoint": lambda value, theirs: Answer({"resume": value}),
    "activation_checkpointing": lambda value, theirs: Answer({"gradient_checkpointing": value}),
    "attn_implementation": _said("left at pairs: both answers in one row without padding"),
    "dtype": _said("trained weights are fp32; the precision of products is --mixed_precision"),
    "dataloader_num_workers": _said("left out: 0 there is none here on a CPU, 2 beside a GPU"),
} | {
    name: lambda value, theirs, name=name: _with_lora(value, theirs, name)  # type: ignore[misc]
    for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
}


def main(argv: list[str]) -> int:
    """Translate a file; 2 where it is none."""
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return EXIT_DONE if argv[:1] in (["-h"], ["--help"]) else EXIT_USAGE
    try:
        theirs = yaml.safe_load(Path(argv[0]).expanduser().read_text("utf-8"))  # JSON is yaml too
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{argv[0]}: not a readable yaml or JSON file: {error}") from None
    if not isinstance(theirs, dict):
        raise UserError(f"{argv[0]}: expected 'key: value' lines")
    ours, lines = translate({key: float(value) if _is_number(value) else value for key, value in theirs.items()})
    print(*lines, sep="\n", file=sys.stderr)
    print(yaml.safe_dump(ours, sort_keys=False, allow_unicode=True), end="")
    return EXIT_DONE


def _is_number(value: Any) -> bool:
    """Whether a text is a number that yaml 1.1 does not know as one, such as 1e-6."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


if __name__ == "__main__":
    with Ending() as ending:
        ending.code = main(sys.argv[1:])
    sys.exit(ending.code)
