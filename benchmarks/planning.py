"""`minimind-dpo plan` held against real runs: one row a configuration, two optimizer steps each, on the CPU in fp32.

    python benchmarks/planning.py [--model NAME ...] [--stage 0 2 3] [--reference live offload cache adapter]
                                  [--batch 2x256 ...] [--num_processes 2] [--offload none]
                                  [--gradient_checkpointing] [--bf16]

Models are random weights of the shapes in `SHAPES`. Prints a Markdown table: predicted and measured peak of a rank in
MiB and their ratio. A row of the largest model takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from transformers import LlamaConfig

from minimind_dpo.planning.measure import measure, process_bytes
from minimind_dpo.planning.memory import Setup
from minimind_dpo.planning.phases import predict
from minimind_dpo.planning.shape import read_shape

MIB = 2**20
LORA_R = 8
SHAPES = {
    "minimind-26m": {
        "vocab_size": 6400,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "minimind-104m": {
        "vocab_size": 6400,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def row(source: Path, setup: Setup) -> str:
    """Predict, run, and compare one setup."""
    lora_r = LORA_R if setup.reference == "adapter" else None
    predicted = predict(read_shape(str(source), lora_r=lora_r), setup, process_bytes())[0]
    measured = measure(str(source), setup, None, lora_r)
    return (
        f"| {source.name} | {setup.stage} | {setup.world} | {setup.reference} | {setup.pairs} x {setup.length} "
        f"| {predicted.total / MIB:.0f} | {measured / MIB:.0f} | {predicted.total / measured:.2f} |"
    )


def main() -> None:
    """Every combination of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--stage", nargs="+", type=int, default=[0, 2, 3])
    parser.add_argument("--reference", nargs="+", default=["live", "offload", "cache", "adapter"])
    parser.add_argument("--batch", nargs="+", default=["2x256", "4x512"], help="pairs x tokens a side")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--offload", choices=("none", "optimizer", "all"), default="none")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    print("| model | stage | ranks | reference | batch | predicted MiB | measured MiB | ratio |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        for model in args.model:
            source = Path(name) / model
            config = LlamaConfig(
                tie_word_embeddings=True,
                max_position_embeddings=8192,
                architectures=["LlamaForCausalLM"],
                **SHAPES[model],
            )
            config.save_pretrained(source)
            for batch in args.batch:
                pairs, length = map(int, batch.split("x"))
                for stage in args.stage:
                    for reference in args.reference:
                        print(
                            row(
                                source,
                                Setup(
                                    world=args.num_processes,
                                    per_node=args.num_processes,
                                    stage=stage,
                                    reference=reference,
                                    offload=args.offload,
                                    pairs=pairs,
                                    length=length,
                                    checkpointing=args.gradient_checkpointing,
                                    bf16=args.bf16,
                                    cpu=True,
                                ),
                            ),
                            flush=True,
                        )


if __name__ == "__main__":
    main()
