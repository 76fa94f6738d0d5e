"""Figures of an evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_HIDDEN = ("pairs", "interval", "by", "by_length", "length_correlation")
_OF_GROUPS = ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies")


def as_text(name: str, found: dict[str, Any]) -> str:
    """A set's figures; `name` is empty for a single set."""
    lines = [f"{name + ': ' if name else ''}{found['pairs']} pairs", ""]
    lines.append(f"{'':<28}{'mean':>12}  95 % interval")
    lines += [_line(metric, found) for metric in found if metric not in _HIDDEN]
    if found["length_correlation"] is not None:
        lines.append(
            f"\ncorrelation of margins with how much longer the chosen answer is: {found['length_correlation']:.2f}"
        )
    for title, groups in (("by group", found["by"]), ("by length", found["by_length"])):
        if groups:
            lines += ["", *_groups(title, groups)]
    return "\n".join(lines)


def _line(metric: str, found: dict[str, Any]) -> str:
    low, high = found["interval"][metric]
    return f"{metric:<28}{found[metric]:>12.4f}  [{low:.4f}, {high:.4f}]"


def _groups(title: str, groups: dict[str, Any]) -> Iterator[str]:
    columns = [name for name in _OF_GROUPS if name in next(iter(groups.values()))]
    width = max(len(title), *map(len, groups))
    yield f"{title:<{width}}{'pairs':>8}" + "".join(f"{name:>20}" for name in columns)
    for group, found in groups.items():
        yield f"{group:<{width}}{found['pairs']:>8}" + "".join(f"{found[name]:>20.4f}" for name in columns)
