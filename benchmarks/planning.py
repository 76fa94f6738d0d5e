"""`minimind-dpo plan` held against real runs: one row a configuration, two optimizer steps each, on the CPU in fp32.

    python benchmarks/planning.py [--model NAME ...] [--stage 0 2 3] [--reference live offload cache adapter]
                                  [--batch 2x256 ...] [--num_processes 2] [--offload none]
                                  [--gradient_checkpointing] [--bf16]

Models are random weights of the shapes in `SHAPES`. Prints a Markdown table: predicted and measured peak of a rank in
MiB and their ratio. A row of the largest model takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # the project's root instead of this directory, whose profile.py would hide the library's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from transformers import LlamaConfig

from minimind_dpo.planning.configurations import read_zero
from minimind_dpo.planning.measure import measure, process_bytes
from minimind_dpo.planning.peak import predict
from minimind_dpo.planning.run_shape import RunShape
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


def row(source: Path, run: RunShape) -> str:
    """Predict, run, and compare."""
    lora_r = LORA_R if run.reference == "adapter" else None
    predicted = predict(read_shape(str(source), lora_r=lora_r), run, process_bytes())[0]
    measured = measure(str(source), run, None, lora_r)
    return (
        f"| {source.name} | {run.stage} | {run.world} | {run.reference} | {run.pairs} x {run.length} "
        f"| {predicted.total / MIB:.0f} | {measured / MIB:.0f} | {predicted.total / measured:.2f} |"
    )


def runs(args: argparse.Namespace) -> Iterator[RunShape]:
    """Every combination of the flags."""
    for batch, stage, reference in itertools.product(args.batch, args.stage, args.reference):
        pairs, length = map(int, batch.split("x"))
        yield RunShape(
            world=args.num_processes,
            per_node=args.num_processes,
            zero=read_zero(stage, args.offload, cpu=True),
            reference=reference,
            pairs=pairs,
            length=length,
            checkpointing=args.gradient_checkpointing,
            bf16=args.bf16,
            cpu=True,
        )


def main() -> None:
    """A row for every model and run."""
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
            for run in runs(args):
                print(row(source, run), flush=True)


if __name__ == "__main__":
    main()
