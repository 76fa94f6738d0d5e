"""What of single pairs and replies a page shows: tokens in colours, histograms as bars, replies beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from minimind_dpo.report.facts import number
from minimind_dpo.report.reading import is_finite
from minimind_dpo.report.spread import widen
from minimind_dpo.report.thinning import picked

STEPS = (0.05, 0.2, 0.6, 1.5)  # nats, from which a token has the next stronger colour
_MOMENTS = 6
_MOST_TEXT, _MOST_PROMPTS = 1500, 60


def coloured(side: dict[str, Any]) -> dict[str, Any]:
    """One side of a pair of record/pairs.jsonl for the page.

    Returns:
        the same with `runs`: (text, class, log-ratio as text) of tokens; those without a colour are joined; and
        `moved`: the three tokens that moved most, as text.
    """
    parts = [(text, value, level(value)) for text, value in side["tokens"]]
    runs: list[tuple[str, str, str]] = []
    for plain, group in groupby(parts, key=lambda part: part[2] in ("", "c")):
        if plain:
            for shade, same in groupby(group, key=lambda part: part[2]):
                runs.append(("".join(text for text, _, _ in same), shade, ""))
        else:
            runs += [(text, shade, f"{value:+.2f}") for text, value, shade in group]
    moved = sorted((part for part in parts if part[2] not in ("", "c")), key=lambda part: -abs(part[1] or 0.0))[:3]
    told = ", ".join(f"“{text.strip() or '(space)'}” {value:+.2f}" for text, value, _ in moved)
    return side | {"runs": runs, "moved": told or "no token by 0.05 nats or more"}


def level(value: Any) -> str:
    """A token's class: "" if it does not count, "c" if it hardly moved, p1 to p4 likelier, n1 to n4 less likely."""
    if not is_finite(value):
        return ""
    strength = sum(abs(value) >= step for step in STEPS)
    return f"{'p' if value > 0 else 'n'}{strength}" if strength else "c"


def histograms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spread of rewards at up to six evaluations, all in the same bins, as bars of a picture 100 wide and 40 high.

    Args:
        rows: of record/rewards.jsonl.

    Returns:
        of each: `step`; `bars`: for "chosen" and "rejected" (x, y, width, height); `low`, `high`: the ends of the
        axis; `zero`: where on it 0 lies, None if it does not.
    """
    latest = {row["step"]: row for row in rows if row["chosen"]["counts"] and row["rejected"]["counts"]}
    chosen = picked(list(latest.values()), _MOMENTS)
    if not chosen:
        return []
    power = max(row[side]["power"] for row in chosen for side in ("chosen", "rejected"))
    spread = [{side: widen(row[side], power) for side in ("chosen", "rejected")} for row in chosen]
    every = [bins for both in spread for bins in both.values()]
    low = min(bins["first"] for bins in every)
    high = max(bins["first"] + len(bins["counts"]) for bins in every)
    width = 100 / (high - low)
    pictures = []
    for row, both in zip(chosen, spread, strict=True):
        tallest = max(max(bins["counts"]) for bins in both.values())
        bars = {
            side: [
                (round((bins["first"] + place - low) * width, 2), round(40 - 40 * count / tallest, 2), round(width, 2),
                 round(40 * count / tallest, 2))
                for place, count in enumerate(bins["counts"]) if count
            ]
            for side, bins in both.items()
        }  # fmt: skip
        picture = {"step": row["step"], "pairs": row["pairs"], "bars": bars, "margins": row["margins"]}
        picture |= {"low": number(low * 2.0**power), "high": number(high * 2.0**power)}
        pictures.append(picture | {"zero": round(-low * width, 2) if low <= 0 <= high else None})
    return pictures


def judged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of replies.jsonl the prompts with a reply before and after, each judged by a rule."""
    return [row for row in rows if "before" in row and "after" in row]


def live_replies(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of replies.jsonl those made while the run went on: `prompt` and `replies`, (step, text) at up to six moments."""
    by_prompt: dict[str, dict[int, str]] = {}
    for row in rows:
        prompt, step = str(row.get("prompt", "")), row.get("step")
        if "reply" in row and isinstance(step, int) and (prompt in by_prompt or len(by_prompt) < _MOST_PROMPTS):
            by_prompt.setdefault(prompt, {})[step] = shortened(str(row["reply"]))
    return [
        {"prompt": shortened(prompt), "replies": picked(sorted(replies.items()), _MOMENTS)}
        for prompt, replies in by_prompt.items()
    ]


def shortened(text: str) -> str:
    """A text's beginning, if it is long."""
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} … ({len(text) - _MOST_TEXT} more characters)"
