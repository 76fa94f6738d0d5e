"""What the project promises of its speed and memory, checked against a run of benchmarks/throughput.py."""

from __future__ import annotations

import math
import statistics
from typing import Any

# times as fast as TRL at its best, by mix; on the chat mix precomputed against cached, and with a live reference
BEST_PRECOMPUTED = {"chat": 2.4, "long_prompt": 2.2, "long_answer": 1.25}
BEST_LIVE = {"chat": 2.2, "long_prompt": 2.2, "long_answer": 1.25}
SHARE_OF_PEAK = 0.85


def check_targets(summary: dict[str, Any], mix: str, batch: int, default_model: bool) -> list[bool]:
    """Print a line for every target that the run can judge; whether each is met."""
    seconds = {name: statistics.median(spent) for name, spent in summary["seconds_a_pair_by_round"].items()}
    best, best_live = (_fastest(seconds, live) for live in (False, True))
    ours_live = min(
        (name for name in ("ours_live", "first epoch") if name in seconds), key=seconds.__getitem__, default="ours_live"
    )
    verdicts: list[bool] = []
    for text, value, bound, at_least in [
        *_speed(summary, mix, default_model, best, best_live, ours_live),
        *_memory(summary, mix, default_model),
        *_share(summary, mix, batch, default_model),
    ]:
        if not math.isnan(value):
            verdicts.append(value >= bound if at_least else value <= bound)
            print(
                f"{'pass' if verdicts[-1] else 'FAIL'}: {text}: {value:.2f} "
                f"({'at least' if at_least else 'at most'} {bound:.3g})"
            )
    return verdicts


def _fastest(seconds: dict[str, float], live: bool) -> str:
    """The TRL contestant with the fewest seconds a pair, in fp32 as ours is."""
    peers = [name for name in seconds if name.startswith("trl") and "_bf16" not in name]
    names = [name for name in peers if name.endswith("_live") == live]
    return min(names, key=seconds.__getitem__, default="trl_live" if live else "trl")


def median_ratio(by_round: dict[str, list[float]], slower: str, faster: str) -> float:
    """Median over rounds of the ratio of two contestants' seconds; nan if one did not run."""
    if slower not in by_round or faster not in by_round:
        return math.nan
    return statistics.median(one / other for one, other in zip(by_round[slower], by_round[faster], strict=True))


def _speed(
    summary: dict[str, Any], mix: str, default_model: bool, best: str, best_live: str, ours_live: str
) -> list[tuple[str, float, float, bool]]:
    def times(faster: str, slower: str, bound: float) -> tuple[str, float, float, bool]:
        ratio = median_ratio(summary["seconds_a_pair_by_round"], slower, faster)
        return f"{faster} is so many times as fast as {slower}", ratio, bound, True

    if not default_model:  # SmolLM2-135M
        return [times("ours_cached", "trl", 4.5), times("ours_cached", best, 3.0)]
    targets = [times("ours_cached", best, BEST_PRECOMPUTED[mix]), times(ours_live, best_live, BEST_LIVE[mix])]
    if mix == "chat":
        targets += [
            times("ours_cached", "trl", 4.0),
            times(ours_live, "trl_live", 4.0),
            times("ours_cached", "minimind", 15.0),
            times("first epoch", "minimind", 12.0),
        ]
    return targets


def _memory(summary: dict[str, Any], mix: str, default_model: bool) -> list[tuple[str, float, float, bool]]:
    def part(peer: str, bound: float) -> tuple[str, float, float, bool]:
        rows = summary["contestants"]
        if not {"ours_cached", peer} <= rows.keys():
            return "", math.nan, bound, False
        return (
            f"ours_cached's peak memory over {peer}'s",
            rows["ours_cached"]["peak_mib"] / rows[peer]["peak_mib"],
            bound,
            False,
        )

    if mix != "chat":
        return []
    return [part("trl", 0.5), part("trl_mb1", 0.8)] if default_model else [part("trl", 1 / 3)]


def _share(summary: dict[str, Any], mix: str, batch: int, default_model: bool) -> list[tuple[str, float, float, bool]]:
    row = summary["contestants"].get("ours_cached")
    if mix != "chat" or batch < 8 or not default_model or row is None:
        return []
    return [
        (
            "ours_cached's share of the matrix-product peak",
            row["gflops"] / summary["matrix_peak_gflops"],
            SHARE_OF_PEAK,
            True,
        )
    ]
