"""The model card of an export: what a reader of the hub is told of a run, and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_run import Inputs, lines, train_here
from huggingface_hub import ModelCard

from minimind_dpo.models import load_model
from minimind_dpo.models.card import model_card
from minimind_dpo.models.export import export_model
from minimind_dpo.models.origin import License, Origin, find_origin, license_of

BASE_CARD = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: https://example.org/tiny\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def base(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs' model with a card and a licence file."""
    directory = tmp_path_factory.mktemp("secret_place") / "tiny-base"
    directory.mkdir()
    for file in inputs.model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "README.md").write_text(BASE_CARD)
    (directory / "LICENSE").write_text("Do what you like.")
    return directory


@pytest.fixture(scope="module")
def run(inputs: Inputs, base: Path) -> Path:
    directory = base.parent / "run"
    flags = inputs.flags(
        directory, model_name_or_path=base, eval_data=inputs.eval_data, save_steps=1, save_total_limit=0, eval_steps=1
    )
    assert train_here(flags) == 0
    return directory


def rows(text: str) -> dict[str, list[str]]:
    """The lines of a card's tables by their first cell."""
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {cells[0].strip("`"): cells[1:] for cells in found}


def test_the_card_of_a_run(run: Path, base: Path, inputs: Inputs, tmp_path: Path) -> None:
    written = export_model(run, "hf", tmp_path / "aligned")
    card, summary = ModelCard.load(written / "README.md"), json.loads((run / "summary.json").read_text())
    told = (card.data.license, card.data.license_name, card.data.license_link)
    assert told == ("other", "tiny-license", "https://example.org/tiny")
    assert card.data.library_name == "transformers" and "dpo" in card.data.tags and card.data.base_model is None
    assert (written / "LICENSE").read_text() == "Do what you like."
    table = rows(card.text)
    assert table["beta"] == ["0.5"] and table["loss_type"] == ["sigmoid"] and table["learning_rate"] == ["0.01"]
    for name in ("eval_loss", "eval_rewards/margins"):
        assert table[name] == [f"{summary[key][name]:.4g}" for key in ("eval_before", "eval_after")]
    assert summary["reference_digest"] in card.text and "3 optimizer steps, 21 pairs seen" in card.text
    assert "# aligned" in card.text and "`tiny-base`" in card.text and "`train.jsonl`" in card.text
    assert "rafailov2023direct" in card.text and "@software{minimind_dpo" in card.text
    assert "secret_place" not in card.content and str(Path.home()) not in card.content
    assert load_model(written).config.hidden_size == 32


def test_the_card_of_a_checkpoint_has_the_numbers_of_its_step(run: Path, tmp_path: Path) -> None:
    written = export_model(run / "checkpoints" / "step-000002", "hf", tmp_path / "earlier")
    text = (written / "README.md").read_text("utf-8")
    (at_two,) = [line for line in lines(run) if line["step"] == 2 and "eval_loss" in line]
    assert rows(text)["eval_loss"][1] == f"{at_two['eval_loss']:.4g}"
    assert f"2 optimizer steps, {at_two['pairs_seen']} pairs seen" in text


def test_intervals_of_an_evaluation_are_told(run: Path, tmp_path: Path) -> None:
    found = {
        "pairs": 5,
        "loss": 0.5,
        "rewards/accuracies": 0.75,
        "interval": {"rewards/accuracies": [0.625, 0.875]},
        "by": {"source": {}},
    }
    (run / "evaluation.json").write_text(json.dumps(found))
    try:
        text = (export_model(run, "hf", tmp_path / "aligned") / "README.md").read_text("utf-8")
    finally:
        (run / "evaluation.json").unlink()
    assert "## Evaluation on 5 held-out pairs" in text
    assert rows(text)["rewards/accuracies"] == ["0.75", "0.625 to 0.875"] and rows(text)["loss"] == ["0.5", ""]


def test_a_run_that_went_on_from_a_run_names_its_first_base(run: Path, inputs: Inputs, tmp_path: Path) -> None:
    assert train_here(inputs.flags(tmp_path / "second", model_name_or_path=run, max_steps=1)) == 0
    origin = find_origin(str(tmp_path / "second"))
    assert origin is not None and Path(origin.base).name == "tiny-base"


def origin_of(**settings: Any) -> Origin:
    return Origin({"loss_type": ["sigmoid"], "beta": 0.1} | settings, {"reference_digest": None}, {})


def test_models_and_data_of_the_hub_are_linked() -> None:
    data = ["o/pairs/config@main:train", {"path": "o/more", "weight": 2.0}, "/home/me/mine.jsonl"]
    text = model_card(origin_of(model_name_or_path="o/base", train_data=data), License("mit"), "n")
    card = ModelCard(text)
    assert card.data.base_model == "o/base" and card.data.datasets == ["o/pairs", "o/more"]
    assert card.data.license == "mit" and "[o/base](https://huggingface.co/o/base): mit." in text
    assert "[o/pairs/config@main:train](https://huggingface.co/datasets/o/pairs)" in text
    assert "`mine.jsonl`" in text and "/home/me" not in text and "- reference" not in text


def test_an_unknown_licence_is_said_to_be_unknown(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == License(None)
    (tmp_path / "LICENSE").write_text("of something else")
    (tmp_path / "weights.pth").touch()
    assert license_of(str(tmp_path / "weights.pth")) == License(None)
    assert license_of("owner/name-that-is-not-in-the-cache") == License(None)
    text = model_card(origin_of(model_name_or_path="o/base"), License(None), "n")
    assert "its card was not at hand" in text and ModelCard(text).data.license is None


def test_another_model_keeps_its_own_card(base: Path, tmp_path: Path) -> None:
    assert (export_model(base, "hf", tmp_path / "same") / "README.md").read_text() == BASE_CARD
