"""How much of what DPO learns a half-precision forward pass sees: margins step by step, a column a rounding.

    python benchmarks/half_precision.py [--model DIR] [--data PAIRS.jsonl] [--pairs 64] [--steps 300]
                                        [--learning_rate 1e-7 5e-7 1e-6 5e-6] [--only NAME ...] [--as_stored]

All pairs are one optimizer step, taken over and over: AdamW at a constant rate, no decay, gradients clipped at norm 1,
loss `sigmoid` with beta 0.5. Ours is the ordinary command; TRL 1.16 trains the same pairs by its DPOTrainer. Weights
are first rounded to bf16, as hub models are stored; `--as_stored` leaves them as they are (those of a GGUF file lie
between bf16's values). By default the embedded demo's model and pairs.

Printed are `rewards/margins` at some steps, for each learning rate, and at the end how far each column lies from fp32:
the sum of its margins over that of fp32's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from minimind_dpo import load_model
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.demo.run import ASSETS

OURS = {
    "fp32": ("no", "auto"),
    "bf16 dithered": ("bf16", "dithered"),
    "bf16 stochastic": ("bf16", "stochastic"),
    "bf16 nearest": ("bf16", "nearest"),
    "fp16 nearest": ("fp16", "nearest"),
}
TRL = {"trl fp32": False, "trl bf16": True}
BETA = 0.5


def prepare(directory: Path, args: argparse.Namespace) -> None:
    """Write the model that all start from, its tokenizer and the pairs."""
    model = load_model(args.model)
    if not args.as_stored:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    model.save_pretrained(directory / "model")
    load_tokenizer(args.tokenizer).save_pretrained(directory / "model")
    lines = Path(args.data).read_text("utf-8").splitlines()[: args.pairs]
    (directory / "pairs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def ours(directory: Path, name: str, rate: float, args: argparse.Namespace) -> list[float]:
    """Margins of each step of the ordinary command."""
    precision, rounding = OURS[name]
    output = directory / f"{name} {rate}".replace(" ", "_")
    settings = {
        "model_name_or_path": directory / "model",
        "train_data": directory / "pairs.jsonl",
        "output_dir": output,
        "weight_rounding": rounding,
        "loss_type": "sigmoid",
        "beta": BETA,
        "completion_mask": "final_turn",
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0,
        "per_device_train_batch_size": args.pairs,
        "num_train_epochs": args.steps,
        "max_steps": args.steps,
        "shuffle": "false",
        "logging_steps": 1,
        "save_steps": 0,
        "reference": "cache",
    }
    words = [sys.executable, "-m", "minimind_dpo.train"]
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": precision, "MINIMIND_DPO_CACHE": str(directory / "cache")}
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["rewards/margins"] for line in lines if "rewards/margins" in line]


def trl(directory: Path, name: str, rate: float, args: argparse.Namespace) -> list[float]:
    """Margins of each step of TRL's trainer, in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), "--trl", str(directory), str(rate), str(int(TRL[name]))]
    words += ["--pairs", str(args.pairs), "--steps", str(args.steps)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def train_trl(directory: Path, rate: float, bf16: bool, pairs: int, steps: int) -> list[float]:
    """Train with TRL; the margins that it logs, step by step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in (directory / "pairs.jsonl").read_text("utf-8").splitlines()]
    config: dict[str, Any] = {
        "output_dir": str(directory / "trl"),
        "bf16": bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "beta": BETA,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": pairs,
        "max_steps": steps,
        "max_length": 1024,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
    }
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32),
        args=DPOConfig(**config),
        train_dataset=Dataset.from_list([{side: row[side] for side in ("chosen", "rejected")} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )
    trainer.train()
    return [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]


def table(rate: float, margins: dict[str, list[float]], steps: int) -> str:
    """Markdown: a row a column's margins at steps that grow, and its sum over fp32's."""
    at = sorted({step for step in (1, 2, 3, 5, 8, 12, 21, 30, 41, 101, 200, 300) if step <= steps} | {steps})
    whole = sum(margins["fp32"]) if "fp32" in margins else None
    lines = [
        f"learning rate {rate:g}",
        "| | " + " | ".join(f"step {step}" for step in at) + " | of fp32 |",
        "|---" * (len(at) + 2) + "|",
    ]
    for name, values in margins.items():
        share = "" if not whole else f"{sum(values) / whole:.2f}"
        lines.append(f"| {name} | " + " | ".join(f"{values[step - 1]:.4f}" for step in at) + f" | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Run all columns and print a table a learning rate, each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(next(ASSETS.glob("*.pth"))))
    parser.add_argument("--tokenizer", default=None, help="default: beside the model; of the demo its own")
    parser.add_argument("--data", default=str(ASSETS / "train.jsonl"))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[1e-7, 5e-7, 1e-6, 5e-6])
    parser.add_argument("--only", nargs="+", choices=[*OURS, *TRL], default=[*OURS, *TRL])
    parser.add_argument("--as_stored", action="store_true")
    parser.add_argument("--trl", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        directory, rate, bf16 = args.trl
        print(json.dumps(train_trl(Path(directory), float(rate), bf16 == "1", args.pairs, args.steps)))
        return
    is_demo = Path(args.model).parent == ASSETS
    args.tokenizer = args.tokenizer or (str(ASSETS / "tokenizer") if is_demo else args.model)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory, args)
        for rate in args.learning_rate:
            margins = {column: (ours if column in OURS else trl)(directory, column, rate, args) for column in args.only}
            print(table(rate, margins, args.steps), flush=True)


if __name__ == "__main__":
    main()
