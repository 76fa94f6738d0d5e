"""Figures of an evaluation as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
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


def replies_as_text(told: dict[str, Any], width: int) -> str:
    """Prompts with the replies of model and baseline side by side, and what can be measured of them."""
    who = list(told["reply_means"])
    lines = []
    for each in told["replies"]:
        lines += ["", *textwrap.wrap(each["prompt"], width)]
        lines += beside([f"{name}: {each[name]['reply']}" for name in who], width)
    lines.append("")
    for name, means in told["reply_means"].items():
        lines.append(
            f"{name}: {means['tokens']:.1f} tokens a reply, {means['repetition']:.1%} of their 4-grams repeated, "
            f"{means['ended']:.0%} ended by itself"
        )
    return "\n".join(lines).lstrip("\n")


def beside(texts: Sequence[str], width: int) -> list[str]:
    """Lines with texts next to each other, in columns that share `width` characters."""
    own = max(width // len(texts) - 2, 30)
    columns = [textwrap.wrap(text, own - 2) or [""] for text in texts]
    rows = zip_longest(*columns, fillvalue="")
    return [("  " + "".join(f"{cell:<{own}}" for cell in row)).rstrip() for row in rows]


def _line(metric: str, found: dict[str, Any]) -> str:
    low, high = found["interval"][metric]
    return f"{metric:<28}{found[metric]:>12.4f}  [{low:.4f}, {high:.4f}]"


def _groups(title: str, groups: dict[str, Any]) -> Iterator[str]:
    columns = [name for name in _OF_GROUPS if name in next(iter(groups.values()))]
    width = max(len(title), *map(len, groups))
    yield f"{title:<{width}}{'pairs':>8}" + "".join(f"{name:>20}" for name in columns)
    for group, found in groups.items():
        yield f"{group:<{width}}{found['pairs']:>8}" + "".join(f"{found[name]:>20.4f}" for name in columns)
