"""A run's report: one self-contained HTML page made from the files of a run directory.

Everything on the page is read from `metrics.jsonl`, `summary.json`, `config.yaml` and, where a run has it,
`replies.jsonl`. A piece that is missing leaves its part of the page out; the same files give the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from minimind_dpo.errors import UserError
from minimind_dpo.files import write_text
from minimind_dpo.losses import LOSSES
from minimind_dpo.report.curves import curves, is_finite

logger = logging.getLogger(__name__)

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


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    `replies.jsonl` holds one object a line: "prompt", "before", "after", "before_ok", "after_ok".

    Raises:
        UserError: `run_dir` has no `metrics.jsonl`, or a file that the run itself wrote there is damaged.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: no metrics.jsonl here; name the output_dir of a training run")
    rows = _read_lines(run_dir / "metrics.jsonl")
    summary = _read_settings(run_dir / "summary.json", json.loads)
    config = _read_settings(run_dir / "config.yaml", yaml.safe_load)
    replies = _read_replies(run_dir / "replies.jsonl")
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string((Path(__file__).parent / "template.html").read_text(encoding="utf-8"))
        .render(
            title=str(config.get("run_name") or run_dir.resolve().name),
            finished=bool(summary),
            headlines=headlines(summary, rows, replies),
            curves=curves(rows, starts_at_ln2(config), refers(config)),
            evaluation=evaluation_table(summary),
            before=before_note(config),
            replies=replies,
            config=[(key, _text(value)) for key, value in config.items()],
        )
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


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
    summary: dict[str, Any], rows: list[dict[str, Any]], replies: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """(value, label) of the figures at the top: right replies and evaluation first, then the cost."""
    figures: list[tuple[str, str]] = []
    if replies:
        right = [sum(bool(reply.get(key)) for reply in replies) for key in ("before_ok", "after_ok")]
        figures.append(
            (f"{right[0]} → {right[1]}", f"replies right by the task's rule, of {len(replies)}, before → after")
        )
    before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
    for key, label, show in (
        ("logps/accuracies", "held-out pairs whose chosen reply the model itself finds likelier, per token", _percent),
        ("loss", "held-out loss", _number),
    ):
        first, last = _metric(before, key), _metric(after, key)
        if first is not None and last is not None:
            figures.append((f"{show(first)} → {show(last)}", f"{label}, before → after"))
    rewarded = _metric(after, "rewards/accuracies")
    if rewarded is not None:  # its "before" is 0 by definition, so it would only mislead
        figures.append((_percent(rewarded), "held-out pairs that reward the chosen reply more, after"))
    last_row: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    cost = {
        "steps": ("step", "optimizer steps"),
        "pairs_seen": ("pairs_seen", "pairs seen"),
        "seconds": ("", "seconds"),
        "pairs_per_second": ("pairs_per_second", "pairs a second"),
        "peak_memory_gib": ("peak_memory_gib", "GiB of memory at the peak"),
    }
    for key, (logged, label) in cost.items():
        value = summary.get(key, last_row.get(logged))
        if value is not None:
            figures.append((_number(value), label))
    return figures


def evaluation_table(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, before, after) for every metric of the first and the last evaluation, the important ones first."""
    before, after = (
        {name.removeprefix("eval_"): value for name, value in (summary.get(key) or {}).items()}
        for key in ("eval_before", "eval_after")
    )
    names = [*before, *(key for key in after if key not in before)]
    names.sort(key=lambda name: (EVAL_ORDER.index(name) if name in EVAL_ORDER else len(EVAL_ORDER), name))
    return [(name, _text(before.get(name, "–")), _text(after.get(name, "–"))) for name in names]


def _read_replies(path: Path) -> list[dict[str, Any]]:
    """The replies of a demo; a damaged file costs the page this part, and no run its end."""
    try:
        return _read_lines(path)
    except UserError as error:
        logger.warning("%s; the report shows no replies", error)
        return []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file ([] if it is absent); a last line that is still being written is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_object(json.loads, line, f"{path}:{number}: not a JSON object", "mend or remove the line"))
    with suppress(UserError):
        rows += [_object(json.loads, last, "", "")] if last.strip() else []
    return rows


def _read_settings(path: Path, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    """The object in a file, {} if it is absent or empty."""
    content = path.read_bytes() if path.is_file() else b""
    kind = "YAML" if parse is yaml.safe_load else "JSON"
    remedy = "remove the file or run again"
    return _object(parse, content, f"{path}: not a {kind} object", remedy) if content.strip() else {}


def _object(parse: Callable[[bytes], Any], content: bytes, problem: str, remedy: str) -> dict[str, Any]:
    try:
        value = parse(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{problem} ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{problem} ({type(value).__name__}); {remedy}")
    return value


def _metric(metrics: dict[str, Any], name: str) -> float | None:
    """A metric by its bare name, whether or not it carries the prefix of an evaluation."""
    value = metrics.get(f"eval_{name}", metrics.get(name))
    return float(value) if is_finite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _number(value: float) -> str:
    """Whole numbers as they are, others with three or four figures that count."""
    if isinstance(value, int) or (abs(value) >= 100 and is_finite(value)):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _text(value: Any) -> str:
    """A cell: numbers short, true and false as yaml writes them, the rest as it is."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)
