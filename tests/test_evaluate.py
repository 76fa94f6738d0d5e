"""`minimind-dpo evaluate`: figures of held-out pairs against an oracle, at any rank count, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_forks import Forks
from helpers_run import WORDS, Inputs, lines, same_bits, train_here

from minimind_dpo import cli
from minimind_dpo.data.tokenized import load_tokenizer, tokenize_files
from minimind_dpo.models.loading import load_model

METRICS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties"),
    *("logps/chosen", "logps/rejected", "logps/accuracies"),
)


@pytest.fixture(scope="module")
def trained(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with held-out pairs and a checkpoint."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    assert train_here(inputs.flags(directory, eval_data=inputs.eval_data, save_steps=1)) == 0
    return directory


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 pairs, more than two chunks, with a column of topics."""
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    rows = [
        {
            "prompt": f"{number} {' '.join(rng.choices(WORDS, k=6))}",
            "chosen": " ".join(rng.choices(WORDS, k=rng.randint(1, 8))) + " chosen",
            "rejected": " ".join(rng.choices(WORDS, k=rng.randint(1, 8))) + " rejected",
            "topic": ["rivers", "stones", None][number % 3],
        }
        for number in range(150)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *flags: Any) -> dict[str, Any]:
    """What the command answers."""
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, flags), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def oracle_logps(model: Path, data: Path) -> torch.Tensor:
    """[N, 2] summed log-probabilities of both sides by the model's own forward pass, fp64, and [N, 2] their tokens."""
    policy = load_model(model)
    tokenized = tokenize_files(
        str(data), load_tokenizer(model), max_length=1024, completion_mask="all_assistant", on_bad_row="auto"
    )
    found = []
    for row in tokenized.dataset:
        for side in ("chosen", "rejected"):
            ids, mask = torch.tensor(row[f"{side}_input_ids"]), torch.tensor(row[f"{side}_completion_mask"])
            logps = policy(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append([float((logps * mask[1:]).sum().detach()), float(mask[1:].sum())])
    return torch.tensor(found, dtype=torch.float64).view(-1, 2, 2)


def test_figures_are_an_oracles(
    inputs: Inputs, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = evaluate(capsys, "--model", trained, "--data", inputs.eval_data, "--pairs", tmp_path / "pairs.jsonl")
    policy, start = (oracle_logps(model, inputs.eval_data) for model in (trained / "model", inputs.model))
    logratios = policy[..., 0] - start[..., 0]
    margins = 0.5 * (logratios[:, 0] - logratios[:, 1])
    per_token = policy[..., 0] / policy[..., 1]
    expected = {
        "loss": -torch.nn.functional.logsigmoid(margins).mean(),
        "rewards/chosen": 0.5 * logratios[:, 0].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).double().mean(),
        "rewards/ties": 0.0,
        "logps/chosen": policy[:, 0, 0].mean(),
        "logps/rejected": policy[:, 1, 0].mean(),
        "logps/accuracies": (per_token[:, 0] > per_token[:, 1]).double().mean(),
        "logps/chosen_drift": logratios[:, 0].mean(),
        "baseline/logps/chosen": start[:, 0, 0].mean(),
    }
    assert found["pairs"] == 5
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=2e-5), name
        low, high = found["interval"][name]
        assert low <= found[name] <= high
    assert abs(expected["rewards/margins"]) > 0.01  # the run moved it by far more than the tolerance
    dumped = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [line["rewards/margins"] for line in dumped] == pytest.approx(margins.tolist(), abs=2e-5)
    assert [line["place"] for line in dumped] == [f"{inputs.eval_data}:{number}" for number in range(1, 6)]
    assert [line["chosen_tokens"] for line in dumped] == policy[:, 0, 1].tolist()


def test_a_run_brings_its_reference_settings_and_data(
    inputs: Inputs, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word more it gives what the run's own last evaluation gave; so do its checkpoint and its model/."""
    after = json.loads((trained / "summary.json").read_text())["eval_after"]
    for model in (trained, trained / "model", trained / "checkpoints" / "step-000003"):
        found = evaluate(capsys, "--model", model)
        assert found["baseline"] == str(inputs.model)
        for name in METRICS:
            assert found[name] == pytest.approx(after[f"eval_{name}"], abs=1e-6), name
    first = evaluate(capsys, "--model", trained / "checkpoints" / "step-000002")
    logged = [line for line in lines(trained) if "eval_loss" in line]
    assert abs(first["loss"] - logged[-1]["eval_loss"]) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid_norm", "label_smoothing": 0.2},
        {"loss_type": "sigmoid", "ld_alpha": 0.3},
        {"loss_type": "sigmoid", "use_weighting": "true"},
        {"loss_type": "bco_pair"},
        {"loss_type": "simpo"},
        {"lora_r": 4, "completion_mask": "final_turn"},
    ],
)
def test_the_loss_is_the_runs_own(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    flags = inputs.flags(tmp_path / "run", eval_data=inputs.eval_data, max_steps=2, **options)
    assert train_here(flags) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["eval_after"]
    found = evaluate(capsys, "--model", tmp_path / "run")
    for name in ("loss", "logps/chosen", "logps/accuracies"):
        assert found[name] == pytest.approx(after[f"eval_{name}"], abs=3e-6), name


def test_any_number_of_ranks_gives_the_same_digits(
    trained: Path, held_out: Path, tmp_path: Path, forks: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(trained), "--data", str(held_out), "--by", "topic", "--json", "--pairs"]
    answers = []
    for engine in ("multi_cpu --num_processes 1", "multi_cpu", "multi_cpu --num_processes 4", "ds_zero3_cpu"):
        directory = tmp_path / engine.replace(" ", "")
        directory.mkdir()
        codes = forks.run([*flags, str(directory / "pairs")], directory, engine, program="minimind_dpo.evaluate")
        said = (directory / "log").read_text("utf-8")
        assert set(codes) == {0}, said
        (answer,) = [line for line in said.splitlines() if line.startswith('{"model"')]
        answers.append((answer, (directory / "pairs").read_bytes()))
    assert len(json.loads(answers[0][0])["by"]) == 3
    assert answers[1:] == answers[:-1]


def test_digits_do_not_depend_on_what_was_scored_before(
    trained: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part.jsonl"
    part.write_text("".join(held_out.read_text().splitlines(keepends=True)[7:]))
    evaluate(capsys, "--model", trained, "--data", held_out)
    warm = evaluate(capsys, "--model", trained, "--data", part)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MINIMIND_DPO_CACHE", str(tmp_path / "cold"))
        assert evaluate(capsys, "--model", trained, "--data", part) == warm


def test_groups_divide_the_pairs(
    trained: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, "--model", trained, "--data", held_out, "--by", "topic", "--pairs", tmp_path / "pairs")
    dumped = [json.loads(line) for line in (tmp_path / "pairs").read_text().splitlines()]
    assert [line["group"] for line in dumped[:3]] == ["rivers", "stones", "none"]
    for name, group in found["by"].items():
        own = [line["rewards/margins"] for line in dumped if line["group"] == name]
        assert (group["pairs"], group["rewards/margins"]) == (50, pytest.approx(sum(own) / 50))
    longer = [line["chosen_tokens"] / line["rejected_tokens"] for line in dumped]
    counts = {name: group["pairs"] for name, group in found["by_length"].items()}
    assert counts["as long"] == sum(ratio == 1 for ratio in longer)
    assert counts["chosen more than twice as long"] == sum(ratio > 2 for ratio in longer)
    assert counts["chosen less than half as long"] == sum(ratio < 0.5 for ratio in longer)
    assert sum(counts.values()) == 150
    by_file = evaluate(capsys, "--model", trained, "--data", held_out, "--by", "source")["by"]
    assert {name: group["pairs"] for name, group in by_file.items()} == {str(held_out): 150}


def test_two_models_against_each_other(
    inputs: Inputs, trained: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is the other's baseline: margins change sign, and neither gains on itself."""
    flags = ["--data", held_out, "--beta", "0.5", "--completion_mask", "all_assistant"]
    ours = evaluate(capsys, "--model", trained, *flags)
    theirs = evaluate(capsys, "--model", inputs.model, "--baseline", trained, *flags)
    assert theirs["rewards/margins"] == pytest.approx(-ours["rewards/margins"])
    assert theirs["gain/logps/accuracies"] == -ours["gain/logps/accuracies"] != 0
    assert theirs["baseline/logps/chosen"] == ours["logps/chosen"]
    itself = evaluate(capsys, "--model", trained, "--baseline", trained, *flags)
    assert (itself["rewards/ties"], itself["gain/logps/accuracies"]) == (1.0, 0.0)
    assert itself["loss"] == pytest.approx(0.6931471805599453, abs=1e-15)


def test_without_a_baseline_nothing_is_told_of_one(
    inputs: Inputs, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, "--model", inputs.model, "--data", held_out)
    assert found["baseline"] is found["loss"] is found["rewards/margins"] is None
    assert 0 < found["logps/accuracies"] < 1
    assert evaluate(capsys, "--model", inputs.model, "--data", held_out, "--loss_type", "simpo")["loss"] > 0
    assert cli.main(["evaluate", "--model", str(inputs.model), "--data", str(held_out)]) == 0
    assert "baseline: none" in capsys.readouterr().out


def test_several_sets(inputs: Inputs, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In training each has its own names, and the run is the same to the bit; `evaluate` answers for each."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_here(inputs.flags(one, eval_data=inputs.eval_data, max_steps=1)) == 0
    flags = inputs.flags(two, max_steps=1)
    assert train_here([*flags, "--eval_data", f"small={inputs.eval_data}", f"large={held_out}"]) == 0
    assert same_bits(one, two)
    last, summary = lines(two)[-1], json.loads((two / "summary.json").read_text())
    assert last["eval_small_loss"] == lines(one)[-1]["eval_loss"]
    assert summary["eval_after"]["eval_large_loss"] == last["eval_large_loss"] != last["eval_small_loss"]
    found = evaluate(capsys, "--model", two)["sets"]
    assert [found[name]["pairs"] for name in ("small", "large")] == [5, 150]
    assert found["small"]["loss"] == pytest.approx(last["eval_small_loss"], abs=1e-6)


def test_mistakes_are_told_plainly(
    inputs: Inputs, trained: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: Any) -> str:
        assert cli.main(["evaluate", *map(str, flags)]) == 2
        return capsys.readouterr().err

    assert "--data: missing" in refused("--model", inputs.model)
    message = refused("--model", trained, "--data", held_out, "--by", "colour")
    assert "--by colour: no row has this column; they have chosen, prompt, rejected, topic" in message
    message = refused("--model", trained, "--data", f"small={held_out}", inputs.eval_data)
    assert f"eval_data: {inputs.eval_data} needs a name as the others have" in message
    assert "150 different values" in refused("--model", trained, "--data", held_out, "--by", "prompt")
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text((trained / "config.yaml").read_text())
    (started / "checkpoints").mkdir()
    assert "neither model/ nor a checkpoint" in refused("--model", started)
    assert "beta: must be positive" in refused("--model", trained, "--beta", "0")


def test_replies_side_by_side(
    inputs: Inputs, trained: Path, tmp_path: Path, forks: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of each model on its own, whatever the rank count; for people in columns."""
    flags = ["--model", str(trained), "--generate_prompts", "3", "--max_new_tokens", "5"]
    found = evaluate(capsys, *flags)
    for who, path in (("model", trained), ("baseline", inputs.model)):
        alone = evaluate(capsys, "--model", path, "--data", inputs.eval_data, "--baseline", path, *flags[2:])
        assert [each[who] for each in found["replies"]] == [each["model"] for each in alone["replies"]]
        own = [each[who] for each in found["replies"]]
        assert found["reply_means"][who]["tokens"] == sum(reply["tokens"] for reply in own) / 3
        assert all(reply["tokens"] == 5 or reply["ended"] for reply in own)
    first = json.loads(inputs.eval_data.read_text().splitlines()[0])["chosen"][-2]["content"]
    assert found["replies"][0]["prompt"] == first
    codes = forks.run([*flags, "--json"], tmp_path, "ds_zero3_cpu", program="minimind_dpo.evaluate")
    said = (tmp_path / "log").read_text("utf-8")
    assert set(codes) == {0}, said
    assert json.dumps(found, ensure_ascii=False) in said.splitlines()
    assert cli.main(["evaluate", *flags]) == 0
    told = capsys.readouterr().out
    assert f"  baseline: {found['replies'][0]['baseline']['reply']}"[:30].rstrip() in told
    assert "model: 5.0 tokens a reply" in told or not all(each["model"]["tokens"] == 5 for each in found["replies"])
