"""Memory of model states a rank, by ZeRO stage and number of ranks, measured beside what the ZeRO paper says.

    python benchmarks/zero_memory.py [--ranks 1 2 4] [--hidden_size 512]

Model states are weights, gradients and optimizer states. Each cell launches real ranks that train a step in bf16 on
the CPU, and counts the bytes of every tensor alive between backward and step, activations being gone by then. The
paper (Rajbhandari et al. 2020, arXiv:1910.02054, section 5) has 2 + 2 + 12 bytes a parameter, of which stage 1 divides
the 12 by the number of ranks, stage 2 also the gradients' 2 and stage 3 also the weights' 2. Without DeepSpeed, DDP
keeps 4 + 4 + 8 bytes (fp32 weights under autocast) and buckets of gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minimind_dpo.config import make_config
from minimind_dpo.data.batch import pad_pairs
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.optimizers import make_optimizer
from minimind_dpo.objective.scoring import PairScorer

ROOT = Path(__file__).resolve().parent.parent
BUCKET = 1_000_000  # elements; small, since the table is about states
ROW = {
    "chosen_input_ids": [1, 2, 3],
    "chosen_completion_mask": [0, 1, 1],
    "rejected_input_ids": [1, 2, 4],
    "rejected_completion_mask": [0, 1, 1],
}


def paper_bytes(stage: int, ranks: int) -> float:
    """Bytes a parameter that each rank holds."""
    return {0: 16.0, 1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage]


def live_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors alive in this process, shared storage counted once."""
    gc.collect()
    storages = {}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for item in [*gradients, *gc.get_objects()]:
        if issubclass(type(item), torch.Tensor) and not item.is_meta:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(hidden_size: int) -> None:
    """Train one step on this rank and print the bytes a parameter it holds."""
    config = make_config({"model_name_or_path": "none", "train_data": ["unused"], "output_dir": "none"})
    engine = start_engine(config)
    shape = LlamaConfig(
        vocab_size=6400,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM._from_config(shape)  # under stage 3 sharded from its first weight on
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    scorer = PairScorer(model.train())
    scorer, _ = engine.prepare(scorer, make_optimizer(scorer.parameters(), 1e-5, 0.01), "nearest")
    held = 0
    for _ in range(2):
        engine.backward(scorer(pad_pairs([ROW]).to(engine.device)).per_token_logps.sum(), last=True)
        held = live_bytes(scorer)
        engine.step(1.0)
    if engine.is_main:
        print(f"MEASURED {held / parameters:.2f} {parameters}", flush=True)
    engine.end()


def launch(stage: int, ranks: int, hidden_size: int, directory: Path) -> tuple[float, int]:
    """Measure one cell in processes of its own: bytes a parameter, and parameters."""
    settings = directory / f"zero{stage}.json"
    settings.write_text(
        json.dumps(
            {
                "bf16": {"enabled": True},
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": BUCKET,
                    "allgather_bucket_size": BUCKET,
                    "stage3_prefetch_bucket_size": BUCKET,
                    "stage3_param_persistence_threshold": 0,
                },
            }
        )
    )
    kind = "multi_cpu" if stage == 0 else f"ds_zero{stage}_cpu"
    accelerate = (
        (ROOT / "configs" / "accelerate" / f"{kind}.yaml")
        .read_text("utf-8")
        .replace(f"configs/deepspeed/zero{stage}_cpu.json", str(settings))
    )
    (directory / "accelerate.yaml").write_text(accelerate)
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(directory / "accelerate.yaml"),
        "--num_processes",
        str(ranks),
        "--main_process_port",
        "0",
        __file__,
        "--hidden_size",
        str(hidden_size),
    ]
    result = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"MEASURE_RANK": "1"})
    for line in result.stdout.splitlines():
        if "MEASURED" in line:
            held, parameters = line.partition("MEASURED")[2].split()
            return float(held), int(parameters)
    sys.exit(f"stage {stage} on {ranks} ranks failed:\n{result.stderr}")


def main() -> None:
    """Launch every cell in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden_size", type=int, default=512)
    options = parser.parse_args()
    if os.environ.get("MEASURE_RANK"):
        measure(options.hidden_size)
        return
    with tempfile.TemporaryDirectory() as directory:
        cells = {
            (stage, ranks): launch(stage, ranks, options.hidden_size, Path(directory))
            for stage in range(4)
            for ranks in options.ranks
        }
    parameters = next(iter(cells.values()))[1]
    print(f"bytes a parameter on each rank, measured (paper), {parameters:,} parameters")
    print("| stage | " + " | ".join(f"{ranks} rank(s)" for ranks in options.ranks) + " |")
    print("|---|" + "---|" * len(options.ranks))
    for stage in range(4):
        row = [f"{cells[stage, ranks][0]:.2f} ({paper_bytes(stage, ranks):.2f})" for ranks in options.ranks]
        print(f"| {stage or '0 (DDP)'} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
