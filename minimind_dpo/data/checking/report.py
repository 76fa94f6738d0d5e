"""What `data check` says: one JSON object, or a page for people."""

from __future__ import annotations

from typing import Any

from minimind_dpo.data.checking.findings import REASONS
from minimind_dpo.data.checking.lengths import describe_lengths, length_bias
from minimind_dpo.data.checking.survey import Survey

_PLACES = 3  # in a line of the page


def as_json(found: Survey, evaluation: Survey | None = None) -> dict[str, Any]:
    """The object that `--json` prints, with `sources` where there are several and `eval` where it was given."""
    report = _describe(found)
    if len(found.sources) > 1:
        report["sources"] = [
            {"source": source.name} | _describe(found, number) for number, source in enumerate(found.sources)
        ]
    return report | ({"eval": as_json(evaluation)} if evaluation else {})


def as_text(report: dict[str, Any], found: Survey, evaluation: Survey | None = None) -> str:
    """The page: findings with places and remedies, lengths, and the verdict.

    Args:
        report: of `as_json`.
        found: the same, of the training data.
        evaluation: of the evaluation data, if there are any.
    """
    blocks = [_findings(report, found), *_sources(report), _lengths(report["lengths"], found.max_length)]
    if report["length_bias"] is not None:
        blocks.append(f"The chosen side is the longer one in {report['length_bias']:.1%} of the pairs.")
    if evaluation is not None:
        blocks.append(f"Evaluation data\n\n{_findings(report['eval'], evaluation)}")
    return "\n\n".join([*blocks, _verdict(report)])


def _describe(found: Survey, source: int | None = None) -> dict[str, Any]:
    part = found if source is None else found.sources[source]
    kept = found.kept(source)
    return {
        "rows": part.rows,
        "kept": len(kept),
        "findings": part.findings.to_json(),
        "lengths": describe_lengths(found.of(source), found.max_length),
        "length_bias": length_bias(kept),
    }


def _findings(report: dict[str, Any], found: Survey) -> str:
    name = ", ".join(source.name for source in found.sources)
    lines = [f"{name}: {report['kept']} of {report['rows']} rows are kept by training"]
    for finding in report["findings"]:
        reason, count = finding["reason"], finding["count"]
        places = finding["places"][:_PLACES] + (["..."] if count > _PLACES else [])
        share = f"{count / max(report['rows'], 1):.2%}"
        lines.append(f"\n{finding['severity']:8} {reason:27} {count:>9} {share:>8}  {', '.join(places)}")
        lines.append(f"{'':9}{found.findings.examples[reason][0][1]}\n{'':9}-> {REASONS[reason].remedy}")
    return "\n".join(lines) if report["findings"] else f"{lines[0]}; nothing is wrong with them"


def _sources(report: dict[str, Any]) -> list[str]:
    """A line a source, where there are several."""
    lines = []
    for source in report.get("sources", []):
        counts = ", ".join(f"{finding['count']} {finding['reason']}" for finding in source["findings"])
        line = f"{source['source']}: {source['kept']} of {source['rows']} kept; {counts or 'nothing found'}"
        if source["length_bias"] is not None:
            side = source["lengths"]["longer_side"]
            line += f"; tokens a side: median {side['median']:g}, p95 {side['p95']}"
            line += f"; chosen longer in {source['length_bias']:.1%}"
        lines.append(line)
    return ["\n".join(lines)] if lines else []


def _lengths(lengths: dict[str, Any], max_length: int) -> str:
    if lengths["longer_side"]["longest"] is None:
        return "No lengths: there is no pair to measure."
    lines = [f"{'tokens':12} {'median':>8} {'p95':>8} {'longest':>8}"]
    for name, label in (("prompt", "prompt"), ("chosen", "chosen"), ("rejected", "rejected"), ("longer_side", "side")):
        spread = lengths[name]
        lines.append(f"{label:12} {spread['median']:8g} {spread['p95']:8} {spread['longest']:8}")
    lines.append(f"\n{'max_length':12} {'truncated':>9} {'left out':>9}")
    for cut in lengths["table"]:
        here = " *" if cut["max_length"] == max_length else ""
        lines.append(f"{str(cut['max_length']) + here:12} {cut['truncated']:9.2%} {cut['dropped']:9.2%}")
    lines.append("(* as checked; side: prompt and longer answer together)")
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> str:
    found = report["findings"] + report.get("eval", {}).get("findings", [])
    counts = {kind: [f["reason"] for f in found if f["severity"] == kind] for kind in ("error", "warning")}
    if counts["error"]:
        return f"NOT FIT: {', '.join(dict.fromkeys(counts['error']))} must be mended first."
    if counts["warning"]:
        return f"FIT, with warnings: {', '.join(dict.fromkeys(counts['warning']))}."
    return "FIT: nothing was found that training should not see."
