"""`minimind-dpo plan`: the memory a run will need on each rank, and what fits, before anything is launched."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any, NoReturn

from minimind_dpo.config import FROZEN_DTYPES, OPTIMIZERS, QUANTIZATIONS, REFERENCES, TrainConfig
from minimind_dpo.config.losses import reference_problems
from minimind_dpo.config.weights import weight_problems
from minimind_dpo.errors import EXIT_DONE, UserError
from minimind_dpo.losses import LOSSES
from minimind_dpo.planning.configurations import CONFIGURATIONS, read_zero
from minimind_dpo.planning.run_shape import RunShape
from minimind_dpo.planning.text import render

# settings of train that change what weights and optimizer hold; the defaults come first
WEIGHTS = {"dtype": FROZEN_DTYPES, "ref_dtype": FROZEN_DTYPES, "quantization": QUANTIZATIONS, "optim": OPTIMIZERS}


class _Parser(argparse.ArgumentParser):
    """Wrong usage is a UserError like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"plan: {message}; see minimind-dpo plan --help")


def run_plan(argv: list[str]) -> int:
    """`minimind-dpo plan`.

    Raises:
        UserError: a flag is missing, unknown or contradicts another.
        TrainingError: the measured run failed.
    """
    args = _parser().parse_args(argv)
    if problems := [*_out_of_range(args), *_contradictions(args)]:
        raise UserError("plan: " + "\n  ".join(problems))
    # slow, it imports torch and transformers: --help and wrong usage answer without it
    from minimind_dpo.planning.comparison import compare, hold_against_run

    runs = _runs(args)
    model = {"num_attention_heads": args.num_attention_heads, "lora_r": args.lora_r}
    report = compare(
        args.model_name_or_path, runs, **model, device_gib=args.device_memory_gib, host_gib=args.host_memory_gib
    )
    if args.measure:
        report["measured"] = hold_against_run(report, runs[0], **model)
    print(json.dumps(report, indent=1) if args.json else render(report))
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minimind-dpo plan",
        allow_abbrev=False,
        description=(
            "Predict the memory a rank of a training run needs; without --zero_stage of each named configuration."
        ),
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="directory or its config.json, hub id, MiniMind .pth or .gguf")
    add("--num_attention_heads", type=int, help="query heads of MiniMind raw weights (default 8)")
    add("--num_processes", type=int, default=1, help="ranks (default: 1)")
    add("--processes_per_node", type=int, help="ranks that share a machine's memory (default: all, at most 8)")
    add("--zero_stage", type=int, choices=range(4), help="0: one process or DDP (default: compare all configurations)")
    add(
        "--offload",
        choices=("none", "optimizer", "all"),
        default="none",
        help="what lies in host memory; all: parameters too, stage 3 (default: none)",
    )
    add("--mixed_precision", choices=("no", "bf16"), help="default: bf16 on cuda, no on cpu")
    add("--reference", choices=REFERENCES, default="auto", help="as in train (default: auto)")
    add(
        "--loss_type",
        nargs="+",
        choices=LOSSES,
        default=["sigmoid"],
        metavar="NAME",
        help="as in train (default: sigmoid)",
    )
    add("--sync_ref_model", choices=("true", "false"), default="false", help="as in train (default: false)")
    add("--lora_r", type=int, help="rank of LoRA matrices; without it every weight is trained")
    for name, choices in WEIGHTS.items():
        add(f"--{name}", choices=choices, default=choices[0], help=f"as in train (default: {choices[0]})")
    add("--per_device_train_batch_size", type=int, default=4, help="pairs a micro-batch on each rank (default: 4)")
    add("--max_length", type=int, default=1024, help="tokens a side; each pair is planned this long (default: 1024)")
    shared = "share of max_length that both sides have in common (default: 0, the most a batch can need)"
    add("--prompt_share", type=float, default=0.0, help=shared)
    recomputed = "recompute activations in the backward pass (default: false)"
    add("--gradient_checkpointing", choices=("true", "false"), default="false", help=recomputed)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where ranks compute (default: cuda)")
    add("--device_memory_gib", type=float, help="memory of a GPU (default: that of this machine's first GPU)")
    add("--host_memory_gib", type=float, help="memory of a machine (default: this one's, without device_memory_gib)")
    add("--json", action="store_true", help="print one JSON object")
    add("--measure", action="store_true", help="run two optimizer steps and hold the prediction against their peak")
    return parser


def _out_of_range(args: argparse.Namespace) -> Iterator[str]:
    """A message for each flag whose value has no meaning."""
    least = {
        "num_processes": 1,
        "processes_per_node": 1,
        "lora_r": 1,
        "per_device_train_batch_size": 1,
        "num_attention_heads": 1,
        "max_length": 16 if args.measure else 2,
    }
    for name, bound in least.items():
        if (value := getattr(args, name)) is not None and value < bound:
            yield f"{name}: must be at least {bound}, is {value}"
    for name in ("device_memory_gib", "host_memory_gib"):
        if (value := getattr(args, name)) is not None and not value > 0:
            yield f"{name}: must be positive, is {value}"
    if not 0 <= args.prompt_share < 1:
        yield f"prompt_share: must be in [0, 1), is {args.prompt_share}"


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    """A message for each flag that another one excludes."""
    stage = args.zero_stage or 0
    if _per_node(args) > max(1, args.num_processes):
        yield f"processes_per_node: {args.processes_per_node} is more than num_processes, {args.num_processes}"
    if args.reference == "adapter" and args.lora_r is None:
        yield "reference: adapter is the policy without its LoRA matrices; set lora_r too"
    told = _told(args)
    follows = {"sync_ref_model": args.sync_ref_model == "true", "loss_type": args.loss_type}
    config = TrainConfig(lora_r=args.lora_r, reference=args.reference, **follows, **told)
    yield from weight_problems(config)
    yield from reference_problems(config)
    if stage:
        yield from (f"{name}: {value} is for one process or DDP; zero_stage is {stage}" for name, value in told.items())
    if args.offload != "none" and args.zero_stage is None:
        yield "offload: set zero_stage too, or leave both out to compare all configurations"
    elif args.offload == "all" and stage != 3:
        yield f"offload: all needs zero_stage 3, which divides the parameters; zero_stage is {stage}"
    elif args.offload == "optimizer" and stage < 2:
        yield f"offload: optimizer needs zero_stage 2 or 3; zero_stage is {stage}"
    if args.measure and args.zero_stage is None:
        yield "measure: set zero_stage: one configuration is measured at a time"
    if args.measure and args.device == "cuda":
        import torch  # slow, and only asked for its number of GPUs

        if torch.cuda.device_count() < args.num_processes:
            yield (
                f"measure: {args.num_processes} process(es) need as many GPUs, this machine has "
                f"{torch.cuda.device_count()}; use --device cpu"
            )


def _runs(args: argparse.Namespace) -> list[RunShape]:
    """The run that the flags describe; without a stage of ZeRO one for each named configuration."""
    asked = CONFIGURATIONS if args.zero_stage is None else [(args.zero_stage, args.offload)]
    if _told(args):
        asked = [(stage, offload) for stage, offload in asked if stage == 0]  # for one process or DDP
    return [_run(args, stage, offload) for stage, offload in asked]


def _run(args: argparse.Namespace, stage: int, offload: str) -> RunShape:
    cpu = args.device == "cpu"
    return RunShape(
        world=args.num_processes,
        per_node=_per_node(args),
        zero=read_zero(stage, offload, cpu),
        bf16=(args.mixed_precision or ("no" if cpu else "bf16")) == "bf16",
        reference=_reference(args, stage),
        loss_type=tuple(args.loss_type),
        follows=args.sync_ref_model == "true",
        pairs=args.per_device_train_batch_size,
        length=args.max_length,
        prompt_share=args.prompt_share,
        checkpointing=args.gradient_checkpointing == "true",
        cpu=cpu,
        **_told(args),
    )


def _told(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of weights and optimizer that are not the default."""
    return {name: getattr(args, name) for name, choices in WEIGHTS.items() if getattr(args, name) != choices[0]}


def _per_node(args: argparse.Namespace) -> int:
    return args.processes_per_node or max(1, min(args.num_processes, 8))


def _reference(args: argparse.Namespace, stage: int) -> str:
    """Where the reference is; of what `auto` may choose without ZeRO the larger, a second model for a single epoch."""
    if not any(LOSSES[name].needs_reference for name in args.loss_type):
        return "none"
    if args.reference != "auto":
        return str(args.reference)
    if args.sync_ref_model == "true":
        return "live"
    return "adapter" if args.lora_r else "cache" if stage else "live"
