"""The figures and tables of a page: what a run came to, what was held out, what it was told, on what it went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from minimind_dpo.config import TrainConfig
from minimind_dpo.losses import LOSSES
from minimind_dpo.report.reading import held_out_sets, is_finite

_LN2 = {"sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "beta_dpo"}
EVAL_ORDER = [
    "logps/accuracies",
    "loss",
    "dpo_loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
]


def refers(config: dict[str, Any]) -> bool:
    """Whether a run's losses read a reference; one from outside is taken to."""
    return any(LOSSES[name].needs_reference if name in LOSSES else True for name in _losses(config))


def starts_at_ln2(config: dict[str, Any]) -> bool:
    """Whether a policy that equals its reference has a loss of ln 2: each loss is a log-sigmoid of the margin."""
    return {*_losses(config)} <= _LN2 and len(_losses(config)) == 1


def before_note(config: dict[str, Any]) -> str:
    """What to know of the metrics before the first step."""
    if not refers(config):
        return (
            "Without a reference rewards are beta times the policy's log-probabilities: only differences say something."
        )
    if config.get("ref_model_name_or_path"):
        return "Rewards are told against a reference that is not the policy's start, so they need not begin at 0."
    return (
        "Before: the policy still equals the reference, so rewards and margins are 0 and, since a tie counts as 0, "
        "so is rewards/accuracies."
    )


def _losses(config: dict[str, Any]) -> list[str]:
    """Of a configuration of today, or of one with a single name."""
    named = config.get("loss_type", ["sigmoid"])
    return list(named) if isinstance(named, list) else [str(named)]


def headlines(
    summary: dict[str, Any], last_line: dict[str, Any], replies: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """(value, label) of the figures at the top: right replies and evaluation first, then the cost.

    Args:
        summary: summary.json, {} amid a run.
        last_line: of metrics.jsonl that logs a training step.
        replies: that a rule has judged, "before_ok" and "after_ok".
    """
    figures: list[tuple[str, str]] = []
    if replies:
        right = [sum(bool(reply.get(key)) for reply in replies) for key in ("before_ok", "after_ok")]
        figures.append(
            (f"{right[0]} → {right[1]}", f"replies right by the task's rule, of {len(replies)}, before → after")
        )
    before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
    for prefix, name in held_out_sets(after).items():
        figures += _of_set(before, after, prefix, f"{name}: " if name else "")
    for key, (logged, label) in _COST.items():
        value = summary.get(key, last_line.get(logged))
        if value is not None:
            figures.append((number(value), label))
    return figures


def _of_set(before: dict[str, Any], after: dict[str, Any], prefix: str, of: str) -> Iterator[tuple[str, str]]:
    """The headlines of a set of held-out pairs."""
    for key, label, show in (
        ("logps/accuracies", "held-out pairs whose chosen reply the model itself finds likelier, per token", percent),
        ("loss", "held-out loss", number),
    ):
        first, last = before.get(prefix + key), after.get(prefix + key)
        if is_finite(first) and is_finite(last):
            yield f"{show(first)} → {show(last)}", f"{of}{label}, before → after"
    rewarded = after.get(f"{prefix}rewards/accuracies")
    if is_finite(rewarded):  # its "before" is 0 by definition, so it would only mislead
        yield percent(rewarded), f"{of}held-out pairs that reward the chosen reply more, after"


_COST = {  # of summary.json: its name in metrics.jsonl, and what it is
    "steps": ("step", "optimizer steps"),
    "pairs_seen": ("pairs_seen", "pairs seen"),
    "seconds": ("", "seconds"),
    "pairs_per_second": ("pairs_per_second", "pairs a second"),
    "peak_memory_gib": ("peak_memory_gib", "GiB of memory at the peak"),
}


def evaluation_table(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, before, after) for every metric of the first and the last evaluation, the important ones first."""
    before, after = (
        {name.removeprefix("eval_"): value for name, value in (summary.get(key) or {}).items()}
        for key in ("eval_before", "eval_after")
    )
    return [(name, text(before.get(name, "–")), text(after.get(name, "–"))) for name in in_order({**before, **after})]


def in_order(names: dict[str, Any]) -> list[str]:
    """Metrics of an evaluation, without `eval_`: a set at a time, those that tell most first."""
    sets = [prefix.removeprefix("eval_") for prefix in held_out_sets(f"eval_{name}" for name in names)]

    def place(name: str) -> tuple[int, int, str]:
        of = max((one for one in sets if name.startswith(one)), key=len, default=None)
        bare = name.removeprefix(of or "")
        order = EVAL_ORDER.index(bare) if bare in EVAL_ORDER else len(EVAL_ORDER)
        return len(sets) if of is None else sets.index(of), order, bare

    return sorted(names, key=place)


def settings(config: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(setting, value) of what a run was told, and of what it left at today's defaults."""
    defaults = asdict(TrainConfig())
    told, left = list[tuple[str, str]](), list[tuple[str, str]]()
    for key, value in config.items():
        (left if key in defaults and defaults[key] == value else told).append((key, text(value)))
    return told, left


def data_table(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(what, its value for each part of the data) of record/data.json."""
    described = list(data.values())

    def row(label: str, show: Any) -> tuple[str, list[str]]:
        return label, [show(part) for part in described]

    def lengths(side: str) -> Any:
        return lambda part: " / ".join(number(part["tokens"][side][key]) for key in ("median", "95 %", "longest"))

    return [
        row("pairs used", lambda part: number(part["pairs"])),
        row("rows read", lambda part: number(part["rows"])),
        row("rows left out", lambda part: "; ".join(_dropped(part)) or "none"),
        row("tokens counted of a chosen answer: median / 95 % / longest", lengths("chosen")),
        row("of a rejected answer", lengths("rejected")),
        row("input tokens of a pair, shared prefix once", lengths("input")),
        row("chosen answer longer", lambda part: percent(part["longer"]["chosen"])),
        row("rejected answer longer", lambda part: percent(part["longer"]["rejected"])),
    ]


def _dropped(part: dict[str, Any]) -> Iterator[str]:
    for reason, count in part["dropped"].items():
        yield f"{count} {reason} (first: {part['examples'].get(reason, '?')})"


def percent(value: float) -> str:
    """A share; the space before the sign does not break."""
    return f"{100 * value:.0f}\u00a0%"


def number(value: Any) -> str:
    """Whole numbers as they are, others with three or four figures that count."""
    if not is_finite(value):
        return text(value)
    if isinstance(value, int) or value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def text(value: Any) -> str:
    """A cell: numbers short, true and false as yaml writes them, the rest as it is."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
