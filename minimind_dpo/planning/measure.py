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
from minimind_dpo.models.loading import locate_model
from minimind_dpo.planning.memory import BUCKET, PERSISTENT, Setup
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
        write_inputs(directory, Setup(pairs=1, length=16))
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
        code = (
            "import sys, deepspeed; from minimind_dpo.errors import exit_code\n"
            "from minimind_dpo.train import main\nsys.exit(exit_code(lambda: main(sys.argv[1:])))"
        )
        return _run(
            [sys.executable, "-c", code],
            directory,
            str(directory / "model"),
            Setup(pairs=1, length=16),
            [],
            CUDA_VISIBLE_DEVICES="",
        )


def measure(source: str, setup: Setup, num_attention_heads: int | None, lora_r: int | None) -> float:
    """The peak of two real optimizer steps, bytes: of the rank that needs most, on its device.

    Pairs of the planned length, a tokenizer for them and, where `source` is only a configuration, random weights are
    made in a temporary directory; the run is the real command under `accelerate launch`.

    Raises:
        TrainingError: the run failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="minimind-dpo-plan-") as name:
        directory = Path(name)
        write_inputs(directory, setup)
        write_launch_files(directory, setup)
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
        return _run(launch, directory, source, setup, flags)


def _lacks_weights(source: str) -> bool:
    location = locate_model(source)
    return (
        location is not None
        and location.is_dir()
        and not any(found for pattern in _WEIGHTS for found in location.glob(pattern))
    )


def _run(command: list[str], directory: Path, source: str, setup: Setup, flags: list[str], **environment: str) -> float:
    """Train two steps on what lies in `directory`; the summary's peak in bytes."""
    settings: dict[str, Any] = {
        "model_name_or_path": source,
        "tokenizer_name_or_path": directory / "tokenizer",
        "train_data": directory / "pairs.jsonl",
        "output_dir": directory / "run",
        "max_steps": STEPS,
        "save_steps": 0,
        "resume": "never",
        "max_length": setup.length,
        "per_device_train_batch_size": setup.pairs,
        "reference": setup.reference,
        "gradient_checkpointing": str(setup.checkpointing).lower(),
        "learning_rate": 1e-6,
    }
    flags = [*flags, *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
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


def write_inputs(directory: Path, setup: Setup) -> None:
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
    question = " ".join(["a"] * max(1, setup.prefix - 8))  # the template adds 8 tokens before the answer
    row = {
        side: [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join([word] * setup.length)}]
        for side, word in (("chosen", "b"), ("rejected", "c"))
    }
    line = json.dumps(row, ensure_ascii=False) + "\n"
    (directory / "pairs.jsonl").write_text(line * (STEPS * setup.pairs * setup.world), "utf-8")


def write_launch_files(directory: Path, setup: Setup) -> None:
    """accelerate's and DeepSpeed's files of the setup, as configs/ has them."""
    precision = "bf16" if setup.bf16 else "no"
    launch: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": setup.world,
    }
    if setup.cpu:
        launch["use_cpu"] = True
    if setup.stage:
        launch |= {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "deepspeed_config_file": str(directory / "deepspeed.json"),
                "zero3_init_flag": setup.stage == 3,
            },
        }
        (directory / "deepspeed.json").write_text(json.dumps(deepspeed_settings(setup)), "utf-8")
    else:
        launch |= {"distributed_type": "MULTI_GPU" if setup.world > 1 else "NO", "mixed_precision": precision}
    (directory / "accelerate.yaml").write_text(yaml.safe_dump(launch), "utf-8")


def deepspeed_settings(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's JSON of a setup, equal to the file of that name in configs/deepspeed."""
    zero: dict[str, Any] = {"stage": setup.stage}
    if setup.stage > 1 and not setup.cpu:
        zero["overlap_comm"] = True
    zero["reduce_bucket_size"] = BUCKET
    if setup.stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0 if setup.cpu else PERSISTENT,
        }
    else:
        zero["allgather_bucket_size"] = BUCKET
    where = {"device": "cpu", "pin_memory": not setup.cpu}
    if setup.offload != "none":
        zero["offload_optimizer"] = dict(where)
    if setup.offload == "all":
        zero["offload_param"] = dict(where)
    settings: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": setup.bf16}}
    if setup.offload != "none":
        settings["zero_force_ds_cpu_optimizer"] = False
    return settings
