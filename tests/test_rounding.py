"""Weights rounded from their masters: the arithmetic, what copies do in a model, and runs that learn by it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import write_jsonl
from helpers_forks import Forks
from helpers_model import random_row, tiny_model
from helpers_run import same_bits, train_lines
from torch import Tensor

from minimind_dpo import load_model, pack_pairs
from minimind_dpo.demo.run import ASSETS
from minimind_dpo.engine.fragments import HeldPart
from minimind_dpo.engine.rounding import HalfWeights, RoundedParts, rounded
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.objective.scoring import PairScorer

WEIGHTS = next(ASSETS.glob("*.pth"))
BF16, FP16 = torch.bfloat16, torch.float16
ROW = {
    "chosen_input_ids": list(range(5, 40)),
    "chosen_completion_mask": [0] * 10 + [1] * 25,
    "rejected_input_ids": [*range(5, 20), *range(60, 80)],
    "rejected_completion_mask": [0] * 10 + [1] * 25,
}


def neighbours(weight: float, dtype: torch.dtype) -> tuple[float, float]:
    """The two values of a type between which a weight lies, from below in magnitude."""
    nearest = torch.tensor(weight, dtype=dtype)
    toward_zero = (
        nearest if abs(float(nearest)) <= abs(weight) else torch.nextafter(nearest, torch.zeros((), dtype=dtype))
    )
    return float(toward_zero), float(
        torch.nextafter(toward_zero, torch.tensor(math.copysign(9.0, weight), dtype=dtype))
    )


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rounding", ["dithered", "stochastic"])
@pytest.mark.parametrize("weight", [0.05003, -0.3337, 1.9999, 3e-6, -2.22e-5])
def test_a_weight_goes_to_a_neighbour_as_often_as_it_lies_near_it(
    dtype: torch.dtype, rounding: str, weight: float
) -> None:
    weights = torch.full((65521,), weight)
    low, high = neighbours(float(weights[0]), dtype)
    values = rounded(weights, dtype, rounding, "a weight").double()
    assert set(values.unique().tolist()) <= {low, high}
    share = (float(weights[0]) - low) / (high - low)
    assert float((values == high).double().mean()) == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_on_the_grid_stay(dtype: torch.dtype) -> None:
    weights = torch.cat([torch.randn(70_000) * 0.05, torch.randn(1000) * 1e-6, torch.tensor([0.0, -0.0, 65504.0])])
    weights = weights.to(dtype).float()
    for rounding in ("dithered", "stochastic", "nearest"):
        assert torch.equal(rounded(weights, dtype, rounding, "w", step=3).float(), weights)


def test_a_threshold_is_the_name_s_and_the_index_s() -> None:
    weights = torch.randn(300, 1001) * 0.05
    whole = rounded(weights, BF16, "dithered", "layer.weight")
    flat = weights.flatten()
    for bounds in ([0, 300_300], [0, 17, 65_521, 262_144, 300_300]):
        parts = [
            rounded(flat[first:end], BF16, "dithered", "layer.weight", start=first) for first, end in pairwise(bounds)
        ]
        assert torch.equal(torch.cat(parts).view_as(whole), whole)
    assert torch.equal(rounded(weights, BF16, "dithered", "layer.weight", step=9), whole)
    assert not torch.equal(rounded(weights, BF16, "dithered", "another.weight"), whole)
    stochastic = [rounded(weights, BF16, "stochastic", "layer.weight", step=step) for step in (1, 1, 2)]
    assert torch.equal(stochastic[0], stochastic[1]) and not torch.equal(stochastic[0], stochastic[2])
    # the nearest value and the next best, never another
    assert float(((whole.float() - weights) / weights).abs().max()) < 2**-7


def test_a_small_update_shows_on_average_and_only_where_it_is_due() -> None:
    weights = torch.randn(400_000).to(BF16).float() * 2**-5
    moved = weights + 1e-6
    seen = {how: rounded(moved, BF16, how, "w").double() - weights.double() for how in ("nearest", "dithered")}
    assert float(seen["dithered"].mean()) == pytest.approx(1e-6, rel=0.05)
    large = weights.abs() > 2**-5
    assert float(seen["nearest"][large].abs().max()) == 0


def scorer_with(rounding: str, dtype: torch.dtype = BF16) -> tuple[PairScorer, HalfWeights]:
    scorer = PairScorer(load_model(WEIGHTS).train())
    scorer.fused_head = True
    weights = HalfWeights(scorer.product_weights(), dtype, rounding)
    scorer.half_weights = weights.copies
    return scorer, weights


def scores_and_gradients(scorer: PairScorer, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", dtype):
        scores = scorer(pack_pairs([ROW])).per_token_logps
    scores.sum().backward()
    gradients = {name: parameter.grad for name, parameter in scorer.model.named_parameters()}
    scorer.zero_grad()
    return scores.detach(), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_copies_to_the_nearest_are_autocast_s_own_casts(dtype: torch.dtype) -> None:
    scorer, _ = scorer_with("nearest", dtype)
    ours, ours_gradients = scores_and_gradients(scorer, dtype)
    scorer.half_weights = {}
    theirs, theirs_gradients = scores_and_gradients(scorer, dtype)
    assert torch.equal(ours, theirs)
    for name, gradient in ours_gradients.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, theirs_gradients[name]), name


def test_copies_are_what_is_multiplied_also_where_activations_are_made_again() -> None:
    scorer, _ = scorer_with("dithered")
    ours, gradients = scores_and_gradients(scorer, BF16)
    scorer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again, again_gradients = scores_and_gradients(scorer, BF16)
    assert torch.equal(ours, again)
    assert all(torch.equal(gradients[name], again_gradients[name]) for name in gradients)
    for name, master in scorer.product_weights().items():  # autocast has nothing left to round
        with torch.no_grad():
            master.copy_(rounded(master, BF16, "dithered", name).float())
    tied = scorer.model.get_input_embeddings().weight
    assert any(tied is master for master in scorer.half_weights)  # it is looked up in fp32, so it had to stay
    assert not {id(p) for p in scorer.product_weights().values()} & {
        id(p) for name, p in scorer.model.named_parameters() if "norm" in name
    }


def test_stacked_experts_with_lora_keep_what_peft_adds_to() -> None:
    """An fp32 base: copies stand in for all products but those of routers and experts, where peft puts its own sum."""
    model = tiny_model("qwen3_moe")
    add_adapters(model, r=2, alpha=4, dropout=0.0, target_modules=[], base="", seed=0)
    scorer = PairScorer(model.eval())
    names = scorer.product_weights().keys()
    assert not {name for name in names if name.endswith(("gate_up_proj", "down_proj", "gate.base_layer.weight"))}
    assert any("experts.lora_A" in name for name in names) and any("q_proj.base_layer" in name for name in names)
    batch = pack_pairs(
        [random_row(torch.Generator().manual_seed(0), prefix=5, chosen=9, rejected=4, mask="final_turn")]
    )
    expected = scorer(batch).per_token_logps
    scorer.half_weights = HalfWeights(scorer.product_weights(), BF16, "nearest").copies
    with torch.autocast("cpu", BF16):
        scores = scorer(batch).per_token_logps
    assert 0 < float((scores - expected).detach().abs().mean()) < 0.05


def test_a_frozen_scorer_multiplies_with_the_policy_s_values() -> None:
    policy, _ = scorer_with("dithered")
    reference = PairScorer(load_model(WEIGHTS))
    reference.fused_head = True
    embedding = reference.model.get_input_embeddings().weight
    reference.replace_product_weights(lambda name, weight: rounded(weight, BF16, "dithered", name))
    assert reference.model.get_input_embeddings().weight is embedding and embedding.dtype == torch.float32
    assert reference.model.lm_head.weight.dtype == BF16
    with torch.no_grad(), torch.autocast("cpu", BF16):
        ours, theirs = (scorer(pack_pairs([ROW])).per_token_logps for scorer in (policy, reference))
    assert torch.equal(ours, theirs)


def test_log_probabilities_of_half_precision_come_of_fp32_logits() -> None:
    """Sums over 100 tokens stay within 0.05 nats (rms) of the same factors' product in fp64."""
    torch.manual_seed(0)
    model = load_model(WEIGHTS)
    weight = model.lm_head.weight.detach().to(BF16)
    ids = torch.randint(5, len(weight), (64, 100))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.to(BF16)
    targets = ids.roll(-1, dims=1)
    from minimind_dpo.models.fast.head import token_logps

    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1)
    ours = token_logps(hidden.flatten(0, 1), weight, targets.flatten()).view_as(targets).double().sum(-1)
    rounded_logits = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1).double()
    assert float((ours - exact).square().mean().sqrt()) < 0.001
    assert float((rounded_logits - exact).square().mean().sqrt()) > 0.02  # what this is about


def test_parts_hold_rounded_values_from_the_step_on_until_they_are_put_back() -> None:
    flat = torch.nn.Parameter(torch.randn(1000) * 0.05)
    adamw = torch.optim.AdamW([flat], lr=1e-3)
    parts = [("a", HeldPart(flat, 0, 500, 400)), ("b", HeldPart(flat, 400, 0, 590))]  # and padding
    rounding = RoundedParts(adamw, parts, BF16, "dithered")
    flat.grad = torch.ones_like(flat)
    adamw.step()
    shown = flat.detach().clone()
    rounding.put_back(1)
    assert torch.equal(shown[:400], rounded(flat[:400], BF16, "dithered", "a", start=500).float())
    assert torch.equal(shown[400:990], rounded(flat[400:990], BF16, "dithered", "b").float())
    assert not torch.equal(shown[:990], flat[:990].to(BF16).float())
    with rounding.handed_out(1):
        assert torch.equal(flat, shown)
    assert not torch.equal(flat, shown)


@pytest.fixture(scope="module")
def on_the_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with weights as hub models are stored, and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    model = load_model(WEIGHTS)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16).float()
    model.save_pretrained(directory)
    shutil.copytree(ASSETS / "tokenizer", directory, dirs_exist_ok=True)
    return directory


def flags(model: Path, output_dir: Path, **options: Any) -> list[str]:
    """A run of one batch over and over, as far as learning rates of DPO go."""
    values = {
        "model_name_or_path": model,
        "tokenizer_name_or_path": ASSETS / "tokenizer",
        "train_data": output_dir.parent / "pairs.jsonl",
        "output_dir": output_dir,
        "loss_type": "sigmoid",
        "beta": 0.5,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 100,
        "max_steps": 40,
        "logging_steps": 1,
        "save_steps": 0,
    } | options
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    pairs = (ASSETS / "train.jsonl").read_text("utf-8").splitlines()[:16]
    (output_dir.parent / "pairs.jsonl").write_text("\n".join(pairs) + "\n", "utf-8")
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


Runs = Callable[..., str]


@pytest.fixture(scope="module")
def run(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trains to the end in forked processes; what the run said."""

    def run(model: Path, output_dir: Path, precision: str, engine: str = "single_cpu", **options: Any) -> str:
        words, surroundings = flags(model, output_dir, **options), tmp_path_factory.mktemp("surroundings")
        # a test has one cache for all its runs; a fixture that serves several is made before there is one
        cache = {"MINIMIND_DPO_CACHE": os.environ.get("MINIMIND_DPO_CACHE", str(surroundings / "cache"))}
        codes = forks.run(words, surroundings, f"{engine} --mixed_precision {precision}", **cache)
        said = (surroundings / "log").read_text("utf-8")
        assert set(codes) == {0}, said
        return said

    return run


def margins(output_dir: Path) -> list[float]:
    return [line["rewards/margins"] for line in train_lines(output_dir)]


def test_dithering_learns_as_fp32_does_where_the_nearest_does_not(run: Runs, tmp_path: Path, on_the_grid: Path) -> None:
    said = {}
    for name, precision, rounding in (
        ("fp32", "no", "auto"),
        ("dithered", "bf16", "auto"),
        ("stochastic", "bf16", "stochastic"),
        ("nearest", "bf16", "nearest"),
    ):
        said[name] = run(on_the_grid, tmp_path / name, precision, weight_rounding=rounding)
    learned = {name: margins(tmp_path / name) for name in said}
    for name in ("dithered", "stochastic"):
        assert learned[name][0] == 0  # policy and reference are the same bits
        assert sum(learned[name][20:]) == pytest.approx(sum(learned["fp32"][20:]), rel=0.2)
        assert "hides what this run learns" not in said[name]
    assert sum(learned["nearest"][20:]) < 0.75 * sum(learned["fp32"][20:])
    assert "weight_rounding: nearest hides what this run learns: in 5 steps" in said["nearest"]
    assert "hides" not in said["fp32"]


@pytest.fixture(scope="module")
def one_process(run: Runs, tmp_path_factory: pytest.TempPathFactory, on_the_grid: Path) -> list[float]:
    """Margins of 12 steps under one process."""
    directory = tmp_path_factory.mktemp("one")
    run(on_the_grid, directory / "run", "bf16", max_steps=12, learning_rate=5e-6)
    return margins(directory / "run")


@pytest.mark.parametrize(
    "engine", ["multi_cpu", "ds_zero1_cpu", "ds_zero2_cpu", "ds_zero3_cpu", "ds_zero2_offload_cpu"]
)
def test_every_engine_dithers_alike(
    run: Runs, tmp_path: Path, on_the_grid: Path, one_process: list[float], engine: str
) -> None:
    run(on_the_grid, tmp_path / "two", "bf16", engine, max_steps=12, learning_rate=5e-6, per_device_train_batch_size=8)
    two = margins(tmp_path / "two")
    assert one_process[0] == two[0] == 0
    assert sum(two) == pytest.approx(sum(one_process), rel=0.2) and sum(one_process) > 0.25


@pytest.mark.parametrize(
    ("engine", "precision", "rounding"),
    [
        ("single_cpu", "bf16", "dithered"),
        ("single_cpu", "bf16", "stochastic"),
        ("single_cpu", "fp16", "dithered"),
        ("multi_cpu", "bf16", "dithered"),
        ("ds_zero2_cpu", "bf16", "stochastic"),
        ("ds_zero3_cpu", "bf16", "dithered"),
    ],
)
def test_a_resumed_run_has_the_undisturbed_one_s_bits(
    run: Runs, tmp_path: Path, engine: str, precision: str, rounding: str
) -> None:
    settings: dict[str, Any] = {
        "learning_rate": 1e-5,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "weight_rounding": rounding,
    }
    run(WEIGHTS, tmp_path / "whole", precision, engine, **settings)
    run(WEIGHTS, tmp_path / "cut", precision, engine, **settings, save_steps=3)
    for newer in (tmp_path / "cut" / "checkpoints").glob("step-000006"):
        shutil.rmtree(newer)
    settings["weight_rounding"] = "auto"  # what was decided stays
    run(WEIGHTS, tmp_path / "cut", precision, engine, **settings, save_steps=3)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    assert margins(tmp_path / "whole") == margins(tmp_path / "cut")


def test_micro_batches_add_up_in_fp32_under_zero(run: Runs, tmp_path: Path, on_the_grid: Path) -> None:
    """In bf16 what is a thousandth of the sum would be lost, each time."""
    row = json.loads((ASSETS / "train.jsonl").read_text("utf-8").splitlines()[0])
    norms = {}
    for size in (1, 8):
        output_dir = tmp_path / str(size) / "run"
        words: dict[str, Any] = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 8 // size,
            "shuffle": "false",
        }
        rows = [row | {"weight": weight} for weight in (1.0, *[1 / 1024] * 15)]
        words["train_data"] = write_jsonl(tmp_path / "weighted.jsonl", rows)
        run(on_the_grid, output_dir, "bf16", "ds_zero2_cpu", max_steps=1, **words)
        norms[size] = train_lines(output_dir)[0]["grad_norm"]
    assert norms[1] == pytest.approx(norms[8], rel=2e-3)


def test_a_reference_off_the_grid_starts_equal_and_a_cache_belongs_to_its_rounding(run: Runs, tmp_path: Path) -> None:
    for rounding in ("dithered", "nearest"):
        for reference in ("cache", "live"):
            run(
                WEIGHTS,
                tmp_path / rounding / reference,
                "bf16",
                weight_rounding=rounding,
                reference=reference,
                max_steps=1,
            )
            (line,) = train_lines(tmp_path / rounding / reference)
            assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert line["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_another_rounding_is_another_run(run: Runs, forks: Forks, tmp_path: Path) -> None:
    run(WEIGHTS, tmp_path / "run", "bf16", max_steps=2, save_steps=1)
    config = (tmp_path / "run" / "config.yaml").read_text("utf-8")
    assert "weight_rounding: dithered" in config
    other = flags(WEIGHTS, tmp_path / "run", max_steps=4, weight_rounding="nearest")
    assert forks.run(other, tmp_path, "single_cpu --mixed_precision bf16") == [2]
    assert "weight_rounding: was dithered, is nearest" in (tmp_path / "log").read_text("utf-8")


def test_a_checkpoint_from_before_the_setting_goes_on_to_the_nearest(run: Runs, tmp_path: Path) -> None:
    run(WEIGHTS, tmp_path / "run", "bf16", max_steps=4, save_steps=2, weight_rounding="nearest")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "trainer_state.json"
    content = json.loads(state.read_text("utf-8"))
    del content["identity"]["weight_rounding"]
    state.write_text(json.dumps(content, indent=1), "utf-8")
    manifest = state.parent / "manifest.json"
    listed = json.loads(manifest.read_text("utf-8"))
    listed["files"][state.name] = {
        "size": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(listed), "utf-8")
    run(WEIGHTS, tmp_path / "run", "bf16", max_steps=4)
