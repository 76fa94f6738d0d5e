"""The stages: each is a module of this package with a `run(notes, place)`."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """One stage.

    Attributes:
        name: of its module.
        seconds: it may take on a GPU.
        needs: packages without which it is skipped.
        asks: its question.
    """

    name: str
    seconds: float
    needs: tuple[str, ...]
    asks: str


SECONDS = 470  # that all stages may take together
STAGES = (
    Stage("machine", 40, (), "which versions; what products and copies reach on this GPU"),
    Stage("kernels", 60, (), "is packed attention that of fp64, forwards and backwards"),
    Stage("precisions", 110, (), "does the trained demo start at ln 2 and learn, in each precision and reference mode"),
    Stage("waits", 45, (), "does the host wait for the GPU anywhere in a step"),
    Stage("nccl", 40, (), "do collectives and DDP work over NCCL, on one rank"),
    Stage("engines", 120, ("deepspeed",), "does DeepSpeed train as one process does: ZeRO 1 to 3, offloads"),
    Stage("resume", 70, (), "does a killed run end with the bits of one left alone (deterministic: true)"),
    Stage("memory", 70, (), "is the peak what `minimind-dpo plan` says"),
    Stage("speed", 130, (), "how fast is a step, of what it could be; what packing, sharing and kernels give"),
    Stage("peers", 80, ("trl",), "how fast is TRL on the same pairs"),
)
