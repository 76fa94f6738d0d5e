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
    for plan in plans if len(plans) == 1 else []:
        for where in ("device",) if setup["cpu"] else ("device", "host"):
            memory = plan[where]
            lines.append(
                f"{plan['name']}, a rank on the {'host (its device)' if setup['cpu'] else where}: "
                f"{memory['total_gib']:.2f} GiB, reached in: {memory['phase']}"
            )
            lines += [f"  {purpose:<14}{size:9.3f}" for purpose, size in memory["parts_gib"].items() if size]
    lines += [
        "",
        f"{'configuration':<22}{'device GiB a rank':>18}{'host GiB a machine':>20}  fits  max_tokens_per_micro_batch",
    ]
    for plan in plans:
        fits = {True: "yes", False: "no", None: "?"}[plan["fits"]]
        most = "-" if plan["max_tokens_per_micro_batch"] is None else plan["max_tokens_per_micro_batch"]
        needs = f"{plan['device']['total_gib']:>18.2f}{plan['host_node_gib']:>20.2f}"
        lines.append(f"{plan['name']:<22}{needs}  {fits:<4}{most:>28}")
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
