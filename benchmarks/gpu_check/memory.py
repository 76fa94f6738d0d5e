"""The peak of two real steps beside what `minimind-dpo plan` predicts."""

from __future__ import annotations

from transformers import LlamaConfig

from benchmarks.gpu_check.notes import Notes, Place
from benchmarks.gpu_check.shapes import SHAPES, TINY
from minimind_dpo.planning.measure import measure, process_bytes
from minimind_dpo.planning.peak import predict
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.shape import read_shape

GIB = 2**30
WITHIN = 1.25  # times
RUNS = {"26m": (8, 512), "135m": (4, 512), "0.6b": (2, 512)}  # pairs of so many tokens a side


def run(notes: Notes, place: Place) -> None:
    """One process, the precision and the reference of a plain run."""
    on_cpu = place.device == "cpu"
    for name, (pairs, length) in ({"tiny": (2, 64)} if place.rehearses else RUNS).items():
        source = place.scratch / name
        shape: LlamaConfig = TINY if place.rehearses else SHAPES[name]
        shape.architectures = ["LlamaForCausalLM"]
        shape.save_pretrained(source)
        planned = RunShape(bf16=not on_cpu, reference="live", pairs=pairs, length=length, cpu=on_cpu)
        process = process_bytes() if on_cpu else 0.0
        predicted = predict(read_shape(str(source)), planned, process)[0].total / GIB
        measured = measure(str(source), planned, None, None) / GIB
        notes.check(
            f"{name}, {pairs} pairs of {length} tokens a side",
            1 / WITHIN <= predicted / measured <= WITHIN,
            f"predicted {predicted:.3f} GiB, measured {measured:.3f}, ratio {predicted / measured:.2f}",
        )
