"""The contestants: each trains on the same pairs from the same weights, and tells a gate of every optimizer step.

    ours_cached   the product's own loop, reference log-probabilities read from a cache filled beforehand
    ours_fill     the product's pass that fills that cache, for the same pairs (a step is a step's pairs)
    ours_live     the product's own loop, the reference scored beside the policy
    trl...        TRL's DPOTrainer. `_mb1`: micro-batches of one pair (any number) instead of the benchmark's;
                  `_grouped`: pairs of a window ordered by length, as its `group_by_length` would; `_workers`: batches
                  collated in a process beside; `_live`: the reference scored beside instead of beforehand
    naive         both sides padded to max_length, two models, logits of every position
    minimind      a MiniMind checkout's own `train_epoch`, models and loss

fp32 on the CPU, with `_bf16` in a name of ours or TRL's bf16 autocast over fp32 weights (TRL also on a GPU). AdamW,
constant learning rate, no weight decay where it can be set, gradients clipped at norm 1.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.padded import minimind, naive
from benchmarks.workers import Gate
from benchmarks.workloads import Job, read_rows

SLOW = ("naive", "minimind")  # so slow, and of the same cost for any pairs, that a round has only one step of them


def import_stack(name: str) -> None:
    """Import all that contestant `name` needs, so that what it holds afterwards is its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    if name.startswith("ours"):
        import minimind_dpo.train  # noqa: F401
    if name.startswith("trl"):
        import datasets  # noqa: F401
        import trl.trainer.dpo_trainer  # noqa: F401


def contest(name: str, job: Job, gate: Gate) -> None:
    """Train as contestant `name` until the gate ends the process."""
    os.environ["MINIMIND_DPO_CACHE"] = str(Path(job.scratch) / "cache")
    torch.set_num_threads(job.threads)
    job = replace(job, bf16=job.bf16 or "_bf16" in name)
    kind = name.split("_")[0]
    {"ours": ours, "trl": trl, "naive": naive, "minimind": minimind}[kind](name, job, gate)


def ours(name: str, job: Job, gate: Gate) -> None:
    """The product: a run put together and trained by its own entry points, with a gate in place of metrics.jsonl."""
    from minimind_dpo.training.loop import train
    from minimind_dpo.training.run_log import RunLog

    run = built(name, job)
    with run.stop:
        if "_fill" in name:
            _fill(run, gate)
        else:
            train(run, RunLog(_MetricsGate(gate)))  # type: ignore[arg-type]


def built(name: str, job: Job) -> Any:
    """The product's run of a contestant, before its first step."""
    if job.bf16:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from minimind_dpo.config import make_config
    from minimind_dpo.ending import StopRequest
    from minimind_dpo.engine.launcher import start_engine
    from minimind_dpo.training.setup import build_run

    config = make_config(
        {
            "model_name_or_path": job.model,
            "tokenizer_name_or_path": job.tokenizer,
            "train_data": [job.pairs],
            "output_dir": str(Path(job.scratch) / name),
            "max_length": job.max_length,
            "max_steps": job.steps,
            "per_device_train_batch_size": job.micro_batch,
            "gradient_accumulation_steps": job.batch // job.micro_batch,
            "reference": "live" if "_live" in name else "cache",
            "loss_type": job.loss_type,
            "beta": job.beta,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0,
            "shuffle": False,
            "logging_steps": 1,
            "save_steps": 0,
        }
    )
    return build_run(config, start_engine(config), None, StopRequest())


class _MetricsGate:
    """In place of a run's metrics file: gets a line a step."""

    def __init__(self, gate: Gate):
        self.gate = gate

    def append(self, line: dict[str, float]) -> None:
        if "loss" in line:
            self.gate.step(line["loss"])

    def sync(self) -> None:
        pass


def _fill(run: Any, gate: Gate) -> None:
    """Fill an empty cache with the pairs of each window's steps."""
    from minimind_dpo.reference.cache import Needed
    from minimind_dpo.reference.choosing import LoadedReference, make_reference

    step = 0
    while True:
        steps = range(step + 1, step + 1 + gate.wanted)
        positions = sorted(int(pair) for number in steps for pair in run.order.step_pairs(number))
        with tempfile.TemporaryDirectory() as cache:
            os.environ["MINIMIND_DPO_CACHE"] = cache
            make_reference(
                run.config,
                run.engine,
                LoadedReference("cache", None, "filled anew"),
                run.scorer,
                run.layout,
                [Needed(run.train_data, positions)],
                lambda: False,
            )
        step = steps[-1]
        for _ in steps:
            gate.step(math.nan)


def trl(name: str, job: Job, gate: Gate) -> None:
    """TRL's DPOTrainer, its settings after its name (see above)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    found = re.search(r"_mb(\d+)", name)
    micro_batch = int(found[1]) if found else job.micro_batch
    rows = read_rows(job.pairs)
    args = DPOConfig(
        output_dir=str(Path(job.scratch) / name),
        use_cpu=job.device == "cpu",
        bf16=job.bf16,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=job.batch // micro_batch,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        loss_type=[job.loss_type],
        beta=job.beta,
        max_length=job.max_length,
        precompute_ref_log_probs="_live" not in name,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1 if "_workers" in name else 0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(_grouped(rows, job) if "_grouped" in name else rows),
        processing_class=AutoTokenizer.from_pretrained(job.tokenizer),
    )
    losses: list[Tensor] = []
    compute_loss = trainer.compute_loss

    def noting_loss(*inputs: Any, **options: Any) -> Any:
        loss = compute_loss(*inputs, **options)
        losses.append(loss.detach())
        return loss

    class StepEnd(TrainerCallback):
        def on_step_end(self, *state: Any, **options: Any) -> None:
            gate.step(float(torch.stack(losses).mean()))
            losses.clear()

    trainer.compute_loss = noting_loss
    trainer.add_callback(StepEnd())
    trainer.train()


def _grouped(rows: list[dict[str, str]], job: Job) -> list[dict[str, str]]:
    """The rows of each window from long to short."""
    ordered: list[dict[str, str]] = []
    for steps in job.windows:
        window = rows[len(ordered) : len(ordered) + steps * job.batch]
        ordered += sorted(
            window,
            reverse=True,
            key=lambda row: len(row["prompt"].split()) + max(len(row["chosen"].split()), len(row["rejected"].split())),
        )
    return ordered
