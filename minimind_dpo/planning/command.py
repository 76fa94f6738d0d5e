"""`minimind-dpo plan`: the memory a run will need on each rank, and what fits, before anything is launched."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import Any, NoReturn

import torch
from transformers.utils.logging import disable_progress_bar

from minimind_dpo.config import REFERENCES
from minimind_dpo.errors import EXIT_DONE, UserError
from minimind_dpo.planning.measure import measure, process_bytes
from minimind_dpo.planning.memory import Setup
from minimind_dpo.planning.phases import PARTS, Memory, predict
from minimind_dpo.planning.shape import ModelShape, read_shape

GIB = 2**30
SPARE = 1.1  # a configuration fits with a tenth to spare
CUDA_RUNTIME = 0.5 * GIB  # CUDA's context with the kernels of torch and NCCL; not measured here
# name -> ZeRO stage and offload; the first that fits is recommended
CONFIGURATIONS = {
    "single": (0, "none"),
    "multi": (0, "none"),
    "ds_zero1": (1, "none"),
    "ds_zero2": (2, "none"),
    "ds_zero2_offload": (2, "optimizer"),
    "ds_zero3": (3, "none"),
    "ds_zero3_offload": (3, "all"),
}


class _Parser(argparse.ArgumentParser):
    """Wrong usage is a UserError like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"plan: {message}; see minimind-dpo plan --help")


def run_plan(argv: list[str]) -> int:
    """`minimind-dpo plan`.

    Raises:
        UserError: a flag is missing, unknown or contradicts another.
    """
    args = _parser().parse_args(argv)
    disable_progress_bar()  # transformers' own, of shards written
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns on stdout when it has to find out itself
    setup = _setup(args)
    shape = read_shape(args.model_name_or_path, args.num_attention_heads, args.lora_r)
    available = _available(args)
    if args.zero_stage is None:
        plans = [_plan(name, shape, candidate, available) for name, candidate in _candidates(setup, args)]
    else:
        plans = [_plan(_name(setup, args.device), shape, setup, available)]
    report: dict[str, Any] = {
        "model": args.model_name_or_path,
        "parameters": shape.total,
        "trained_parameters": sum(shape.trained),
        "setup": dataclasses.asdict(setup) | {"lora_r": args.lora_r, "device": args.device},
        "available_gib": available,
        "plans": plans,
        "recommended": next((plan["name"] for plan in plans if plan["fits"]), None),
    }
    if args.measure:
        measured = measure(args.model_name_or_path, setup, args.num_attention_heads, args.lora_r) / GIB
        predicted = plans[0]["device"]["total_gib"] - (0 if setup.cpu else CUDA_RUNTIME / GIB)
        report["measured"] = {"predicted_gib": predicted, "measured_gib": measured, "ratio": predicted / measured}
    print(json.dumps(report, indent=1) if args.json else _text(report))
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
    add("--model_name_or_path", required=True, help="directory (config.json is enough), hub id, MiniMind .pth or .gguf")
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
    add("--lora_r", type=int, help="rank of LoRA matrices; without it every weight is trained")
    add("--per_device_train_batch_size", type=int, default=4, help="pairs a micro-batch on each rank (default: 4)")
    add("--max_length", type=int, default=1024, help="tokens a side; each pair is planned this long (default: 1024)")
    add(
        "--prompt_share",
        type=float,
        default=0.0,
        help="share of max_length that both sides have in common (default: 0, the most a batch can need)",
    )
    add(
        "--gradient_checkpointing",
        choices=("true", "false"),
        default="false",
        help="recompute activations in the backward pass (default: false)",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where ranks compute (default: cuda)")
    add("--device_memory_gib", type=float, help="memory of a GPU (default: that of this machine's first GPU)")
    add("--host_memory_gib", type=float, help="memory of a machine (default: this machine's)")
    add("--json", action="store_true", help="print one JSON object")
    add("--measure", action="store_true", help="run two optimizer steps and hold the prediction against their peak")
    return parser


def _setup(args: argparse.Namespace) -> Setup:
    """The setup that the flags describe, every contradiction reported at once."""
    stage = args.zero_stage or 0
    least = {
        "num_processes": 1,
        "processes_per_node": 1,
        "lora_r": 1,
        "per_device_train_batch_size": 1,
        "num_attention_heads": 1,
        "max_length": 16 if args.measure else 2,
    }
    problems = [
        f"{name}: must be at least {bound}, is {value}"
        for name, bound in least.items()
        if (value := getattr(args, name)) is not None and value < bound
    ]
    problems += [
        f"{name}: must be positive, is {value}"
        for name in ("device_memory_gib", "host_memory_gib")
        if (value := getattr(args, name)) is not None and not value > 0
    ]
    if not 0 <= args.prompt_share < 1:
        problems.append(f"prompt_share: must be in [0, 1), is {args.prompt_share}")
    per_node = args.processes_per_node or max(1, min(args.num_processes, 8))
    if per_node > max(1, args.num_processes):
        problems.append(f"processes_per_node: {per_node} is more than num_processes, {args.num_processes}")
    if args.reference == "adapter" and args.lora_r is None:
        problems.append("reference: adapter is the policy without its LoRA matrices; set lora_r too")
    if args.offload != "none" and args.zero_stage is None:
        problems.append("offload: set zero_stage too, or leave both out to compare all configurations")
    elif args.offload == "all" and stage != 3:
        problems.append(f"offload: all needs zero_stage 3, which divides the parameters; zero_stage is {stage}")
    elif args.offload == "optimizer" and stage < 2:
        problems.append(f"offload: optimizer needs zero_stage 2 or 3; zero_stage is {stage}")
    if args.measure and args.zero_stage is None:
        problems.append("measure: set zero_stage: one configuration is measured at a time")
    if args.measure and args.device == "cuda" and torch.cuda.device_count() < args.num_processes:
        problems.append(
            f"measure: {args.num_processes} process(es) need as many GPUs, this machine has "
            f"{torch.cuda.device_count()}; use --device cpu"
        )
    if problems:
        raise UserError("plan: " + "\n  ".join(problems))
    cpu = args.device == "cpu"
    precision = args.mixed_precision or ("no" if cpu else "bf16")
    return Setup(
        world=args.num_processes,
        per_node=per_node,
        stage=stage,
        offload=args.offload,
        bf16=precision == "bf16",
        reference=_reference(args, stage),
        pairs=args.per_device_train_batch_size,
        length=args.max_length,
        prompt_share=args.prompt_share,
        checkpointing=args.gradient_checkpointing == "true",
        cpu=cpu,
    )


def _reference(args: argparse.Namespace, stage: int) -> str:
    """Where the reference is; of what `auto` may choose without ZeRO the larger, a second model for a single epoch."""
    if args.reference != "auto":
        return str(args.reference)
    return "adapter" if args.lora_r else "cache" if stage else "live"


def _available(args: argparse.Namespace) -> dict[str, float | None]:
    """GiB of a device and of a machine, as told or as found here; None where nothing tells."""
    device, host = args.device_memory_gib, args.host_memory_gib
    if host is None:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if device is None and args.device == "cuda" and torch.cuda.is_available():
        device = torch.cuda.mem_get_info(0)[1] / GIB
    return {"device": device if args.device == "cuda" else host, "host": host}


def _candidates(setup: Setup, args: argparse.Namespace) -> list[tuple[str, Setup]]:
    """The named configurations for the planned number of ranks."""
    skipped = "single" if setup.world > 1 else "multi"
    setups = [
        dataclasses.replace(setup, stage=stage, offload=offload, reference=_reference(args, stage))
        for name, (stage, offload) in CONFIGURATIONS.items()
        if name != skipped
    ]
    return [(_name(candidate, args.device), candidate) for candidate in setups]


def _name(setup: Setup, device: str) -> str:
    """The configuration in configs/accelerate that is nearest to the setup."""
    found = [
        name
        for name, (stage, offload) in CONFIGURATIONS.items()
        if stage == setup.stage and (offload != "none") == (setup.offload != "none")
    ]
    if setup.stage == 0:
        return ("multi_" if setup.world > 1 else "single_") + ("gpu" if device == "cuda" else "cpu")
    return found[0] + ("_cpu" if setup.cpu else "")


def _plan(name: str, shape: ModelShape, setup: Setup, available: dict[str, float | None]) -> dict[str, Any]:
    """One configuration's prediction, GiB; `fits` is None where the device's memory is not known."""
    device, host = predict(shape, setup, process_bytes(), CUDA_RUNTIME)
    node = host.total * setup.per_node / GIB
    fits: bool | None = node * SPARE <= (available["host"] or 0.0)
    if not setup.cpu and available["device"] is None:
        fits = None if fits else False
    elif not setup.cpu:
        fits = fits and device.total / GIB * SPARE <= (available["device"] or 0.0)
    return {
        "name": name,
        "reference": setup.reference,
        "fits": fits,
        "device": _gib(device),
        "host": _gib(host),
        "host_node_gib": node,
    }


def _gib(memory: Memory) -> dict[str, Any]:
    parts = {name: size / GIB for name, size in memory.parts.items()}
    return {"phase": memory.phase, "total_gib": memory.total / GIB, "parts_gib": parts}


def _text(report: dict[str, Any]) -> str:
    setup, plans, available = report["setup"], report["plans"], report["available_gib"]
    references = " or ".join(dict.fromkeys(plan["reference"] for plan in plans))
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.1f} M parameters, "
        f"{report['trained_parameters'] / 1e6:.1f} M trained; reference {references}; "
        f"{setup['pairs']} pairs of 2 x {setup['length']} tokens a rank, {setup['world']} rank(s)",
        "",
    ]
    for plan in plans if len(plans) == 1 else []:
        for where in ("device",) if setup["cpu"] else ("device", "host"):
            memory = plan[where]
            lines.append(
                f"{plan['name']}, a rank on the {'host (its device)' if setup['cpu'] else where}: "
                f"{memory['total_gib']:.2f} GiB, reached in: {memory['phase']}"
            )
            lines += [f"  {part:<14}{memory['parts_gib'][part]:9.3f}" for part in PARTS if memory["parts_gib"][part]]
    lines += ["", f"{'configuration':<22}{'device GiB a rank':>18}{'host GiB a machine':>20}  fits"]
    for plan in plans:
        fits = {True: "yes", False: "no", None: "?"}[plan["fits"]]
        lines.append(f"{plan['name']:<22}{plan['device']['total_gib']:>18.2f}{plan['host_node_gib']:>20.2f}  {fits}")
    memory = "unknown: name --device_memory_gib" if available["device"] is None else f"{available['device']:.1f} GiB"
    lines.append(f"available: device {memory}, machine {available['host']:.1f} GiB; a tenth is kept to spare")
    if len(plans) > 1 and any(plan["fits"] is not None for plan in plans):
        lines.append(f"recommended: {report['recommended'] or 'none of them fits'}")
    if "measured" in report:
        lines.append(
            "predicted {predicted_gib:.3f} GiB, measured {measured_gib:.3f} GiB, ratio {ratio:.3f}".format(
                **report["measured"]
            )
        )
    return "\n".join(lines)
