"""Real runs of two optimizer steps, to hold a prediction against, and of a tiny model, for a process's own memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minimind_dpo.errors import TrainingError
from minimind_dpo.models.places import locate_model
from minimind_dpo.planning.configurations import configuration_name, read_accelerate, read_deepspeed
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import read_config

STEPS = 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", "\n", "a", "b", "c"]
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


@cache
def process_bytes() -> float:
    """Resident bytes of a process that has the whole stack at work on a model of no size."""
    with tempfile.TemporaryDirectory(prefix="minimind-dpo-plan-") as name:
        directory = Path(name)
        write_inputs(directory, RunShape(pairs=1, length=16))
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        )
        model.save_pretrained(directory / "model")
        code = "import sys, deepspeed\nfrom minimind_dpo.train import main\nsys.exit(main(sys.argv[1:]))"
        return _run(
            [sys.executable, "-c", code],
            directory,
            str(directory / "model"),
            RunShape(pairs=1, length=16),
            [],
            CUDA_VISIBLE_DEVICES="",
        )


def measure(source: str, run: RunShape, num_attention_heads: int | None, lora_r: int | None) -> float:
    """The peak of two real optimizer steps, bytes: of the rank that needs most, on its device.

    Pairs of the planned length, a tokenizer for them and, where `source` is only a configuration, random weights are
    made in a temporary directory; the run is the real command under `accelerate launch`.

    Raises:
        TrainingError: the run failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="minimind-dpo-plan-") as name:
        directory = Path(name)
        write_inputs(directory, run)
        write_launch_files(directory, run)
        if _lacks_weights(source):
            config, _ = read_config(source)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory / "model")
            source = str(directory / "model")
        flags = [] if num_attention_heads is None else ["--num_attention_heads", str(num_attention_heads)]
        flags += [] if lora_r is None else ["--lora_r", str(lora_r)]
        launch = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(directory / "accelerate.yaml"),
            "--main_process_port",
            "0",
            "-m",
            "minimind_dpo.train",
        ]
        return _run(launch, directory, source, run, flags)


def _lacks_weights(source: str) -> bool:
    location = locate_model(source)
    return (
        location is not None
        and location.is_dir()
        and not any(found for pattern in _WEIGHTS for found in location.glob(pattern))
    )


def _run(
    command: list[str], directory: Path, source: str, run: RunShape, flags: list[str], **environment: str
) -> float:
    """Train two steps on what lies in `directory`; the summary's peak in bytes."""
    settings: dict[str, Any] = {
        "model_name_or_path": source,
        "tokenizer_name_or_path": directory / "tokenizer",
        "train_data": directory / "pairs.jsonl",
        "output_dir": directory / "run",
        "max_steps": STEPS,
        "save_steps": 0,
        "resume": "never",
        "max_length": run.length,
        "per_device_train_batch_size": run.pairs,
        "reference": "auto" if run.reference == "none" else run.reference,
        "gradient_checkpointing": str(run.checkpointing).lower(),
        "learning_rate": 1e-6,
        "dtype": run.dtype,
        "ref_dtype": run.ref_dtype,
        "quantization": run.quantization,
        "optim": run.optim,
    }
    flags = [*flags, *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
    flags += ["--loss_type", *run.loss_type]
    if run.follows:
        flags += ["--sync_ref_model", "true", "--ref_model_sync_steps", "1"]
    kept = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(os.environ)
    result = subprocess.run(
        [*command, *flags],
        capture_output=True,
        text=True,
        env=kept | environment | {"MINIMIND_DPO_CACHE": str(directory / "cache")},
    )
    if result.returncode:
        raise TrainingError(f"the measured run failed:\n{result.stderr[-2000:]}")
    return json.loads((directory / "run" / "summary.json").read_text("utf-8"))["peak_memory_gib"] * 2**30


def write_inputs(directory: Path, run: RunShape) -> None:
    """A tokenizer of nine words and pairs whose two sides have `length` tokens, `prompt_share` of them in common."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_SPECIAL)}, unk_token=_SPECIAL[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[0],
        additional_special_tokens=_SPECIAL[1:3],
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(directory / "tokenizer")
    question = " ".join(["a"] * max(1, run.prefix - 8))  # the template adds 8 tokens before the answer
    row = {
        side: [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join([word] * run.length)}]
        for side, word in (("chosen", "b"), ("rejected", "c"))
    }
    line = json.dumps(row, ensure_ascii=False) + "\n"
    (directory / "pairs.jsonl").write_text(line * (STEPS * run.pairs * run.world), "utf-8")


def write_launch_files(directory: Path, run: RunShape) -> None:
    """accelerate's and DeepSpeed's files of the nearest configuration, for the run's ranks and precision."""
    launch = read_accelerate(configuration_name(run.stage, run.zero.offload, run.cpu, run.world))
    launch["num_processes"] = run.world
    if run.stage:
        path = directory / "deepspeed.json"
        settings = read_deepspeed(run.stage, run.zero.offload, run.cpu) | {"bf16": {"enabled": run.bf16}}
        path.write_text(json.dumps(settings), "utf-8")
        launch["deepspeed_config"]["deepspeed_config_file"] = str(path)
    else:
        launch["mixed_precision"] = "bf16" if run.bf16 else "no"
    (directory / "accelerate.yaml").write_text(yaml.safe_dump(launch), "utf-8")
