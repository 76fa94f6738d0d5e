"""One optimizer step beside TRL's own DPOTrainer: the same policy, another reference, the same pairs, every loss."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer
from helpers_run import WORDS, train_here, train_lines
from transformers import LlamaConfig, LlamaForCausalLM

BETA = 0.2
# what both log under the same name and definition
COMPARED = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
LOSSES = [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1)]


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def _rows() -> list[dict[str, Any]]:
    """Six pairs with explicit prompts, one of them a longer conversation, answers of quite different lengths."""
    rng = random.Random(5)
    rows = []
    for turns in (1, 1, 3, 1, 1, 1):
        prompt = [{"role": ("user", "assistant")[turn % 2], "content": _words(rng, 2, 6)} for turn in range(turns)]
        rows.append(
            {"prompt": prompt}
            | {
                side: [{"role": "assistant", "content": _words(rng, *lengths)}]
                for side, lengths in (("chosen", (2, 20)), ("rejected", (4, 9)))
            }
        )
    return rows


def _save_model(directory: Path, seed: int) -> Path:
    """A random model, its weights large enough that the two models differ by some nats an answer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.15,
        )
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The policy's start and a reference that is another model."""
    directory = tmp_path_factory.mktemp("trl")
    return _save_model(directory / "policy", 1), _save_model(directory / "reference", 2)


def _trl_step(models: tuple[Path, Path], output_dir: Path, loss_type: str, label_smoothing: float) -> dict[str, Any]:
    """What TRL logs of one step over all rows in one batch."""
    trl = pytest.importorskip("trl", reason="trl is not installed (extra 'dev'): nothing to compare with")
    from datasets import Dataset

    arguments = trl.DPOConfig(
        output_dir=str(output_dir),
        loss_type=[loss_type],
        label_smoothing=label_smoothing,
        beta=BETA,
        max_steps=1,
        per_device_train_batch_size=len(_rows()),
        learning_rate=1e-8,
        max_grad_norm=1e9,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(models[0]),
        ref_model=LlamaForCausalLM.from_pretrained(models[1]),
        args=arguments,
        train_dataset=Dataset.from_list(_rows()),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer.state.log_history[0]


def _our_step(
    models: tuple[Path, Path], directory: Path, loss_type: str, label_smoothing: float, reference: str
) -> dict[str, Any]:
    data = directory / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    options = {
        "model_name_or_path": models[0],
        "ref_model_name_or_path": models[1],
        "train_data": data,
        "output_dir": directory / reference,
        "loss_type": loss_type,
        "label_smoothing": label_smoothing,
        "beta": BETA,
        "completion_mask": "final_turn",
        "reference": reference,
        "max_steps": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "per_device_train_batch_size": len(_rows()),
        "learning_rate": 1e-8,
    }
    assert train_here([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    (line,) = train_lines(directory / reference)
    return line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss_type", "label_smoothing"), LOSSES)
def test_one_step_is_trls(models: tuple[Path, Path], tmp_path: Path, loss_type: str, label_smoothing: float) -> None:
    """Both sides of a pair in one row here, one padded row a side there: the same numbers to 2e-4."""
    theirs = _trl_step(models, tmp_path / "trl", loss_type, label_smoothing)
    assert abs(theirs["rewards/margins"]) > 0.1 and theirs["grad_norm"] > 0.01  # a comparison that can fail
    if loss_type == "hinge":  # both of its branches are there
        assert theirs["loss"] > 1 - theirs["rewards/margins"] + 0.01
    for reference in ("live", "cache"):
        ours = _our_step(models, tmp_path, loss_type, label_smoothing, reference)
        assert {name: ours[name] for name in COMPARED} == pytest.approx(
            {name: theirs[name] for name in COMPARED}, abs=2e-4
        ), f"{loss_type}, {reference}"
