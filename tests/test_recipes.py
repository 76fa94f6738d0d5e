"""The recipes of configs/dpo load, are documented line by line, and repeat the originals' numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from minimind_dpo.config import TrainConfig, load_config

RECIPES = sorted((Path(__file__).resolve().parent.parent / "configs" / "dpo").glob("*.yaml"))
GIVEN_BY_THE_USER = {
    "model_name_or_path",
    "ref_model_name_or_path",
    "tokenizer_name_or_path",
    "train_data",
    "eval_data",
    "output_dir",
}

# trainer/train_dpo.py of MiniMind's generation 2: the defaults of its flags, of AdamW and of its schedule
MINIMIND2 = {
    "max_length": 1024,
    "completion_mask": "all_assistant",
    "loss_type": ["sigmoid_norm"],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 4e-8,
    "lr_scheduler_type": "minimind",
    "warmup_ratio": 0.0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "shuffle": True,
    "logging_steps": 100,
    "save_steps": 100,
    "save_total_limit": 1,
    "report_to": [],
    "seed": 42,
}


def load(recipe: Path) -> TrainConfig:
    return load_config(["--config", str(recipe), "--model_name_or_path", "x", "--train_data", "y"])


def named(name: str) -> dict[str, Any]:
    return asdict(load(next(recipe for recipe in RECIPES if recipe.stem == name)))


def test_there_are_recipes() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert names >= {"minimind2_small", "minimind2_moe", "minimind3", "smollm2_135m"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_loads_and_leaves_paths_to_the_user(recipe: Path) -> None:
    load(recipe)
    keys = yaml.safe_load(recipe.read_text("utf-8")).keys()
    assert not keys & GIVEN_BY_THE_USER
    assert keys >= {"loss_type", "beta", "learning_rate", "per_device_train_batch_size"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_line_says_why(recipe: Path) -> None:
    """A comment stands behind every key, or on the line above it."""
    lines = recipe.read_text("utf-8").splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if line and not line.startswith("#") and "  # " not in line and not above.startswith("#")
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("name", "differences"),
    [("minimind2_small", {}), ("minimind2_moe", {}), ("minimind3", {"loss_type": ["sigmoid"], "beta": 0.15})],
)
def test_minimind_recipes_are_the_originals(name: str, differences: dict[str, Any]) -> None:
    config = named(name)
    assert {key: config[key] for key in MINIMIND2} == MINIMIND2 | differences


def test_smollm2_is_the_published_recipe() -> None:
    """The alignment-handbook's recipes/smollm2/dpo/config_smol.yaml: 16 pairs a step on each process."""
    published = {
        "max_length": 1024,
        "beta": 0.5,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "num_train_epochs": 2.0,
        "logging_steps": 10,
        "seed": 42,
    }
    config = named("smollm2_135m")
    assert {key: config[key] for key in published} == published
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == 2 * 8
