"""What can be wrong with a row: each reason with its severity and its remedy, counted, and written to a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from minimind_dpo.errors import UserError
from minimind_dpo.files import replacing, writing

PLACES = 5  # of each reason, in the report; the ledger has all


@dataclass(frozen=True, slots=True)
class Reason:
    """A kind of finding: `severity` error, warning or info, and what to do about it."""

    severity: str
    remedy: str


# error: training would stop, or silently learn or measure something else than was meant. warning: the row teaches
# nothing and is left out, or teaches something doubtful. In the order of the report.
REASONS = {
    "malformed_row": Reason("error", "mend these rows, or leave them out with on_bad_row: drop"),
    "no_usable_pair": Reason("error", "training has nothing to start with: see why the rows are left out"),
    "double_bos": Reason("error", "take the beginning-of-text token, or all rendered markup, out of the texts"),
    "missing_end_token": Reason("error", "let the chat template close an answer with the tokenizer's end token"),
    "leak_into_eval": Reason("error", "take these rows out of the training data, or their like out of the other"),
    "empty_answer": Reason("warning", "left out; answer, or remove these rows"),
    "identical_sides": Reason("warning", "left out; remove these rows"),
    "no_completion_token": Reason("warning", "left out; raise max_length or shorten the prompts"),
    "identical_after_truncation": Reason("warning", "left out; raise max_length or shorten the prompts"),
    "template_hides_turns": Reason("warning", "left out; take a chat template that keeps every turn's words"),
    "prompt_differs": Reason("warning", "let both sides answer the same prompt: its difference would be learnt too"),
    "repeats_prompt": Reason("warning", "take the prompt out of the answers, unless they quote it"),
    "empty_prompt": Reason("warning", "ask something, or remove these rows"),
    "duplicate_pair": Reason("warning", "remove the copies: they count as often as they occur (weight does that, too)"),
    "contradictory_pair": Reason("warning", "decide which answer is better: these pairs cancel each other"),
    "parts_early": Reason("info", "nothing, if these are trajectories; else let both sides have the same history"),
    "truncated": Reason("info", "raise max_length where the answers' ends matter"),
}


@dataclass(slots=True)
class Findings:
    """Rows found, by reason: how many, and of the first few the place and what was seen there."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, reason: str, place: str, detail: str) -> None:
        """Count one more row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < PLACES:
            examples.append((place, detail))

    def has_error(self) -> bool:
        """Whether a reason of severity error is among them."""
        return any(REASONS[reason].severity == "error" for reason in self.counts)

    def to_json(self) -> list[dict[str, Any]]:
        """The `findings` of the report, in the order of `REASONS`."""
        return [
            {
                "reason": reason,
                "severity": REASONS[reason].severity,
                "count": self.counts[reason],
                "places": [place for place, _ in self.examples[reason]],
            }
            for reason in REASONS
            if reason in self.counts
        ]


class Ledger:
    """One JSON line for each finding: `place`, `reason`, `severity`, `detail`; without a file it keeps nothing."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, reason: str, place: str, detail: str) -> None:
        """Append a line."""
        if self._file is not None:
            line = {"place": place, "reason": reason, "severity": REASONS[reason].severity, "detail": detail}
            print(json.dumps(line, ensure_ascii=False), file=self._file)


@contextmanager
def open_ledger(name: str | None) -> Iterator[Ledger]:
    """A ledger that takes its name when the block ends without an error.

    Raises:
        UserError: it can't be written there.
        TrainingError: the disk is full.
    """
    if name is None:
        yield Ledger(None)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{name}: a directory; --ledger names the file to write")
    # what reads data in the block has errors of its own kind, so those of writing are the ledger's
    with writing(path, "--ledger"), replacing(path) as new:
        # half a surrogate pair in a text is escaped the way JSON does it
        with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield Ledger(file)
