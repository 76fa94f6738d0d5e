"""Where an exported model comes from: the run that trained it, what it began as, what its base's authors say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from minimind_dpo.checkpoints.state import STATE
from minimind_dpo.config.names import looks_local
from minimind_dpo.models.places import locate_model

CARD = "README.md"
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


@dataclass(frozen=True)
class Origin:
    """What a run left of itself; whatever it did not is empty.

    Attributes:
        settings: the resolved configuration.
        summary: of the whole run, with `eval_before` and `eval_after`; of a checkpoint its `steps` and evaluations.
        evaluation: what `minimind-dpo evaluate --json` found, where the run directory has it as evaluation.json.
    """

    settings: dict[str, Any]
    summary: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def base(self) -> str:
        """What the policy began as: a path or a hub id; through a run that another one went on from, its base."""
        name = str(self.settings.get("model_name_or_path") or "")
        before = find_origin(name) if Path(name).expanduser().exists() else None
        return name if before is None else before.base


def find_origin(source: str) -> Origin | None:
    """The run that a model directory, a checkpoint or an adapter is of; None for a model that no run here made."""
    if (location := locate_model(source)) is None:
        return None
    is_checkpoint = (location / STATE).is_file()
    directory = location.resolve().parents[1 if is_checkpoint else 0]
    if (
        not location.is_dir()
        or not (directory / "config.yaml").is_file()
        or not (directory / "metrics.jsonl").is_file()
    ):
        return None
    settings = yaml.safe_load((directory / "config.yaml").read_text("utf-8")) or {}
    if is_checkpoint:
        return Origin(settings, _of_checkpoint(location, directory), {})
    return Origin(settings, _object(directory / "summary.json"), _object(directory / "evaluation.json"))


def _of_checkpoint(location: Path, directory: Path) -> dict[str, Any]:
    state = _object(location / STATE)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").split("\n")[:-1]]
    lines = [line for line in lines if line["step"] <= state["step"]]
    summary = {"steps": state["step"], "reference_digest": state.get("identity", {}).get("reference_digest")}
    if lines:
        summary["pairs_seen"] = lines[-1]["pairs_seen"]
    if evaluations := [line for line in lines if "eval_loss" in line]:
        summary |= {"eval_before": evaluations[0], "eval_after": evaluations[-1]}
    return summary


def _object(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class License:
    """What the base's own card says of its licence, as the hub names it, and its licence files.

    Attributes:
        name: the hub's identifier, `other` with `own_name` and `link` for one that it has none for; None: unknown.
    """

    name: str | None
    own_name: str | None = None
    link: str | None = None
    files: tuple[Path, ...] = ()


def license_of(base: str) -> License:
    """The licence of a base model, to be carried over; without a network a hub's card is read from the cache.

    What lies beside a single file of weights may belong to anything, and is not asked.
    """
    location = Path(base).expanduser()
    if location.is_file() or not base:
        return License(None)
    files: list[Path] = []
    if location.is_dir():
        files = [path for pattern in _LICENSES for path in sorted(location.glob(pattern)) if path.is_file()]
    elif looks_local(base):
        return License(None)
    try:
        data = ModelCard.load(location / CARD if location.is_dir() else base).data
    except Exception:  # absent, out of reach, or not readable as a card
        return License(None, files=tuple(files))
    link = data.license_link if str(data.license_link or "").startswith("http") else None
    return License(data.license, data.license_name, link, tuple(files))
