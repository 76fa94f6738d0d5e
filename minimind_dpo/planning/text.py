"""A plan as text."""

from __future__ import annotations

from typing import Any


def render(report: dict[str, Any]) -> str:
    """The report of `planning/comparison.py` for people."""
    setup, plans, available = report["setup"], report["plans"], report["available_gib"]
    references = " or ".join(dict.fromkeys(plan["reference"] for plan in plans))
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.1f} M parameters, "
        f"{report['trained_parameters'] / 1e6:.1f} M trained; reference {references}; "
        f"{setup['pairs']} pairs of 2 x {setup['length']} tokens a rank, {setup['world']} rank(s)",
        "",
    ]
    for plan in plans if len(plans) == 1 else ():
        for where in ("device",) if setup["cpu"] else ("device", "host"):
            memory = plan[where]
            lines.append(
                f"{plan['name']}, a rank on the {'host (its device)' if setup['cpu'] else where}: "
                f"{memory['total_gib']:.2f} GiB, reached in: {memory['phase']}"
            )
            lines += [f"  {purpose:<14}{size:9.3f}" for purpose, size in memory["parts_gib"].items() if size]
        lines.append("")
    lines.append(
        f"{'configuration':<22}{'device GiB a rank':>18}{'host GiB a machine':>20}  {'fits':<12}"
        "max_tokens_per_micro_batch"
    )
    for plan in plans:
        fits = {True: "yes", False: f"no: {plan['lacks']}", None: "?"}[plan["fits"]]
        most = "-" if plan["max_tokens_per_micro_batch"] is None else plan["max_tokens_per_micro_batch"]
        needs = f"{plan['device']['total_gib']:>18.2f}{plan['host_node_gib']:>20.2f}"
        lines.append(f"{plan['name']:<22}{needs}  {fits:<12}{most:>26}")
    memory = [
        f"{name} unknown (--{flag})" if available[where] is None else f"{name} {available[where]:.1f} GiB"
        for name, where, flag in (("device", "device", "device_memory_gib"), ("machine", "host", "host_memory_gib"))
    ]
    lines.append(f"available: {', '.join(memory)}; a tenth is kept to spare")
    lines += _advice(report)
    if "measured" in report:
        lines.append(
            "predicted {predicted_gib:.3f} GiB, measured {measured_gib:.3f} GiB, ratio {ratio:.3f}".format(
                **report["measured"]
            )
        )
    return "\n".join(lines)


def _advice(report: dict[str, Any]) -> list[str]:
    """What to take, or what would fit instead."""
    plans, suggestion = report["plans"], report["suggestion"]
    if report["recommended"]:
        return [f"recommended: {report['recommended']}"] if len(plans) > 1 else []
    if any(plan["fits"] is None for plan in plans):
        return ["recommended: not known without --device_memory_gib, the memory of a GPU"] if len(plans) > 1 else []
    if suggestion is None:
        return ["none of them fits, nor does LoRA with one pair at a time; more ranks, or a smaller model"]
    flags = " ".join(f"--{name} {str(value).lower()}" for name, value in suggestion["flags"].items())
    return [
        f"none of them fits; {suggestion['name']} would with {flags} ({suggestion['device_gib']:.2f} GiB a rank)"
        if len(plans) > 1
        else f"it would fit with {flags} ({suggestion['device_gib']:.2f} GiB a rank)"
    ]
