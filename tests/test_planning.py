"""`minimind-dpo plan`: arithmetic by hand, sizes of real models, invariants, the command line, and one real run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_model import random_row, tiny_model
from helpers_planning import BILLION, planned, total
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from minimind_dpo.cli import main as cli
from minimind_dpo.data.batch import pack_pairs
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.fast.head import MOST_LOGITS
from minimind_dpo.objective.layout import PACKED, choose_layout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.planning import comparison
from minimind_dpo.planning.activations import head_logits, kept_activations, kept_softmax
from minimind_dpo.planning.allocation import LARGE, PURPOSES, allocate
from minimind_dpo.planning.configurations import configuration_name
from minimind_dpo.planning.measure import write_launch_files
from minimind_dpo.planning.peak import predict
from minimind_dpo.planning.phases import gradient_exchange, standing_states
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import read_shape, shape_of
from minimind_dpo.planning.states import reference_weights

REPOSITORY = Path(__file__).resolve().parent.parent
KINDS = ["llama", "qwen3", "qwen3_moe", "minimind_moe"]


def states(run: RunShape) -> dict[str, float]:
    """Bytes a parameter of weights, gradients and optimizer on the device, without buffers."""
    sums: dict[str, float] = {}
    for item in standing_states(BILLION, run) + gradient_exchange(BILLION, run):
        if item.purpose != "communication" and not item.on_host:
            sums[item.purpose] = sums.get(item.purpose, 0) + item.bytes / BILLION.total
    return sums


@pytest.mark.parametrize(
    ("stage", "world", "weights", "gradients", "optimizer"),
    [
        (0, 1, 4, 4, 8),  # autocast keeps fp32 weights: 16 bytes as well, divided otherwise
        (1, 1, 2, 2 + 2, 12),  # the paper's 2 + 2 + 12, and the reduced partition beside the gradients
        (1, 64, 2, 2 + 2 / 64, 12 / 64),
        (2, 64, 2, 2 / 64, 12 / 64),
        (3, 64, 2 / 64, 2 / 64, 12 / 64),
    ],
)
def test_model_states_in_bytes_a_parameter(
    stage: int, world: int, weights: float, gradients: float, optimizer: float
) -> None:
    """ZeRO's figure 1: 16 bytes a parameter in mixed precision, K = 12 of them the optimizer's."""
    found = states(planned(stage=stage, world=world, bf16=True))
    assert found == pytest.approx({"weights": weights, "gradients": gradients, "optimizer": optimizer})


def test_offload_moves_states_to_the_host() -> None:
    device = states(planned(stage=3, world=2, bf16=True, offload="all"))
    assert device == {}
    optimizer_only = states(planned(stage=2, world=2, bf16=True, offload="optimizer"))
    assert optimizer_only == pytest.approx({"weights": 2})
    host = standing_states(BILLION, planned(stage=3, world=2, bf16=True, offload="all"))
    # fp32 weights and two moments, bf16 weights and gradients, the fp32 gradient
    assert total(host, on_host=True) == pytest.approx((12 + 2 + 2 + 4) / 2 * 1e9)


def test_buckets_are_those_of_the_configurations() -> None:
    for stage in (2, 3):
        run = planned(stage=stage, world=2, bf16=True)
        buckets = [*gradient_exchange(BILLION, run), *standing_states(BILLION, run)]
        assert total(item for item in buckets if item.purpose == "communication") == 3 * 2 * 50_000_000


@pytest.mark.parametrize(
    ("name", "stage", "offload", "cpu", "bf16"),
    [
        ("zero1", 1, "none", False, True),
        ("zero2", 2, "none", False, True),
        ("zero3", 3, "none", False, True),
        ("zero2_offload", 2, "optimizer", False, True),
        ("zero3_offload", 3, "all", False, True),
        ("zero1_cpu", 1, "none", True, False),
        ("zero2_cpu", 2, "none", True, False),
        ("zero3_cpu", 3, "none", True, False),
        ("zero2_offload_cpu", 2, "optimizer", True, False),
        ("zero3_offload_cpu", 3, "all", True, False),
    ],
)
def test_measured_runs_use_the_settings_of_the_repository(
    name: str, stage: int, offload: str, cpu: bool, bf16: bool, tmp_path: Path
) -> None:
    settings = json.loads((REPOSITORY / "configs" / "deepspeed" / f"{name}.json").read_text("utf-8"))
    if cpu:
        settings["bf16"] = {"enabled": False}  # "auto" there
    run = planned(stage=stage, offload=offload, cpu=cpu, bf16=bf16, world=2)
    write_launch_files(tmp_path, run)
    assert json.loads((tmp_path / "deepspeed.json").read_text("utf-8")) == settings
    launch = yaml.safe_load((tmp_path / "accelerate.yaml").read_text("utf-8"))
    assert launch["deepspeed_config"].pop("deepspeed_config_file") == str(tmp_path / "deepspeed.json")
    named = REPOSITORY / "configs" / "accelerate" / f"{configuration_name(stage, offload, cpu, world=2)}.yaml"
    expected = yaml.safe_load(named.read_text("utf-8")) | {"num_processes": 2}
    assert expected["deepspeed_config"].pop("deepspeed_config_file") == f"configs/deepspeed/{name}.json"
    assert launch == expected


def test_reference_modes() -> None:
    """A frozen fp32 copy, ZeRO's share of it, nothing."""

    def held(**options: Any) -> tuple[float, float]:
        weights = reference_weights(BILLION, planned(world=4, **options))
        return total(weights, on_host=False) / 1e9, total(weights, on_host=True) / 1e9

    assert held(reference="live") == (4, 0)
    assert held(reference="live", stage=2, bf16=True) == (2, 0)
    assert held(reference="live", stage=3, bf16=True) == (0.5, 0)
    assert held(reference="offload", stage=2, bf16=True) == (0.002, 0.5)  # a layer here, a share there
    assert held(reference="offload") == (0.004, 4)
    assert held(reference="cache") == held(reference="adapter") == (0, 0)


def test_logits_head_by_hand() -> None:
    """2 pairs of 2 x 100 tokens over 1000 words: 400 rows of 1000 in fp32; of 10^5 such rows no more than a chunk."""
    assert total(head_logits(BILLION, planned(pairs=2, length=100))) == 400 * 1000 * 4
    assert total(head_logits(BILLION, planned(pairs=2, length=100, prompt_share=0.5))) == 200 * 1000 * 4
    assert total(head_logits(BILLION, planned(pairs=500, length=100))) == MOST_LOGITS * 4


def test_blocks_are_sorted_by_size() -> None:
    assert allocate("weights", [LARGE, LARGE - 1, 1], times=2)[1:3] == (2 * LARGE, 2 * LARGE)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_the_model_has_them(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    if kind != "minimind_moe":  # transformers does not know its name
        assert read_shape(str(tmp_path)).parameters == tuple(p.numel() for p in model.parameters())
    shape = shape_of(model)
    assert shape.total == model.num_parameters()
    assert shape.routed == (2 if kind.endswith("moe") else 0)
    adapted = tiny_model(kind)
    add_adapters(adapted, r=4, alpha=8, dropout=0.0, target_modules=[], base="", seed=0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert sum(shape_of(tiny_model(kind), lora_r=4).trained) == trained


def test_raw_weights_are_read_by_their_shapes(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "full_sft_64.pth")
    shape = read_shape(str(tmp_path / "full_sft_64.pth"))
    assert (shape.parameters, shape.stored) == (tuple(p.numel() for p in model.parameters()), 2)


def kept_by_autograd(model: PreTrainedModel, run: RunShape, autocast: bool) -> int:
    """Bytes of the tensors that a forward pass over a packed batch keeps for the backward pass, weights left out."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        random_row(
            generator,
            prefix=run.prefix,
            chosen=run.length - run.prefix,
            rejected=run.length - run.prefix,
            mask="final_turn",
        )
        for _ in range(run.pairs)
    ]
    scorer = PairScorer(model.train())
    assert choose_layout(scorer, "pairs", torch.device("cpu")) is PACKED
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weights = {tuple(shape) for parameter in model.parameters() for shape in (parameter.shape, parameter.shape[::-1])}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        rounded = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in weights  # a copy that autocast made
        if tensor.untyped_storage().data_ptr() not in own and not rounded:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = scorer(pack_pairs(rows))
    assert scores.per_token_logps.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora_r", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(kind: str, lora_r: int | None, autocast: bool) -> None:
    run = planned(pairs=2, length=120, prompt_share=0.25, bf16=autocast, cpu=True)
    model = tiny_model(kind)
    shape = shape_of(model, lora_r=lora_r)
    found = kept_by_autograd(model, run, autocast)
    kept = total(kept_activations(shape, run) + kept_softmax(shape, run)) + 4 * run.scored * shape.vocab
    # a mixture of experts rounds more often under autocast than is counted
    assert kept == pytest.approx(found, rel=0.2 if shape.routed and autocast else 0.1)


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("reference", ["cache", "live", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_need_more_each(stage: int, reference: str, cpu: bool) -> None:
    totals = [
        predict(BILLION, planned(stage=stage, world=world, reference=reference, cpu=cpu), 0)
        for world in (1, 2, 4, 8, 64)
    ]
    for where in (0, 1):
        sizes = [memory[where].total for memory in totals]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("cpu", [False, True])
def test_more_work_needs_more(cpu: bool) -> None:
    small = planned(pairs=64, length=512, cpu=cpu, prompt_share=0.5)
    base = predict(BILLION, small, 0)[0].total
    for change in ({"pairs": 128}, {"length": 1024}, {"prompt_share": 0.0}, {"reference": "live"}):
        assert predict(BILLION, replace(small, **change), 0)[0].total > base  # type: ignore[arg-type]
    assert predict(BILLION, replace(small, checkpointing=True), 0)[0].total < base


def test_parts_add_up_and_name_their_phase() -> None:
    device, host = predict(BILLION, planned(stage=2, world=2, offload="optimizer", bf16=True), 5e8, 1e8)
    assert device.total == sum(device.bytes_by_purpose.values()) and device.bytes_by_purpose["process"] == 1e8
    assert device.phase != "loading"
    assert host.bytes_by_purpose["optimizer"] == 6e9 + 2e9  # 12 bytes a weight, and 4 for rounded ones while it steps


@pytest.fixture
def model_config(tmp_path: Path) -> str:
    """A directory with nothing but a configuration."""
    LlamaConfig(
        vocab_size=640,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--zero_stage", "4"], "zero_stage"),
        (["--reference", "adapter"], "set lora_r too"),
        (["--zero_stage", "2", "--offload", "all"], "needs zero_stage 3"),
        (["--zero_stage", "0", "--offload", "optimizer"], "needs zero_stage 2 or 3"),
        (["--offload", "all"], "set zero_stage too"),
        (["--num_processes", "0"], "num_processes: must be at least 1"),
        (["--num_processes", "2", "--processes_per_node", "3"], "more than num_processes"),
        (["--max_length", "1", "--lora_r", "0"], "lora_r: must be at least 1"),
        (["--prompt_share", "1"], "prompt_share"),
        (["--host_memory_gib", "-1"], "host_memory_gib"),
        (["--measure"], "set zero_stage"),
        (["--measure", "--zero_stage", "0", "--device", "cuda", "--num_processes", "64"], "use --device cpu"),
        (["--num_attention_heads", "8"], "leave the flag out"),
        (["--no_such_flag", "1"], "unrecognized arguments"),
    ],
)
def test_nonsense_is_one_clear_error(
    flags: list[str], message: str, model_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["plan", "--model_name_or_path", model_config, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("minimind-dpo: error:") == 1 and "Traceback" not in error


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["plan", "--model_name_or_path", "./no/such/model"]) == 2
    assert "no such model" in capsys.readouterr().err


def test_all_configurations_are_compared(
    model_config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "process_bytes", lambda: 2.0**29)
    flags = [
        "plan",
        "--model_name_or_path",
        model_config,
        "--num_processes",
        "2",
        "--device_memory_gib",
        "80",
        "--host_memory_gib",
        "64",
    ]
    assert cli([*flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        "model",
        "parameters",
        "trained_parameters",
        "setup",
        "available_gib",
        "plans",
        "recommended",
        "suggestion",
    }
    assert [plan["name"] for plan in report["plans"]] == [
        "multi_gpu",
        "ds_zero1",
        "ds_zero2",
        "ds_zero2_offload",
        "ds_zero3",
        "ds_zero3_offload",
    ]
    for plan in report["plans"]:
        assert (REPOSITORY / "configs" / "accelerate" / f"{plan['name']}.yaml").is_file()
        assert set(plan) == {
            "name",
            "reference",
            "fits",
            "lacks",
            "max_tokens_per_micro_batch",
            "device",
            "host",
            "host_node_gib",
        }
        assert plan["reference"] == ("live" if plan["name"] == "multi_gpu" else "cache")  # the larger of auto's choices
        assert set(plan["device"]["parts_gib"]) == set(PURPOSES)
        assert plan["fits"] is True
    assert report["recommended"] == "multi_gpu"
    pairs, rest = divmod(report["plans"][0]["max_tokens_per_micro_batch"], 2 * 1023)
    assert rest == 0
    for more, fits in ((0, True), (1, False)):
        assert cli([*flags, "--json", "--per_device_train_batch_size", str(pairs + more)]) == 0
        assert json.loads(capsys.readouterr().out)["plans"][0]["fits"] is fits
    assert cli(flags) == 0 and "recommended: multi_gpu" in capsys.readouterr().out
    flags[flags.index("80")] = "0.1"
    assert cli(flags) == 0 and "none of them fits" in capsys.readouterr().out


def test_a_row_says_what_it_lacks_and_what_would_fit(
    model_config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device as large as one pair with recomputed activations needs, and on a host with too little."""
    monkeypatch.setattr(comparison, "process_bytes", lambda: 2.0**29)
    flags = ["plan", "--model_name_or_path", str(Path(model_config) / "config.json"), "--zero_stage", "0"]
    least = ["--per_device_train_batch_size", "1", "--gradient_checkpointing", "true"]

    def report(*more: str) -> dict[str, Any]:
        assert cli([*flags, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    enough = report(*least, "--device_memory_gib", "80")["plans"][0]["device"]["total_gib"] * comparison.SPARE * 1.0001
    found = report("--device_memory_gib", str(enough))
    assert found["plans"][0]["fits"] is False and found["plans"][0]["lacks"] == "device"
    assert found["available_gib"] == {
        "device": enough,
        "host": None,
    }  # another machine's GPU: this one's host says nothing
    assert found["suggestion"]["flags"] == {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    assert report(*least, "--device_memory_gib", str(enough))["plans"][0]["fits"] is True
    found = report("--device_memory_gib", "80", "--host_memory_gib", "0.1")
    assert found["plans"][0]["lacks"] == "host" and found["suggestion"] is None
    assert cli([*flags, "--device_memory_gib", str(enough)]) == 0
    shown = capsys.readouterr().out
    assert "no: device" in shown and "machine unknown (--host_memory_gib)" in shown
    assert "it would fit with --per_device_train_batch_size 1 --gradient_checkpointing true" in shown


def test_without_the_devices_memory_nothing_is_said_not_to_fit(
    model_config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "process_bytes", lambda: 2.0**29)
    monkeypatch.setattr(comparison.torch.cuda, "is_available", lambda: False)
    assert cli(["plan", "--model_name_or_path", model_config, "--num_processes", "2"]) == 0
    shown = capsys.readouterr().out
    assert "recommended: not known without --device_memory_gib" in shown and "none of them" not in shown
    assert "\n\n\n" not in shown


def test_a_real_run_is_within_fifteen_percent(model_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks under ZeRO 2 on this machine; the random weights are made from the configuration."""
    assert (
        cli(
            [
                "plan",
                "--model_name_or_path",
                model_config,
                "--num_processes",
                "2",
                "--zero_stage",
                "2",
                "--device",
                "cpu",
                "--per_device_train_batch_size",
                "2",
                "--max_length",
                "128",
                "--measure",
                "--json",
            ]
        )
        == 0
    )
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert 0.85 < measured["ratio"] < 1.15, measured
