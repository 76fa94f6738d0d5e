"""Replies while a run goes on: the policy's own, and no bit of the run is another for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_forks import Bomb, Forks, train_on
from helpers_run import Inputs, built, lines, same_bits, train_here

from minimind_dpo.config import load_config
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.errors import UserError
from minimind_dpo.models.generation import Manner, answer, equal_lengths, repetition
from minimind_dpo.models.loading import load_model
from minimind_dpo.training.replies import live_replies

TIMES = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def flags(inputs: Inputs, directory: Path, **options: Any) -> list[str]:
    given = {"eval_data": inputs.eval_data, "eval_steps": 1, "max_steps": 3, "max_new_tokens": 6}
    return inputs.flags(directory, **given | options)


def samples(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text("utf-8").splitlines()]


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock said, and without replies."""
    return [
        {name: value for name, value in line.items() if name not in TIMES and "replies" not in name}
        for line in lines(directory)
    ]


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (None, {"dropout": 0.1, "temperature": 1.0}),
        ("multi_cpu", {"temperature": 1.0}),
        ("ds_zero3_cpu", {"temperature": 1.0}),
        (None, {"lora_r": 4, "gradient_checkpointing": "true"}),
    ],
    ids=["dropout", "two ranks", "divided", "adapters"],
)
def test_no_bit_of_the_run_changes(
    inputs: Inputs, tmp_path: Path, forks: Forks, engine: str | None, options: dict[str, Any]
) -> None:
    silent, talking = tmp_path / "silent", tmp_path / "talking"
    train_on(engine, flags(inputs, silent, **options), forks, tmp_path)
    train_on(engine, flags(inputs, talking, generate_prompts=4, **options), forks, tmp_path)
    assert same_bits(silent, talking)
    assert numbers(silent) == numbers(talking)
    assert not (silent / "samples.jsonl").exists()
    said = samples(talking)
    steps = sorted({line["step"] for line in lines(talking) if "eval_loss" in line})
    assert [line["step"] for line in said] == [step for step in steps for _ in range(4)]
    logged = {line["step"]: line for line in lines(talking) if "eval_loss" in line}
    for step in steps:
        own = [line["tokens"] for line in said if line["step"] == step]
        assert logged[step]["eval_replies/tokens"] == sum(own) / 4


def test_they_are_the_policys_own_greedy_replies(inputs: Inputs, tmp_path: Path) -> None:
    """At the start those of the model, at the end those of model/: by transformers' own generation."""
    assert train_here(flags(inputs, tmp_path, generate_prompts=5, learning_rate=3e-2)) == 0
    said = samples(tmp_path)
    prompts = [json.loads(line)["chosen"][:-1] for line in inputs.eval_data.read_text("utf-8").splitlines()]
    tokenizer = load_tokenizer(inputs.model)
    for step, path in ((0, inputs.model), (3, tmp_path / "model")):
        model = load_model(path)
        for messages, line in zip(prompts, (line for line in said if line["step"] == step), strict=True):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert (line["prompt"], line["reply"]) == (messages[-1]["content"], expected)
    first, last = ([line["reply"] for line in said if line["step"] == step] for step in (0, 3))
    assert first != last


def test_any_number_of_ranks_draws_the_same(inputs: Inputs, tmp_path: Path, forks: Forks) -> None:
    drawn = []
    for engine in (None, "multi_cpu", "ds_zero3_cpu"):
        directory = tmp_path / str(engine)
        options = {"generate_prompts": 5, "temperature": 1.0, "max_steps": 1}
        train_on(engine, flags(inputs, directory, **options), forks, tmp_path)
        drawn.append([line for line in samples(directory) if line["step"] == 0])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({line["reply"] for line in drawn[0]}) > 1


def test_a_resumed_run_has_each_reply_once(inputs: Inputs, tmp_path: Path, forks: Forks) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"generate_prompts": 2, "save_steps": 1, "temperature": 0.7}
    assert forks.run(flags(inputs, whole, **options), tmp_path) == [0]
    bomb = Bomb("training.loop", "take_best", nth=3)  # after step 2 was evaluated, before it is saved
    assert forks.run(flags(inputs, cut, **options), tmp_path, bomb=bomb) != [0]
    assert len(samples(cut)) == 6
    assert forks.run(flags(inputs, cut, **options), tmp_path) == [0]
    assert samples(cut) == samples(whole)


def test_the_process_is_left_as_it_was(inputs: Inputs, tmp_path: Path) -> None:
    run = built(load_config(flags(inputs, tmp_path, generate_prompts=3, temperature=1.0)))
    run.scorer.train()
    torch.manual_seed(5)
    before, own = torch.get_rng_state(), run.policy.generation_config
    first = live_replies(run)
    assert torch.equal(before, torch.get_rng_state())
    assert run.policy.generation_config is own and run.policy.training
    torch.manual_seed(6)
    assert live_replies(run) == first


def test_sampling_follows_the_distribution(inputs: Inputs) -> None:
    """The first token drawn 4,000 times, against the model's own probabilities; at a low temperature the likeliest."""
    model, ids = load_model(inputs.model), torch.tensor([[5, 6, 7]])
    probabilities = model(ids).logits[0, -1].double().softmax(-1).detach()
    manner = Manner([], max_new_tokens=1, temperature=1.0, seed=1)
    drawn = torch.tensor(answer(model, ids.expand(4000, 3), manner)).flatten()
    found = torch.bincount(drawn, minlength=len(probabilities)) / 4000
    expected = (found - probabilities).abs().sum()
    assert expected < 3 * (2 / torch.pi * probabilities * (1 - probabilities) / 4000).sqrt().sum()
    assert answer(model, ids, manner._replace(temperature=1e-4)) == [[int(probabilities.argmax())]]


def test_files_of_prompts(inputs: Inputs, tmp_path: Path) -> None:
    texts = tmp_path / "prompts.txt"
    texts.write_text("red river\n\nblue stone\n")
    rows = tmp_path / "prompts.jsonl"
    system = {"role": "system", "content": "quiet"}
    asked = [
        {"prompt": "red river"},
        {"messages": [system, {"role": "user", "content": "blue stone"}]},
        {"prompt": "green", "chosen": "seven", "rejected": "nine"},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    for file, expected in ((texts, ["red river", "blue stone"]), (rows, ["red river", "blue stone", "green"])):
        run = built(load_config(flags(inputs, tmp_path / "run", generate_prompts=file)))
        assert [prompt.text for prompt in run.prompts] == expected
        assert run.tokenizer.decode(run.prompts[0].ids).endswith("assistant\n")
    rows.write_text('{"question": "red"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:1: no prompt: a row has prompt or messages"):
        built(load_config(flags(inputs, tmp_path / "run", generate_prompts=rows)))
    with pytest.raises(UserError, match="generate_prompts: 0 prompts are none"):
        load_config(flags(inputs, tmp_path / "run", generate_prompts=0))


def test_measures() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 8) == pytest.approx(4 / 5)  # five 4-grams, one of them new
    assert equal_lengths([[1, 2], [3], [4, 5], [6]]) == [[1, 3], [0, 2]]
