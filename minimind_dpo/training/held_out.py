"""What is said of held-out pairs on the console: at each evaluation, and at the end."""

from __future__ import annotations

import logging

from minimind_dpo.training.run import Run

logger = logging.getLogger(__name__)

# what is told of an evaluation, most telling first: name, and how it is written
_TOLD = (
    ("loss", "{:.4f}"),
    ("rewards/accuracies", "{:.1%}"),
    ("rewards/margins", "{:.3f}"),
    ("logps/accuracies", "{:.1%}"),
    ("logps/chosen", "{:.2f}"),
)


def tell_evaluation(run: Run, values: dict[str, float]) -> None:
    """A line on the console for each set of held-out pairs."""
    for prefix, name in _eval_prefixes(values):
        told = ", ".join(f"{metric} {text.format(values[prefix + metric])}" for metric, text in _TOLD)
        logger.info("evaluation at step %d%s: %s", run.state.step, name and f" of {name}", told)


def before_and_after(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Lines that compare a run's first and last evaluation."""
    lines = []
    for prefix, name in _eval_prefixes(before):
        lines.append(f"held-out pairs{name and f' ({name})'}, before -> after:")
        for metric, text in _TOLD:
            values = [each.get(prefix + metric) for each in (before, after)]
            shown = ["-" if value is None else text.format(value) for value in values]
            lines.append(f"  {metric:<20}{shown[0]:>9} -> {shown[1]:>9}")
    return lines


def _eval_prefixes(values: dict[str, float]) -> list[tuple[str, str]]:
    """What the metrics of each set of held-out pairs begin with, and its name."""
    found = [name.removesuffix("dpo_loss") for name in values if name.endswith("_dpo_loss")]
    return [(prefix, prefix.removeprefix("eval_").removesuffix("_")) for prefix in found]
