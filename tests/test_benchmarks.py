"""The benchmarks' machinery: pairs have the lengths they claim, contestants compute the same, verdicts are right."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import helpers_workers
import pytest
import torch
from helpers_run import REPOSITORY
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(REPOSITORY))  # `benchmarks` is no part of the installed package

from benchmarks import checking, throughput, workloads  # noqa: E402
from benchmarks.padded import naive_losses  # noqa: E402
from benchmarks.peers import _grouped, contest  # noqa: E402
from benchmarks.targets import check_targets  # noqa: E402
from benchmarks.workers import Gate, Window, Worker, WorkerFailed  # noqa: E402
from minimind_dpo.data.batch import pack_pairs  # noqa: E402
from minimind_dpo.data.chat import load_tokenizer  # noqa: E402
from minimind_dpo.data.check import run_check  # noqa: E402
from minimind_dpo.data.tokenized import tokenize_files  # noqa: E402

VOCAB = 80


class _Enough(Exception):
    pass


class _Losses(Gate):
    """A gate that collects so many losses, then interrupts."""

    def __init__(self, steps: int):
        self.losses: list[float] = []
        self.wanted = steps

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.wanted:
            raise _Enough


@pytest.fixture
def job(tmp_path: Path) -> workloads.Job:
    """A tiny model and ten short pairs in two windows."""
    shape = workloads.tiny_shape(VOCAB)
    shape.update({"hidden_size": 32, "intermediate_size": 64})
    workloads.word_tokenizer(VOCAB).save_pretrained(tmp_path / "tokenizer")
    lengths = [workloads.PairLengths(5 + i, 4 + i % 3, 9 - i % 4, 5 + i + i % 2) for i in range(10)]
    return workloads.Job(
        model=workloads.save_model(shape, tmp_path / "model"),
        tokenizer=str(tmp_path / "tokenizer"),
        pairs=workloads.write_pairs(tmp_path / "pairs.jsonl", lengths, VOCAB),
        scratch=str(tmp_path),
        batch=2,
        micro_batch=2,
        max_length=32,
        windows=(1, 2, 2),
        threads=torch.get_num_threads(),
        learning_rate=1e-2,
    )


@pytest.mark.parametrize("mix", workloads.MIXES)
def test_rows_have_their_lengths_in_tokens(mix: str, tmp_path: Path) -> None:
    lengths = workloads.mix_lengths(mix, 40, seed=3)
    tokenizer = workloads.word_tokenizer(VOCAB)
    path = workloads.write_pairs(tmp_path / "pairs.jsonl", lengths, VOCAB)
    data = tokenize_files(
        [path], tokenizer, max_length=workloads.MAX_LENGTH[mix], completion_mask="all_assistant", on_bad_row="fail"
    ).dataset
    assert lengths == workloads.mix_lengths(mix, 40, seed=3) != workloads.mix_lengths(mix, 40, seed=4)
    for index, pair in enumerate(lengths):
        batch = pack_pairs([data[index]])
        assert batch.side_sizes == (pair.chosen, pair.rejected)
        assert (batch.num_tokens, len(batch.logit_positions)) == (pair.packed, pair.counted)
        assert batch.segments is not None and batch.segments[0].prefix == pair.shared
        assert len(data[index]["chosen_input_ids"]) == pair.prompt + pair.chosen


def test_the_chat_mix_is_the_real_one() -> None:
    """Its means are those of the whole file: 174 prompt, 51 chosen and 64 rejected tokens."""
    lengths = workloads.mix_lengths("chat", 2000)
    means = [sum(getattr(pair, name) for pair in lengths) / len(lengths) for name in ("prompt", "chosen", "rejected")]
    assert means == pytest.approx([174, 51, 64], rel=0.05)
    assert max(pair.longest for pair in lengths) <= workloads.MAX_LENGTH["chat"]


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_contestants_train_alike(job: workloads.Job, loss_type: str) -> None:
    """Five steps that visibly move the weights; reference cached, live, the naive step, and TRL both ways."""
    pytest.importorskip("trl")
    job = dataclasses.replace(job, loss_type=loss_type)
    losses = {}
    for name in ("ours_cached", "ours_live", "naive", "trl_mb1", "trl_live"):
        gate = _Losses(job.steps)
        with pytest.raises(_Enough):
            contest(name, job, gate)
        losses[name] = gate.losses
    assert max(abs(loss - math.log(2)) for loss in losses["ours_cached"]) > 5e-3
    for name, values in losses.items():
        assert values == pytest.approx(losses["ours_cached"], rel=1e-4), name


def test_the_filling_pass_has_steps_too(job: workloads.Job) -> None:
    gate = _Losses(job.steps)
    with pytest.raises(_Enough):
        contest("ours_fill", job, gate)
    assert len(gate.losses) == job.steps


def test_naive_losses_by_hand() -> None:
    """Policy and reference predict uniformly but for one token: the loss follows from that token's logit."""

    class Model:
        def __init__(self, logit: float):
            self.logit = logit

        def __call__(self, inputs: torch.Tensor) -> Any:
            logits = torch.zeros(*inputs.shape, 4)
            logits[..., 1] = self.logit
            return type("Output", (), {"logits": logits})

    batch = {
        "x_chosen": torch.zeros(1, 2, dtype=torch.long),
        "x_rejected": torch.zeros(1, 2, dtype=torch.long),
        "y_chosen": torch.tensor([[1, 1]]),
        "y_rejected": torch.tensor([[2, 0]]),
        "mask_chosen": torch.tensor([[1, 1]]),
        "mask_rejected": torch.tensor([[1, 0]]),
    }
    raised = torch.log_softmax(torch.tensor([0.0, 2.0, 0.0, 0.0]), 0) - torch.log(torch.tensor(0.25))
    for loss_type, tokens in (("sigmoid", 2), ("sigmoid_norm", 1)):
        margin = 0.5 * (tokens * raised[1] - raised[2])
        expected = torch.log1p(torch.exp(-margin))
        assert naive_losses(Model(2.0), Model(0.0), batch, loss_type, 0.5) == pytest.approx(expected.view(1))


def test_padded_batches_are_laid_out_as_minimind_does(job: workloads.Job) -> None:
    rows, tokenizer = workloads.read_rows(job.pairs)[:2], workloads.word_tokenizer(VOCAB)
    batch = workloads.padded_batch(rows, tokenizer, 20)
    tokens = tokenizer(rows[1]["prompt"] + rows[1]["rejected"] + "</s>")["input_ids"]
    assert {part.shape for part in batch.values()} == {(2, 19)}
    assert batch["x_rejected"][1, : len(tokens)].tolist() == tokens[:19]
    assert batch["y_rejected"][1][batch["mask_rejected"][1].bool()].tolist() == tokens[6:]


def test_groups_are_windows_by_length(job: workloads.Job) -> None:
    rows = workloads.read_rows(job.pairs)
    grouped = _grouped(rows, job)
    for start, end in ((0, 2), (2, 6), (6, 10)):
        lengths = [
            max(len((row["prompt"] + row[side]).split()) for side in ("chosen", "rejected"))
            for row in grouped[start:end]
        ]
        assert sorted(map(str, grouped[start:end])) == sorted(map(str, rows[start:end]))
        assert lengths == sorted(lengths, reverse=True)


def test_parameters_are_counted_without_weights(job: workloads.Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model)
    assert workloads.parameter_counts(job.model) == (sum(p.numel() for p in model.parameters()), VOCAB * 32)


def test_workers_take_turns_and_say_why_they_failed(tmp_path: Path) -> None:
    worker = Worker("counter", helpers_workers.contest, helpers_workers.prepare, "count", tmp_path / "log", warm_up=2)
    assert worker.warm_up.losses == [1.0, 2.0]
    assert [worker.run(2).losses, worker.run(1).losses] == [[3.0, 4.0], [5.0]]
    worker.close()
    with pytest.raises(WorkerFailed, match="no such luck"):
        Worker("unlucky", helpers_workers.contest, helpers_workers.prepare, "fail", tmp_path / "log")


def test_figures_and_verdicts(job: workloads.Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours takes 1 s a pair at 100 MiB, filling 0.25 s, TRL 3 s at 300 MiB, live 6 s, MiniMind 20 s a pair."""

    def windows(seconds: float, mib: int, steps: int, loss: float = 0.5) -> list[Window]:
        return [Window(seconds * 2 * n, [loss] * n, mib * 2**20) for n in (1, steps, steps)]

    results = {
        "ours_cached": windows(1, 100, 2),
        "ours_fill": windows(0.25, 120, 2),
        "trl": windows(3, 300, 2),
        "trl_live": windows(6, 300, 2, loss=0.6),
        "minimind": windows(20, 900, 1),
    }
    lengths = [workloads.PairLengths(10, 6, 6, 10)] * 10
    summary = throughput.summarise(results, 50.0, lengths, job)
    parameters = summary["parameters"]
    rows = summary["contestants"]
    assert rows["ours_cached"]["gflops"] == pytest.approx(6 * parameters * 20 / 1e9)
    assert rows["first epoch"]["seconds_a_pair"] == 1.25 and rows["first epoch"]["peak_mib"] == 120
    assert rows["minimind"]["gflops"] == pytest.approx(8 * parameters * 20 / 20 / 1e9)
    assert rows["trl"]["exact_gflops"] == pytest.approx(6 * (parameters * 20 - VOCAB * 32 * 8) / 3 / 1e9)
    assert summary["loss_differences"]["trl"] == 0
    assert summary["loss_differences"]["trl_live"] == pytest.approx(0.2)

    # TRL in half precision is faster, and not what ours in fp32 is held against
    by_round = summary["seconds_a_pair_by_round"]
    by_round["trl_mb1_bf16"] = [seconds / 2 for seconds in by_round["trl"]]
    check_targets(summary, "chat", 4, default_model=True)
    printed = capsys.readouterr().out
    for line in (
        "pass: ours_cached is so many times as fast as trl: 3.00 (at least 2.4)",
        "FAIL: ours_cached is so many times as fast as trl: 3.00 (at least 4)",
        "pass: first epoch is so many times as fast as trl_live: 4.80 (at least 4)",
        "pass: ours_cached is so many times as fast as minimind: 20.00 (at least 15)",
        "pass: first epoch is so many times as fast as minimind: 16.00 (at least 12)",
        "pass: ours_cached's peak memory over trl's: 0.33 (at most 0.5)",
    ):
        assert line in printed
    assert "peak memory over trl_mb1" not in printed and "share of" not in printed


def test_what_is_planted_is_what_data_check_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(checking.DEMO_TOKENIZER)
    path, held, ledger = (tmp_path / name for name in ("rows.jsonl", "held.jsonl", "ledger.jsonl"))
    path.write_text("".join(f"{line}\n" for line in checking.lines(100, tokenizer, 1.0)), "utf-8")
    planted = checking.plant(path, held, 3, tokenizer.bos_token)
    argv = ["--data", str(path), "--eval_data", str(held), "--tokenizer", str(checking.DEMO_TOKENIZER), "--json"]
    argv += ["--completion_mask", "all_assistant"]
    assert run_check([*argv, "--max_length", "2048", "--ledger", str(ledger)]) == 1
    assert checking.verdict(ledger, planted) == "30 planted, 0 missed, 0 false"
    planted["double_bos"] = {"elsewhere"}
    assert checking.verdict(ledger, planted) == "28 planted, 1 missed, 3 false"
