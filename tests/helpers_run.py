"""Runs of the real command on a tiny model: inputs, in-process and subprocess calls, readers of what they leave."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers_data import tiny_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from minimind_dpo.config import TrainConfig, load_config
from minimind_dpo.ending import StopRequest
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.train import run
from minimind_dpo.training.run import Run
from minimind_dpo.training.setup import build_run

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = "red blue green seven nine river stone cloud quiet happy open window garden paper letter music".split()


@dataclass(frozen=True)
class Inputs:
    """Paths of a tiny model (with its tokenizer), 21 training pairs and 5 held-out pairs."""

    model: Path
    train_data: Path
    eval_data: Path

    def flags(self, output_dir: Path, **options: Any) -> list[str]:
        """Flags of a short run that visibly moves the weights; `options` override them."""
        values: dict[str, Any] = {
            "model_name_or_path": self.model,
            "train_data": self.train_data,
            "output_dir": output_dir,
            "learning_rate": 1e-2,
            "loss_type": "sigmoid",
            "beta": 0.5,
            "lr_scheduler_type": "minimind",
            "completion_mask": "all_assistant",
            "logging_steps": 1,
            "save_steps": 0,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        } | options
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def make_inputs(directory: Path) -> Inputs:
    """Write the inputs; the same bytes at every call."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    inputs = Inputs(directory / "model", directory / "train.jsonl", directory / "eval.jsonl")
    model.save_pretrained(inputs.model)
    tokenizer.save_pretrained(inputs.model)
    rng = random.Random(0)
    for path, count in ((inputs.train_data, 21), (inputs.eval_data, 5)):
        path.write_text("".join(json.dumps(_pair(rng)) + "\n" for _ in range(count)))
    return inputs


def _pair(rng: random.Random) -> dict[str, Any]:
    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    shared = []
    for _ in range(rng.randint(0, 1)):
        shared += [{"role": "user", "content": words(2, 6)}, {"role": "assistant", "content": words(2, 6)}]
    shared.append({"role": "user", "content": words(2, 8)})
    return {
        side: [*shared, {"role": "assistant", "content": f"{side} {words(3, 20)}"}] for side in ("chosen", "rejected")
    }


def train_here(flags: list[str]) -> int:
    """`minimind-dpo train` in this process."""
    return run(load_config(flags))


def command(flags: list[str], accelerate: str | None = None) -> list[str]:
    """The real command line: plain, or through `accelerate launch` with one of the project's configurations.

    Flags for the launcher may follow a configuration's name.
    """
    if accelerate is None:
        return [sys.executable, "-m", "minimind_dpo.train", *flags]
    name, *launcher_flags = accelerate.split()
    config = REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        *launcher_flags,
        "--main_process_port",
        "0",
        "-m",
        "minimind_dpo.train",
        *flags,
    ]


def environment(**extra: str) -> dict[str, str]:
    """One thread a process: runs are compared bit by bit, and the machine is small."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | extra


def run_command(flags: list[str], accelerate: str | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end."""
    return subprocess.run(
        command(flags, accelerate),
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=REPOSITORY,
    )


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The final policy."""
    return load_file(output_dir / "model" / "model.safetensors")


def same_bits(first: Path, second: Path) -> bool:
    """Whether two runs ended with bit-identical weights."""
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def relative_distance(first: Path, second: Path) -> float:
    """Norm of the difference of two runs' weights over the norm of the weights."""
    ours, theirs = weights(first), weights(second)
    squared = [
        sum(float(t.double().pow(2).sum()) for t in tensors)
        for tensors in ([ours[n] - theirs[n] for n in ours], theirs.values())
    ]
    return (squared[0] / squared[1]) ** 0.5


def lines(output_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def train_lines(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that log a training step."""
    return [line for line in lines(output_dir) if "loss" in line]


def built(config: TrainConfig) -> Run:
    """A run before its first step."""
    return build_run(config, start_engine(config), None, StopRequest())


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes behind the frozen weights of a model, a tied one once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if "lora_" not in name
    }
    return sum(storages.values())
