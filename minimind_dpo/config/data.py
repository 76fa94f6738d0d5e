"""What a configuration says of data: how it is told, and what of it can't be right."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from math import isfinite
from pathlib import Path
from typing import Any

from minimind_dpo.config.settings import TrainConfig
from minimind_dpo.errors import UserError

# What the rows of all forms that are read may hold (`data/forms.py`, which a test compares).
COLUMNS = (
    "prompt chosen rejected system tools weight margin id conversations messages chosen_messages rejected_messages "
    "rejected_response instruction input output history question query response"
).split()

_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)=(.+)")


def to_columns(value: Any) -> list[str]:
    """`ours=theirs` each: from a text with commas, a list of such texts, or a mapping.

    Raises:
        ValueError: it is none of these, or one of ours is unknown or said twice.
    """
    if isinstance(value, Mapping):
        value = [f"{ours}={theirs}" for ours, theirs in value.items()]
    items = [part.strip() for item in (value if isinstance(value, list) else [value]) for part in str(item).split(",")]
    ours = [item.partition("=")[0] for item in items]
    for item, name in zip(items, ours, strict=True):
        if not all(item.partition("=")):
            raise ValueError(f"expected prompt=question,chosen=good,..., found {item!r}")
        if name not in COLUMNS:
            raise ValueError(f"{name!r} is none of {', '.join(COLUMNS)}")
    if len(set(ours)) < len(ours):
        raise ValueError(f"names a column twice: {', '.join(items)}")
    return items


def read_columns(words: list[str]) -> list[str]:
    """What follows a command's `--columns`, as `to_columns`; UserError where it is wrong."""
    try:
        return to_columns(words) if words else []
    except ValueError as error:
        raise UserError(f"--columns: {error}") from None


def to_sets(value: Any) -> list[str]:
    """Names of data, each perhaps `set=` before it; a mapping of sets to one or several names gives the same.

    Raises:
        ValueError: it is none of these, or only some have a set.
    """
    if isinstance(value, Mapping):
        value = [
            f"{name}={item}"
            for name, items in value.items()
            for item in (items if isinstance(items, list) else [items])
        ]
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"expected one text, a list of texts, or name: DATA, found {value!r}")
    named = [bool(_set_of(item)[0]) for item in items]
    if any(named) and not all(named):
        raise ValueError(
            f"{items[named.index(False)]} needs a name as the others have: name={items[named.index(False)]}"
        )
    return items


def named_sets(told: list[str]) -> dict[str, list[str]]:
    """What `to_sets` gives by the sets' names; of data without one the name is empty."""
    sets: dict[str, list[str]] = {}
    for item in told:
        name, data = _set_of(item)
        sets.setdefault(name, []).append(data)
    return sets


def _set_of(item: str) -> tuple[str, str]:
    """The name of a set and what is in it; a file that has such a name is meant itself."""
    found = _NAMED.fullmatch(item)
    return ("", item) if found is None or Path(item).exists() else (found[1], found[2])


def to_sources(value: Any) -> list[str | dict[str, Any]]:
    """Names of data, or `{path: name, weight: number}`.

    Raises:
        ValueError: it is none of these.
    """
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, Mapping):
            if not {"path"} <= item.keys() <= {"path", "weight"} or not isinstance(item["path"], str):
                raise ValueError(f"expected {{path: NAME, weight: NUMBER}}, found {dict(item)!r}")
            _weight(item)
        elif not isinstance(item, str):
            raise ValueError(f"expected one text or a list of texts, found {item!r}")
    return [dict(item) | {"weight": _weight(item)} if isinstance(item, Mapping) else item for item in items]


def _weight(item: Mapping[str, Any]) -> float:
    """A source's weight, 1 where none is said; yaml hands on the text that stands there."""
    said = item.get("weight", 1.0)
    try:
        weight = float("nan" if isinstance(said, bool) else said)
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 < weight <= 1000:
        raise ValueError(f"the weight of {item['path']} must be a number above 0 and at most 1000, is {said!r}")
    return weight


def data_problems(config: TrainConfig, skip: set[str]) -> list[str]:
    """Settings of data that do not go together, one text each; keys in `skip` have a problem already."""
    problems = []
    size = config.eval_split
    if size is not None and "eval_split" not in skip:
        if config.eval_data:
            problems.append("eval_split: stands beside eval_data, which is evaluated on? remove one of them")
        if isfinite(size) and size > 1 and not float(size).is_integer():
            problems.append(f"eval_split: must be a share below 1 or a whole number of pairs, is {size}")
    if not config.eval_data and size is None and not skip & {"eval_data", "eval_split"}:
        wanting = {name: getattr(config, name) for name in ("eval_steps", "metric_for_best_model")}
        problems += [f"{name}: needs eval_data or eval_split" for name, value in wanting.items() if value is not None]
        if config.generate_prompts is not None and "generate_prompts" not in skip:
            problems.append("generate_prompts: is for evaluations, which need eval_data or eval_split")
    if config.generate_prompts is not None and config.generate_prompts.isdigit() and not int(config.generate_prompts):
        problems.append("generate_prompts: 0 prompts are none; remove it, or give a number above 0, or a file")
    try:
        check_day(config.template_date)
    except ValueError as error:
        problems.append(f"template_date: {error}")
    return problems


def check_day(text: str) -> str:
    """The same text; ValueError where it is no day."""
    try:
        if len(text) == 10:
            return date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    raise ValueError(f"expected a day as 2024-07-26, found {text!r}")
