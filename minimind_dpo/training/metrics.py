"""The one place that turns a step's numbers into metrics: sums over pairs first, means once, over all ranks."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from minimind_dpo.data.batch import PairBatch
from minimind_dpo.objective.losses import implicit_rewards

PAIR_METRICS = (
    "loss",
    "dpo_loss",
    "aux_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/ties",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)
_PAIRS, _TOKENS = len(PAIR_METRICS), len(PAIR_METRICS) + 1


def empty_sums(device: torch.device) -> Tensor:
    """Zeros for the sums over pairs of PAIR_METRICS, the number of pairs and the number of tokens."""
    return torch.zeros(len(PAIR_METRICS) + 2, dtype=torch.float64, device=device)


@torch.no_grad()
def pair_sums(
    batch: PairBatch,
    *,
    losses: Tensor,
    aux_losses: Tensor,
    policy_logps: tuple[Tensor, Tensor],
    ref_logps: tuple[Tensor, Tensor],
    beta: float,
) -> Tensor:
    """Sums over the pairs of one micro-batch, in `empty_sums`' layout.

    Args:
        batch: the B pairs.
        losses: [B] weighted preference losses; `aux_losses` [B] router losses.
        policy_logps: chosen and rejected [B] summed log-probabilities; `ref_logps` likewise.
        beta: scale of the rewards.

    Rewards are beta times the summed log-ratio, logps are sums over completion tokens. A tie is no accuracy.
    `logps/accuracies` compares the policy's own mean log-probability a token of the two answers.
    """
    (chosen_logps, rejected_logps), (ref_chosen_logps, ref_rejected_logps) = policy_logps, ref_logps
    chosen_rewards = implicit_rewards(chosen_logps, ref_chosen_logps, beta=beta)
    rejected_rewards = implicit_rewards(rejected_logps, ref_rejected_logps, beta=beta)
    preferred = chosen_logps / batch.chosen_tokens > rejected_logps / batch.rejected_tokens
    columns = [
        losses + aux_losses,
        losses,
        aux_losses,
        chosen_rewards,
        rejected_rewards,
        chosen_rewards - rejected_rewards,
        chosen_rewards > rejected_rewards,
        chosen_rewards == rejected_rewards,
        chosen_logps,
        rejected_logps,
        preferred,
    ]
    sums = empty_sums(losses.device)
    sums[:_PAIRS] = torch.stack([column.double() for column in columns]).sum(dim=1)
    sums[_PAIRS] = len(batch)
    sums[_TOKENS] = batch.num_tokens
    return sums


def metrics_of(sums: list[float], prefix: str = "") -> dict[str, float]:
    """Means over pairs under their public names."""
    return {prefix + name: value / sums[_PAIRS] for name, value in zip(PAIR_METRICS, sums, strict=False)}


def tokens_of(sums: list[float]) -> float:
    """Real input tokens behind the sums."""
    return sums[_TOKENS]


def peak_memory_gib(accelerator: Accelerator) -> float:
    """The largest memory that any rank used so far, GiB: allocated on its device, or resident on the host."""
    if accelerator.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(accelerator.device) / 2**30
    else:
        own = _peak_resident_kib() / 2**20
    return float(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())


def _peak_resident_kib() -> int:
    """The process's peak resident memory, KiB.

    Linux's own figure of the running program: `getrusage` counts in what the process was before it became this
    program, which is as large as whatever started it.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))):
        return int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class MetricsFile:
    """metrics.jsonl of a run: appended a line at a time, cut back to a checkpoint's step on resume."""

    def __init__(self, path: Path, last_step: int | None):
        """Open for appending; keep the lines up to `last_step`, or none when there is nothing to resume."""
        self.path = path
        kept = [] if last_step is None else [line for line in self.lines() if line["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_dump(line) for line in kept), "utf-8")
        os.replace(temporary, path)

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line; a last one that a crash cut short is left out."""
        if not self.path.exists():
            return []
        complete = self.path.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in complete if line.endswith("\n")]

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_dump(line))

    def sync(self) -> None:
        """Make what is written survive a power cut."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
