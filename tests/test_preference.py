"""A run's preference loss through the real command: any division of a step, losses without a reference, margins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer, write_jsonl
from helpers_forks import Forks, train_on
from helpers_run import Inputs, lines, train_here, train_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minimind_dpo import TrainConfig, train_dpo
from minimind_dpo.config import load_config
from minimind_dpo.data.batch import pack_pairs
from minimind_dpo.errors import UserError
from minimind_dpo.losses import LOSSES
from minimind_dpo.objective.sums import discounts

# All losses at once, none so heavy that the others can't be seen in the weights.
LIGHT = {"cpo": 0.02, "slic": 0.002, "sppo_hard": 0.02, "orpo": 0.3, "sft": 0.3}
EVERYTHING = {
    "loss_type": list(LOSSES),
    "loss_weights": [LIGHT.get(name, 1.0) for name in LOSSES],
    "label_smoothing": 0.1,
    "learning_rate": 1e-3,
}


def words(inputs: Inputs, output_dir: Path, options: dict[str, Any]) -> list[str]:
    """Flags, those with several values too."""
    several = {name: value for name, value in options.items() if isinstance(value, list)}
    flags = inputs.flags(output_dir, **{name: value for name, value in options.items() if name not in several})
    return [*flags, *(str(word) for name, value in several.items() for word in (f"--{name}", *value))]


def weights(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_file(run / "model" / "model.safetensors").values()]).double()


def told(run: Path, prefix: str = "") -> list[dict[str, float]]:
    """What each line says of losses and gradient."""
    names = (f"{prefix}loss", f"{prefix}losses/", "grad_norm")
    return [
        {name: value for name, value in line.items() if name.startswith(names)}
        for line in lines(run)
        if f"{prefix}loss" in line
    ]


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every step in one micro-batch, so that losses over the step need one pass."""
    run = tmp_path_factory.mktemp("whole")
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert train_here(words(inputs, run, EVERYTHING | sizes | {"eval_data": inputs.eval_data})) == 0
    assert len(told(run)) == 3 and len(told(run)[0]) == len(LOSSES) + 2  # the last step has 5 pairs of 8
    return run


@pytest.mark.parametrize(
    ("engine", "micro_batch", "accumulation"),
    [(None, 2, 4), (None, 1, 8), ("multi_cpu", 2, 2), ("multi_cpu", 1, 4), ("ds_zero2_cpu", 1, 4)],
)
def test_any_division_of_a_step_gives_the_same_weights(
    inputs: Inputs, whole: Path, tmp_path: Path, engine: str | None, micro_batch: int, accumulation: int, forks: Forks
) -> None:
    """The sum of all losses at each step, every part on its own, the gradient, the weights, and the held-out losses."""
    sizes = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    train_on(engine, words(inputs, tmp_path, EVERYTHING | sizes | {"eval_data": inputs.eval_data}), forks, tmp_path)
    for prefix in ("", "eval_"):
        for ours, theirs in zip(told(tmp_path, prefix), told(whole, prefix), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)
    moved = weights(whole) - weights_of_start(inputs)
    assert (weights(tmp_path) - weights(whole)).norm() <= 1e-6 * weights(whole).norm()
    assert moved.norm() > 1e-2 * weights(whole).norm()  # or nothing would have been compared


def weights_of_start(inputs: Inputs) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_file(inputs.model / "model.safetensors").values()]).double()


def test_a_stateful_loss_resumes_exactly(inputs: Inputs, tmp_path: Path) -> None:
    """beta_dpo looks back at the margins of earlier steps; they are in the checkpoint."""
    options = {"loss_type": "beta_dpo", "beta_dpo_alpha": 5.0, "learning_rate": 1e-3, "save_steps": 1}
    options |= {"lr_scheduler_type": "constant"}
    assert train_here(words(inputs, tmp_path / "whole", options)) == 0
    assert train_here(words(inputs, tmp_path / "parts", options | {"max_steps": 2})) == 0
    assert train_here(words(inputs, tmp_path / "parts", options)) == 0
    assert told(tmp_path / "parts")[-1] == told(tmp_path / "whole")[-1]
    assert torch.equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    state = json.loads((tmp_path / "parts/checkpoints/step-000002/trainer_state.json").read_text())
    assert abs(state["running_logits"]) > 1e-4


def test_dropout_is_drawn_alike_in_both_passes(inputs: Inputs, tmp_path: Path) -> None:
    """Or the slopes of one draw would meet the graph of another."""
    options = {"loss_type": ["sigmoid"], "dropout": 0.3, "lora_r": 4, "lora_dropout": 0.5, "learning_rate": 1e-3}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert train_here(words(inputs, tmp_path / "apart", options | sizes)) == 0
    # with nothing but sigmoid in it the sum is the same loss, reached through the step's table
    both = options | sizes | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}
    assert train_here(words(inputs, tmp_path / "together", both)) == 0
    assert [line["loss"] for line in train_lines(tmp_path / "together")] == pytest.approx(
        [line["loss"] for line in train_lines(tmp_path / "apart")], rel=1e-6
    )


@pytest.mark.parametrize("engine", [None, "ds_zero3_cpu"])
def test_no_reference_is_held_where_none_is_read(
    inputs: Inputs, tmp_path: Path, forks: Forks, engine: str | None
) -> None:
    options = {
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 0.3,
        "learning_rate": 1e-3,
        "eval_data": inputs.eval_data,
    }
    flags = words(inputs, tmp_path / "run", options)
    codes = forks.run(flags, tmp_path, engine)
    said = (tmp_path / "log").read_text("utf-8")
    assert set(codes) == {0} and "reference: none (simpo reads none)" in said, said
    assert not (tmp_path / "cache" / "reference").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reference_digest"] is None
    first = train_lines(tmp_path / "run")[0]
    # rewards are those beside a reference that finds all answers alike
    assert first["rewards/chosen"] == pytest.approx(2.0 * first["logps/chosen"])
    assert train_lines(tmp_path / "run")[-1]["loss"] < first["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo", "reference": "cache"}, "reference: loss_type simpo has no reference"),
        ({"loss_type": "orpo", "ref_model_name_or_path": "x"}, "ref_model_name_or_path: loss_type orpo has no"),
        ({"simpo_gamma": 1.0}, "simpo_gamma: belongs to loss_type simpo"),
        ({"loss_type": "simpo", "simpo_gamma": -1}, "simpo_gamma: must be 0 or more, is -1"),
        ({"loss_type": "simpo", "simpo_gama": 1}, "simpo_gama: unknown key; did you mean simpo_gamma"),
        ({"loss_type": "exo_pair"}, "label_smoothing: must be above 0"),
        ({"loss_type": ["ipo", "ipo"]}, "loss_type: names a loss twice"),
        ({"loss_type": ["ipo", "aot"], "loss_weights": [1.0]}, "loss_weights: 1 for 2 loss_type"),
        ({"loss_type": ["ipo", "aot"], "loss_weights": [1.0, "x"]}, "loss_weights: expected numbers"),
        ({"loss_type": ["hinge", "nca_pair"], "label_smoothing": 0.1}, "label_smoothing: has no meaning for loss_type"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
            "forward_kl has no meaning for loss_type nca_pair",
        ),
        ({"loss_type": "cpo", "f_divergence_type": "forward_kl"}, "forward_kl has no meaning for loss_type cpo"),
        ({"loss_type": ["sigmoid", "aot"], "use_weighting": True}, "use_weighting: pairs have no weight under aot"),
        ({"ld_alpha": 1.5}, "ld_alpha: must be in [0, 1], is 1.5"),
        ({"ld_alpha": 0.5, "loss_type": "sft"}, "ld_alpha: has a meaning with another loss_type than sft alone only"),
        (
            {"f_alpha_divergence_coef": 0.7},
            "f_alpha_divergence_coef: has a meaning with f_divergence_type: alpha_diver",
        ),
        ({"ref_model_sync_steps": 7}, "ref_model_sync_steps: has a meaning with sync_ref_model: true only"),
        ({"loss_type": ["ipo", "aot"], "loss_weights": [0, 0]}, "loss_weights: expected numbers, not all of them 0"),
    ],
)
def test_what_does_not_go_together(inputs: Inputs, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        train_here(words(inputs, tmp_path, options))
    assert message in str(caught.value)


def test_several_values_in_one_text(inputs: Inputs, tmp_path: Path) -> None:
    """As a yaml file or a shell has them."""
    told = {"loss_type": "sigmoid,sft", "loss_weights": "1.0 0.2"}
    config = load_config(inputs.flags(tmp_path, **told))
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])


def test_settings_of_no_loss_are_refused(inputs: Inputs) -> None:
    config = TrainConfig(model_name_or_path="m", train_data=["d"], loss_settings={"beta": 3.0})
    with pytest.raises(UserError, match="loss_settings: beta belongs to no loss"):
        train_dpo(config)


def test_weights_of_pairs_need_a_loss_of_pairs(inputs: Inputs, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in inputs.train_data.read_text().splitlines()]
    rows[3]["weight"] = 2.0
    data = write_jsonl(tmp_path / "weighted.jsonl", rows)
    with pytest.raises(UserError, match="loss_type: aot takes pairs apart, so they can't have weights"):
        train_here(words(inputs, tmp_path / "run", {"train_data": data, "loss_type": ["bco", "aot"]}))
    with pytest.raises(UserError, match="and eval_data has some"):
        train_here(words(inputs, tmp_path / "run", {"eval_data": data, "loss_type": "aot"}))


def test_margins_are_used_and_kept(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A margin of m adds it to the argument: at the start the loss is log(1 + e^m)."""
    rows = [json.loads(line) | {"margin": 1.5} for line in inputs.train_data.read_text().splitlines()]
    data = write_jsonl(tmp_path / "margins.jsonl", rows)
    options = {"train_data": data, "max_steps": 2, "save_steps": 1}
    caplog.set_level("INFO")
    assert train_here(words(inputs, tmp_path / "run", options)) == 0
    expected = float(torch.log1p(torch.tensor(1.5).exp()))
    assert train_lines(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert "target margins (column margin): used by sigmoid" in caplog.text
    state = tmp_path / "run/checkpoints/step-000001/trainer_state.json"
    assert json.loads(state.read_text())["identity"]["margins"] == "used"
    assert train_here(words(inputs, tmp_path / "other", options | {"loss_type": "ipo"})) == 0
    assert "not used, since ipo has none" in caplog.text


def test_a_reference_with_another_tokenizer_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """Two words of the vocabulary change places; then only names that the data has no use for."""
    reference = tmp_path / "reference"
    AutoModelForCausalLM.from_pretrained(inputs.model).save_pretrained(reference)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(reference)
    settings = json.loads((reference / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    common, other = tokenizer.tokenize(" a")[0], tokenizer.tokenize("b")[0]
    vocabulary[common], vocabulary[other] = vocabulary[other], vocabulary[common]
    (reference / "tokenizer.json").write_text(json.dumps(settings))
    flags = words(inputs, tmp_path / "run", {"ref_model_name_or_path": reference, "max_steps": 1})
    with pytest.raises(UserError, match="has another tokenizer: to it token"):
        train_here(flags)
    vocabulary[common], vocabulary[other] = vocabulary[other], vocabulary[common]
    unused = [name for name in vocabulary if name.startswith("Ã") and len(name) == 2][:1]
    vocabulary[unused[0] + "?"] = vocabulary.pop(unused[0])
    settings["model"]["merges"] = [merge for merge in settings["model"]["merges"] if "".join(merge) != unused[0]]
    (reference / "tokenizer.json").write_text(json.dumps(settings))
    assert train_here(flags) == 0


def test_discounts_by_hand() -> None:
    """Answers of 3 and 1 tokens, then of 1 and 2."""
    rows = [
        {
            f"{side}_{kind}": values
            for side, (ids, mask) in sides.items()
            for kind, values in (("input_ids", ids), ("completion_mask", mask))
        }
        for sides in (
            {"chosen": ([9, 1, 2, 3], [0, 1, 1, 1]), "rejected": ([9, 4], [0, 1])},
            {"chosen": ([9, 1], [0, 1]), "rejected": ([9, 5, 6], [0, 1, 1])},
        )
    ]
    assert discounts(pack_pairs(rows), 0.25).tolist() == [1, 0.25, 0.25, 1, 1, 1, 0.25]
