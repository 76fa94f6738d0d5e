"""Seconds of a step at 26M, 135M and 0.6B, of what it could be; and what packing, sharing and kernels give apart.

Four contestants train on the same pairs with a live reference, bf16 products, AdamW: transformers' own modules over
padded rows; ours over padded rows (what differs are kernels); ours packed without sharing prefixes (packing); ours as
it is (sharing). Effective rates are 8 x parameters x real tokens / seconds: without padding, a shared prefix once.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu_check.demo import LN2
from benchmarks.gpu_check.notes import Notes, Place
from benchmarks.gpu_check.shapes import SHAPES, TIMED, WARM_UP, make_job
from benchmarks.gpu_check.timing import rounded, wait
from benchmarks.padded import naive_losses
from benchmarks.peers import built
from benchmarks.workloads import Job, PairLengths, padded_batch, parameter_counts, read_rows
from minimind_dpo.data.batch import PairBatch, pack_pairs, pad_pairs
from minimind_dpo.objective.sums import read_totals
from minimind_dpo.training.batches import LoadedStep
from minimind_dpo.training.step import optimizer_step

Step = Callable[[], Any]
LAYOUTS: dict[str, Callable[[Sequence[dict[str, Any]]], PairBatch]] = {
    "ours": pack_pairs,
    "ours, unshared": lambda rows: unshared(rows),
    "ours, padded": pad_pairs,
}
FACTORS = {
    "sharing": ("ours, unshared", "ours"),
    "packing": ("ours, padded", "ours, unshared"),
    "kernels": ("transformers, padded", "ours, padded"),
    "all": ("transformers, padded", "ours"),
}
APART = 0.02  # relative, of mean log-probabilities in bf16


def run(notes: Notes, place: Place) -> None:
    """A row of figures a contestant, and the factors between them, a shape at a time."""
    ceiling = place.found("machine").get("bf16 TFLOP/s")
    for shape in ["tiny"] if place.rehearses else SHAPES:
        job, lengths = make_job(shape, place)
        work = 8 * parameter_counts(job.model)[0] * sum(pair.packed for pair in lengths[WARM_UP * job.batch :])
        seconds: dict[str, float] = {}
        for group in (_ours, _theirs):  # one after the other: each has models of its own
            for name, steps in group(notes, job, lengths):
                try:
                    figures = _measure(steps, place.device)
                except torch.OutOfMemoryError:
                    notes.skip(f"{shape}, {name}", "out of memory")
                    continue
                finally:
                    steps.clear()  # with what they hold
                seconds[name] = figures.pop("seconds")
                figures["ms a pair"] = rounded(1e3 * seconds[name] / job.batch / TIMED)
                figures["effective TFLOP/s"] = rounded(work / seconds[name] / 1e12)
                figures["of the ceiling"] = ceiling and rounded(figures["effective TFLOP/s"] / ceiling)
                notes.figure(f"{shape}, {name}", figures)
        there = {name: pair for name, pair in FACTORS.items() if seconds.keys() >= set(pair)}
        factors = {name: rounded(seconds[slow] / seconds[fast]) for name, (slow, fast) in there.items()}
        notes.figure(f"{shape}, times as fast by", factors)


def unshared(rows: Sequence[dict[str, Any]]) -> PairBatch:
    """The packed layout with every prompt computed for both sides."""
    with mock.patch("minimind_dpo.data.batch.shared_prefix_length", lambda *_: 0):
        return pack_pairs(rows)


def _measure(steps: list[Step], device: str) -> dict[str, Any]:
    """Seconds of the steps after the first few, the GPU's peak, and the launches of one more step."""
    if device == "cuda":
        gc.collect()  # what an earlier contestant held
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in steps[:WARM_UP]:
        step()
    wait(device)
    began = time.perf_counter()
    for step in steps[WARM_UP:]:
        step()
    wait(device)
    figures: dict[str, Any] = {"seconds": time.perf_counter() - began, "launches": _launches(steps[-1], device)}
    if device == "cuda":
        figures["peak GiB"] = rounded(torch.cuda.max_memory_allocated() / 2**30)
    return figures


def _launches(step: Step, device: str) -> int:
    """Kernels that a step starts on the GPU; operations where there is none."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if device == "cuda" else kinds.CPU]) as profile:
        step()
        wait(device)
    events = [event for event in profile.events() if not event.name.startswith(("Memcpy", "Memset"))]
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    return sum(event.device_type == wanted for event in events)


def _ours(notes: Notes, job: Job, lengths: list[PairLengths]) -> Iterator[tuple[str, list[Step]]]:
    """The product's optimizer step over the same plans in each layout, batches laid out beforehand."""
    training = built("ours_live", job)
    training.scorer.train()
    plans = list(training.plans())
    logps = {}
    for name, layout in LAYOUTS.items():
        loaded = []
        for plan in plans:
            rows = [training.train_data.dataset[int(pair)] for pair in plan.micro_batches[0].pairs]
            batch = layout(rows)
            loaded.append((plan, batch.pin_memory() if job.device == "cuda" else batch))

        def step(plan: Any, batch: PairBatch) -> Any:
            return optimizer_step(training, LoadedStep(plan, iter([batch])), 0.0)

        means = read_totals(step(*loaded[0]).sums).means()
        logps[name] = means["logps/chosen"]
        notes.close(f"{job.scratch.rpartition('/')[2]}, {name}: loss", means["loss"], LN2, 1e-3)
        yield name, [lambda pair=pair, step=step: step(*pair) for pair in loaded]
    apart = max(abs(value / logps["ours"] - 1) for value in logps.values())
    notes.check("layouts score alike", apart <= APART, f"{apart:.1e} apart in logps/chosen")


def _theirs(notes: Notes, job: Job, lengths: list[PairLengths]) -> Iterator[tuple[str, list[Step]]]:
    """transformers' own forward pass over both sides of the pairs, padded to the longest, logits at every position."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32) for _ in range(2))
    policy.to(job.device).train()
    reference.to(job.device).requires_grad_(False)
    optimizer = AdamW(policy.parameters(), lr=0.0, fused=True)
    rows, tokenizer = read_rows(job.pairs), AutoTokenizer.from_pretrained(job.tokenizer)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.bf16):
            losses = naive_losses(policy, reference, batch, "sigmoid", job.beta)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps: list[Step] = []
    for start in range(0, len(rows), job.batch):
        own = slice(start, start + job.batch)
        padded = padded_batch(rows[own], tokenizer, max(pair.longest for pair in lengths[own]))
        batch = {part: values.to(job.device) for part, values in padded.items()}
        steps.append(lambda batch=batch: step(batch))
    yield "transformers, padded", steps
