"""The settings as flags: their kinds, and the help that shows them in groups."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import MISSING, fields

from minimind_dpo.config.conversions import plain
from minimind_dpo.config.launcher_flags import add_launcher_help
from minimind_dpo.config.settings import TrainConfig
from minimind_dpo.losses import own_settings

SETTINGS = {setting.name: setting for setting in fields(TrainConfig) if setting.name != "loss_settings"}

# A group of the help, and the setting that it begins with; it has all that follow in `TrainConfig` up to the next one.
GROUPS = {
    "model_name_or_path": "model",
    "gradient_checkpointing": "precision and memory",
    "lora_r": "LoRA",
    "train_data": "data",
    "loss_type": "loss",
    "reference": "reference",
    "output_dir": "length of the run, batches",
    "optim": "optimizer and schedule",
    "on_nonfinite": "logging, evaluation, checkpoints",
    "dataloader_num_workers": "the machine, repeatability",
}
_DESCRIPTIONS = {
    "train": "Train a causal language model on preference pairs with DPO.",
    "precompute": "Fill the reference cache for a training run; its flags.",
}


def make_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of `minimind-dpo train`, or of another verb with its flags; it takes every value as texts."""
    parser = argparse.ArgumentParser(
        prog=f"minimind-dpo {verb}",
        usage=f"minimind-dpo {verb} [--config FILE] [--KEY VALUE ...] [--accelerate_config NAME --num_processes N]",
        allow_abbrev=False,
        description=f"{_DESCRIPTIONS[verb]} Every flag is a key of the yaml file too; the flag wins.",
    )
    help = "yaml file with the keys below, or the name of a recipe of configs/dpo"
    parser.add_argument("--config", metavar="FILE", help=help)
    group: argparse._ActionsContainer = parser
    for name in SETTINGS:
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        add_settings(group, [name])
    if taken := own_settings().keys() & SETTINGS.keys():
        raise ValueError(f"a loss has a setting with a name that is taken: {', '.join(taken)}")
    add_loss_settings(parser)
    add_launcher_help(parser)
    return parser


def add_settings(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Flags of settings, whose values `make_config` takes; None where a flag is not given."""
    for name in names:
        setting = SETTINGS[name]
        default = "" if setting.default in (None, "", MISSING) else f" (default: {plain(setting.default)})"
        parser.add_argument(
            f"--{name}",
            nargs={"list": "+", "bool": "?"}.get(kind_of(name)),
            const="true" if kind_of(name) == "bool" else None,  # a switch alone
            metavar=kind_of(name).upper(),
            help=(setting.metadata["help"] + default).replace("%", "%%"),
        )


def add_loss_settings(parser: argparse.ArgumentParser) -> None:
    """Flags of the settings that losses have for themselves."""
    group = parser.add_argument_group("settings of one loss each")
    for name, own in own_settings().items():
        group.add_argument(f"--{name}", metavar="FLOAT", help=f"{own.help} (default: {own.default})")


def kind_of(name: str) -> str:
    """The kind of a setting's value: str, bool, int, float or list."""
    if name not in SETTINGS:
        return "float"  # of a loss's own
    annotation = str(SETTINGS[name].type).removesuffix(" | None")
    return "list" if annotation.startswith("list") else annotation
