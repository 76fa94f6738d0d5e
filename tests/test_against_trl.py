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

from minimind_dpo.objective.preference import PairLogps, Preference, dpo_losses

BETA = 0.2
TRLS = (
    "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft"
).split()
NEEDS = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.01}}
CASES = [{"loss_type": [name], **NEEDS.get(name, {})} for name in TRLS] + [
    {"loss_type": ["aot"], "label_smoothing": 0.2},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.3, "beta": 0.7},
    {"loss_type": ["discopop"], "discopop_tau": 0.3, "beta": 0.05},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    {"loss_type": ["aot_unpaired", "sft", "apo_zero"], "loss_weights": [0.5, 0.1, -2.0]},
    {"loss_type": ["sigmoid", "nca_pair"]},
    {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "f_divergence_type": "alpha_divergence"},
    {"loss_type": ["hinge"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.2},
    {"loss_type": ["sigmoid_norm"], "f_divergence_type": "forward_kl", "beta": 1.0},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    {"loss_type": ["bco_pair", "sft"], "ld_alpha": 0.0},
    {"loss_type": ["sigmoid"], "use_weighting": True},
    {"loss_type": ["bco_pair", "ipo"], "use_weighting": True, "ld_alpha": 0.5},
]
# Theirs are of the discounted sums under LD-DPO, ours of the sums: dashboards of different settings stay comparable.
OF_SUMS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


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


def _trl_step(models: tuple[Path, Path], output_dir: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What TRL logs of one step over all rows in one batch."""
    trl = pytest.importorskip("trl", reason="trl is not installed (extra 'dev'): nothing to compare with")
    from datasets import Dataset

    settings = {"beta": BETA} | case
    arguments = trl.DPOConfig(
        output_dir=str(output_dir),
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
        **settings,
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


def _our_step(models: tuple[Path, Path], directory: Path, case: dict[str, Any], **other: Any) -> dict[str, Any]:
    data = directory / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    options = {
        "model_name_or_path": models[0],
        "train_data": data,
        "output_dir": directory / f"run-{len(list(directory.iterdir()))}",
        "beta": BETA,
        "max_steps": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "per_device_train_batch_size": len(_rows()),
        "learning_rate": 1e-8,
        **({"ref_model_name_or_path": models[1]} if case["loss_type"] != ["sft"] else {}),
        **case,
        **other,
    }
    words = ((f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in options.items())
    assert train_here([str(word) for flag in words for word in flag]) == 0
    (line,) = train_lines(Path(options["output_dir"]))
    return line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{value}" for value in case.values()))
def test_one_step_is_trls(models: tuple[Path, Path], tmp_path: Path, case: dict[str, Any]) -> None:
    """Both sides of a pair in one row here, one padded row a side there: the same numbers to 2e-4."""
    theirs = _trl_step(models, tmp_path / "trl", case)
    assert abs(theirs["rewards/margins"]) > 0.01 and theirs["grad_norm"] > 0.01, theirs  # a comparison that can fail
    if case == {"loss_type": ["hinge"]}:  # both of its branches are there
        assert theirs["loss"] > 1 - theirs["rewards/margins"] + 0.01
    ours = _our_step(models, tmp_path, case)
    compared = (
        ["loss", "grad_norm"] if "ld_alpha" in case or case["loss_type"] == ["sft"] else ["loss", "grad_norm", *OF_SUMS]
    )
    assert {name: ours[name] for name in compared} == pytest.approx(
        {name: theirs[name] for name in compared}, abs=2e-4, rel=2e-4
    )


@pytest.mark.parametrize("reference", ["live", "cache"])
def test_references_agree(models: tuple[Path, Path], tmp_path: Path, reference: str) -> None:
    """With every part of a loss that reads something else of it."""
    case = {"loss_type": ["sigmoid", "nca_pair", "aot"], "ld_alpha": 0.5}
    ours, offloaded = (_our_step(models, tmp_path, case, reference=mode) for mode in (reference, "offload"))
    measured = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
    assert {name: ours[name] for name in ours.keys() - measured} == pytest.approx(
        {name: offloaded[name] for name in ours.keys() - measured}, rel=1e-6
    )


def test_parts_are_told_apart(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Each part's own mean is that of a run with it alone, and they add up as weighted."""
    both = _our_step(models, tmp_path, {"loss_type": ["ipo", "sppo_hard"], "loss_weights": [1.0, 0.25]})
    alone = {name: _our_step(models, tmp_path, {"loss_type": [name]})["loss"] for name in ("ipo", "sppo_hard")}
    assert {name: both[f"losses/{name}"] for name in alone} == pytest.approx(alone, rel=1e-9)
    assert both["dpo_loss"] == pytest.approx(alone["ipo"] + 0.25 * alone["sppo_hard"], rel=1e-9)


@pytest.mark.parametrize(
    ("loss_type", "theirs", "settings"),
    [
        ("simpo", "simpo", {"simpo_gamma": 0.8, "beta": 2.0}),
        ("simpo", "simpo", {"simpo_gamma": 0.3, "beta": 1.0, "label_smoothing": 0.1}),
        ("cpo", "sigmoid", {"cpo_alpha": 0.0}),
    ],
)
def test_losses_without_reference_are_trls(
    models: tuple[Path, Path], tmp_path: Path, loss_type: str, theirs: str, settings: dict[str, float]
) -> None:
    """TRL's own function on our log-probabilities; its trainers also take another mean of the likelihood."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="trl is not installed (extra 'dev')")
    from types import SimpleNamespace

    rng = torch.Generator().manual_seed(3)
    chosen, rejected = -20 * torch.rand(5, generator=rng).double(), -20 * torch.rand(5, generator=rng).double()
    tokens = torch.tensor([4, 7, 1, 9, 3]), torch.tensor([5, 2, 8, 9, 1])
    told = {"label_smoothing": 0.0, "beta": BETA, "simpo_gamma": 0.0} | settings
    trainer = SimpleNamespace(
        alpha=0.0, loss_type=theirs, accelerator=SimpleNamespace(device=torch.device("cpu")), **told
    )
    means = (chosen / tokens[0], rejected / tokens[1]) if loss_type == "simpo" else (chosen, rejected)
    expected = cpo.CPOTrainer.cpo_loss(trainer, *means)[0]
    zeros = torch.zeros(5).double()
    pairs = PairLogps(chosen, rejected, zeros, zeros, -chosen, *tokens, zeros, zeros + 1)
    own = {name: told[name] for name in ("simpo_gamma", "cpo_alpha") if name in told}
    preference = Preference({loss_type: 1.0}, beta=told["beta"], label_smoothing=told["label_smoothing"], settings=own)
    assert torch.allclose(dpo_losses(pairs, preference).total, expected, rtol=1e-12)
