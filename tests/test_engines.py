"""Runs under every engine: the single process's numbers, on 1, 2 and 4 ranks, and across them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers_data import tiny_tokenizer
from helpers_forks import Forks
from helpers_model import tiny_model
from helpers_run import REPOSITORY, Inputs, make_inputs, relative_distance, run_command, same_bits, train_lines

pytestmark = pytest.mark.xdist_group("engines")  # most tests compare with runs that another one has trained
# 21 pairs in global batches of 8, two epochs: steps of 8, 8, 5, 8, 8, 5 pairs
BATCH = {
    1: {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    2: {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    4: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
}
OPTIONS = {"learning_rate": 2e-4, "num_train_epochs": 2, "save_steps": 2, "save_total_limit": 0}
LAUNCHED = ("multi_cpu", "ds_zero3_cpu")  # by the real command, one of each kind of launcher
ENGINES = ["multi_cpu", "ds_zero1_cpu", "ds_zero2_cpu", "ds_zero2_offload_cpu", "ds_zero3_cpu", "ds_zero3_offload_cpu"]


def ranks(engine: str | None) -> int:
    return 1 if engine is None else int(engine.partition("--num_processes ")[2] or 2)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    make_inputs(directory / "inputs")
    return directory


def trained(workspace: Path, forks: Forks, engine: str | None, name: str | None = None, **options: object) -> Path:
    """The directory of a run under `engine`, trained once for all tests of this module: forked, or by the command."""
    output_dir = workspace / (name or engine or "single").replace(" ", "_")
    if not output_dir.exists():
        inputs = Inputs(*(workspace / "inputs" / part for part in ("model", "train.jsonl", "eval.jsonl")))
        flags = inputs.flags(output_dir, **(OPTIONS | BATCH[ranks(engine)] | options))
        cache = workspace / "cache" / output_dir.name
        if name is None and engine in LAUNCHED:
            result = run_command(flags, engine, MINIMIND_DPO_CACHE=str(cache))
            assert result.returncode == 0, result.stderr
        else:
            cache.mkdir(parents=True)
            assert set(forks.run(flags, cache, engine)) == {0}, (cache / "log").read_text("utf-8")
    return output_dir


def assert_same_run(run: Path, other: Path, first_step: int = 1, weights_within: float = 1e-6) -> None:
    """Losses to 1e-5 and gradient norms to 1e-3 relative, step by step, and the final weights."""
    expected = [line for line in train_lines(other) if line["step"] >= first_step]
    assert [line["step"] for line in train_lines(run)] == [line["step"] for line in expected]
    for ours, theirs in zip(train_lines(run), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["pairs_seen"] == theirs["pairs_seen"]
    assert relative_distance(run, other) < weights_within


@pytest.mark.parametrize("engine", [*ENGINES, "ds_zero2_cpu --num_processes 4", "ds_zero3_cpu --num_processes 4"])
def test_every_engine_trains_the_same_run(workspace: Path, forks: Forks, engine: str) -> None:
    assert_same_run(trained(workspace, forks, engine), trained(workspace, forks, None))


def test_nothing_is_compiled(workspace: Path, tmp_path: Path, forks: Forks) -> None:
    """A build leaves a lock when it is killed, and later runs would wait for it."""
    inputs = Inputs(*(workspace / "inputs" / part for part in ("model", "train.jsonl", "eval.jsonl")))
    flags, extensions = inputs.flags(tmp_path / "run", max_steps=1), str(tmp_path / "extensions")
    codes = forks.run(flags, tmp_path, "ds_zero2_cpu --num_processes 1", TORCH_EXTENSIONS_DIR=extensions)
    assert codes == [0], (tmp_path / "log").read_text("utf-8")
    assert not (tmp_path / "extensions").exists()


@pytest.mark.parametrize(
    ("wrote", "continues"),
    [
        ("multi_cpu", None),
        ("multi_cpu", "multi_cpu --num_processes 4"),
        ("ds_zero1_cpu", "ds_zero1_cpu --num_processes 1"),
        ("ds_zero1_cpu", "ds_zero1_cpu --num_processes 4"),
        ("ds_zero2_cpu", "ds_zero2_cpu --num_processes 1"),
        ("ds_zero2_cpu", "ds_zero2_cpu --num_processes 4"),
        ("ds_zero3_cpu", "ds_zero3_cpu --num_processes 1"),
        ("ds_zero3_cpu", "ds_zero3_cpu --num_processes 4"),
        ("ds_zero3_offload_cpu", None),
        (None, "ds_zero3_cpu"),
    ],
)
def test_a_checkpoint_continues_elsewhere(
    workspace: Path, forks: Forks, wrote: str | None, continues: str | None
) -> None:
    """Step 2's checkpoint of two ranks goes on with one and with four, in every stage, and from stage to stage."""
    checkpoint = trained(workspace, forks, wrote) / "checkpoints" / "step-000002"
    run = trained(workspace, forks, continues, f"{wrote}-to-{continues}", resume=checkpoint)
    assert_same_run(run, trained(workspace, forks, None), first_step=3)


@pytest.mark.parametrize("engine", ["ds_zero2_cpu", "ds_zero3_cpu"])
def test_a_resumed_run_has_the_same_bits(workspace: Path, forks: Forks, engine: str) -> None:
    """Also with dropout, which is drawn from the step and the rank."""
    options = {"lora_r": 4, "lora_dropout": 0.2, "num_train_epochs": 1}
    whole = trained(workspace, forks, engine, f"{engine}-whole", **options)
    checkpoint = whole / "checkpoints" / "step-000002"
    parts = trained(workspace, forks, engine, f"{engine}-parts", resume=checkpoint, **options)
    assert same_bits(parts, whole)


@pytest.mark.parametrize(
    ("engine", "reference"),
    [
        *(
            (engine, mode)
            for engine in (None, "ds_zero2_cpu", "ds_zero3_cpu")
            for mode in ("live", "offload", "adapter")
        ),
        ("multi_cpu", "offload"),
    ],
)
def test_reference_modes_agree(workspace: Path, forks: Forks, engine: str | None, reference: str) -> None:
    """Rewards are beta times the log-ratio to the reference: with equal ones, its log-probabilities are equal."""
    options = {"num_train_epochs": 1} | ({"lora_r": 4} if reference == "adapter" else {})
    expected = trained(workspace, forks, None, f"cache-{bool(options.get('lora_r'))}", reference="cache", **options)
    run = trained(workspace, forks, engine, f"{engine}-{reference}", reference=reference, **options)
    assert_same_run(run, expected)
    for ours, theirs in zip(train_lines(run), train_lines(expected), strict=True):
        for side in ("chosen", "rejected"):
            reference_logps = [line[f"logps/{side}"] - line[f"rewards/{side}"] / 0.5 for line in (ours, theirs)]
            assert reference_logps[0] == pytest.approx(reference_logps[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["minimind_moe", "qwen3_moe"])
def test_mixtures_of_experts_are_sharded_too(workspace: Path, forks: Forks, kind: str) -> None:
    """Experts are chosen by data, so ranks would gather in different orders; none may wait for ever."""
    tokenizer = tiny_tokenizer()
    model = workspace / kind
    tiny_model(kind, vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    options = {"model_name_or_path": model, "num_train_epochs": 1, "reference": "live"}
    single = trained(workspace, forks, None, f"single-{kind}", **options)
    assert train_lines(single)[0]["aux_loss"] > 0
    assert_same_run(trained(workspace, forks, "ds_zero3_cpu", f"zero3-{kind}", **options), single)


@pytest.mark.parametrize("engine", [None, "ds_zero2_cpu", "ds_zero3_cpu"])
def test_an_offloaded_reference_is_a_layer_on_the_device(
    workspace: Path, tmp_path: Path, forks: Forks, engine: str | None
) -> None:
    """Counted at every operation of a forward pass; between passes nothing is there."""
    tiny_model("llama", num_hidden_layers=8).save_pretrained(workspace / "deep")
    words, program = [str(workspace / "deep"), str(workspace / "unused")], "tests/programs/held_by_reference.py"
    codes = forks.run(words, tmp_path, engine, program=program)
    said = (tmp_path / "log").read_text("utf-8")
    found = re.search(r"HELD whole=(\d+) largest=(\d+) most=(\d+) between=(\d+)", said)
    assert set(codes) == {0} and found, said
    whole, largest, most, between = map(int, found.groups())
    assert 0 < most <= largest < whole / 2
    assert between == 0


@pytest.mark.parametrize("engine", ["ds_zero2_cpu", "ds_zero3_cpu"])
def test_bf16_stays_close(workspace: Path, forks: Forks, engine: str) -> None:
    half = trained(workspace, forks, f"{engine} --mixed_precision bf16", num_train_epochs=1)
    full = trained(workspace, forks, None)
    for ours, theirs in zip(train_lines(half), train_lines(full), strict=False):
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=0.02)
        assert ours["logps/chosen"] != theirs["logps/chosen"]


@pytest.mark.parametrize(
    ("engine", "rank", "grief", "message"),
    [
        ("multi_cpu", 1, "fails", "the disk of this rank is on fire"),
        ("ds_zero3_cpu", 0, "fails", "the disk of this rank is on fire"),
        ("ds_zero2_cpu", 1, "user_error", "rank 1: error: a file that only this rank misses"),
        ("multi_cpu", 1, "stops", "rank 0: error: another rank gives no answer for 15 s (ddp_timeout)"),
    ],
)
def test_when_one_rank_fails_all_leave(
    workspace: Path, tmp_path: Path, forks: Forks, engine: str, rank: int, grief: str, message: str
) -> None:
    inputs = Inputs(*(workspace / "inputs" / part for part in ("model", "train.jsonl", "eval.jsonl")))
    words = [str(rank), "2", grief, *inputs.flags(tmp_path / "run", **(OPTIONS | BATCH[2]), ddp_timeout=15)]
    codes = forks.run(words, tmp_path, engine, program="tests/programs/one_rank.py")
    said = (tmp_path / "log").read_text("utf-8")
    assert 0 not in codes and message in said, said
    assert said.count("Traceback (most recent call last)") <= 1


def test_contradictions_are_one_clear_error(workspace: Path, tmp_path: Path, forks: Forks) -> None:
    """All of them at once, each with the name of what decides."""
    settings = json.loads((REPOSITORY / "configs/deepspeed/zero2_cpu.json").read_text()) | {
        "gradient_clipping": 0.5,
        "optimizer": {"type": "Adam"},
        "train_micro_batch_size_per_gpu": 3,
    }
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    accelerate = (REPOSITORY / "configs/accelerate/ds_zero2_cpu.yaml").read_text()
    (tmp_path / "own.yaml").write_text(accelerate.replace("configs/deepspeed/zero2_cpu.json", f"{tmp_path}/zero.json"))
    inputs = Inputs(*(workspace / "inputs" / part for part in ("model", "train.jsonl", "eval.jsonl")))
    assert forks.run(inputs.flags(tmp_path / "run"), tmp_path, f"{tmp_path}/own --num_processes 1") == [2]
    said = (tmp_path / "log").read_text("utf-8")
    for message in (
        "gradient_clipping: 0.5, but the training configuration decides this: max_grad_norm is 1.0",
        "optimizer: is set, but the training configuration decides this",
        "train_micro_batch_size_per_gpu: 3",
        "per_device_train_batch_size is 4",
    ):
        assert message in said
