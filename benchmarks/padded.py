"""The contestants that pad both sides of every pair to max_length: the naive step, and MiniMind's own script."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workers import Gate
from benchmarks.workloads import Job, padded_batch, read_rows


def _batches(job: Job, pairs: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches of so many pairs, in file order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    rows = read_rows(job.pairs)
    for start in range(0, len(rows), pairs):
        yield padded_batch(rows[start : start + pairs], tokenizer, job.max_length)


def naive_losses(policy: Any, reference: Any, batch: dict[str, Tensor], loss_type: str, beta: float) -> Tensor:
    """DPO losses [B] of a padded batch the plain way: full logits of both models for both sides at once.

    `sigmoid` sums log-probabilities over a side's tokens, `sigmoid_norm` takes their mean.
    """
    inputs, labels, mask = (
        torch.cat([batch[f"{part}_chosen"], batch[f"{part}_rejected"]]) for part in ("x", "y", "mask")
    )

    def side_logps(model: Any) -> Tensor:
        logps = torch.log_softmax(model(inputs).logits, dim=-1).gather(-1, labels[..., None])[..., 0]
        return (logps * mask).sum(1) / (mask.sum(1) if loss_type == "sigmoid_norm" else 1)

    with torch.no_grad():
        reference_logps = side_logps(reference)
    chosen, rejected = (side_logps(policy) - reference_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))


def naive(name: str, job: Job, gate: Gate) -> None:
    """The step that a first implementation makes."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32) for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=job.learning_rate, weight_decay=0.0)
    parts = job.batch // job.micro_batch
    total = 0.0
    for index, batch in enumerate(_batches(job, job.micro_batch), start=1):
        loss = naive_losses(policy, reference, batch, job.loss_type, job.beta).mean() / parts
        loss.backward()
        total += loss.item()
        if index % parts == 0:
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            gate.step(total)
            total = 0.0


def minimind(name: str, job: Job, gate: Gate) -> None:
    """MiniMind's own loop, fed with batches laid out as its dataset does, at a constant learning rate."""
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(job.minimind))
    import trainer.train_dpo as script
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    source = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
    )
    config = MiniMindConfig(**{key: getattr(source.config, key) for key in names}, dropout=0.0, use_moe=False)
    models = [MiniMindForCausalLM(config) for _ in range(2)]
    for model in models:
        model.load_state_dict(source.state_dict())
    policy, reference = models
    reference.eval().requires_grad_(False)
    del source
    losses: list[float] = []
    dpo_loss = script.dpo_loss

    def noting_loss(*inputs: Any, **options: Any) -> Tensor:
        loss = dpo_loss(*inputs, **options)
        losses.append(loss.item())
        return loss

    def loader() -> Iterator[dict[str, Tensor]]:
        for batch in _batches(job, job.batch):
            yield batch
            gate.step(losses.pop())  # asked for the next one, it has done with this one

    never = 2**62
    script.args = types.SimpleNamespace(  # the script's globals
        device="cpu",
        epochs=1,
        learning_rate=job.learning_rate,
        accumulation_steps=1,
        grad_clip=1.0,
        log_interval=never,
        save_interval=never,
    )
    script.model, script.autocast_ctx = policy.train(), nullcontext()
    script.optimizer = torch.optim.AdamW(policy.parameters(), lr=job.learning_rate)
    script.scaler = torch.amp.GradScaler("cpu", enabled=False)
    script.get_lr = lambda step, steps, learning_rate: learning_rate
    script.dpo_loss = noting_loss
    script.train_epoch(0, loader(), never, reference, config, 0, None, job.beta)
