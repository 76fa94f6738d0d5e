"""Whether a model that was written computes what it was written of, told by a few fixed tokens.

What was written is read back from its files as anyone will read it. That is affordable for models of any size: their
weights are mapped into memory, not copied, where they are stored in the type that they are loaded in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minimind_dpo.engine.sharding import undivided
from minimind_dpo.errors import TrainingError
from minimind_dpo.models.loading import load_model

_TOKENS = 16
_HALVES = (torch.float16, torch.bfloat16)
# Log-probabilities (nats) may differ by this, absolute and relative, where products are exact to fp32: on a CPU only
# sums in another order differ (2e-6 for 24 layers), a GPU may multiply with fewer bits.
_CPU_WITHIN, _GPU_WITHIN = 1e-5, 1e-3
_HALF_LARGEST, _HALF_MEAN = 1.0, 0.25  # as in `objective/layout.py`, where products are rounded to half precision


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that a model knows."""
    embeddings: Any = model.get_input_embeddings()
    return int(getattr(embeddings, "base_layer", embeddings).num_embeddings)


class Probe(NamedTuple):
    """What a model says of a few fixed tokens.

    Attributes:
        logps: [2, 15] log-probabilities (nats) of the tokens of two rows, fp32 on the CPU.
        half: products were rounded to half precision.
        device: type of the device that it was computed on.
    """

    logps: Tensor
    half: bool
    device: str


@torch.no_grad()
def probe(model: PreTrainedModel) -> Probe:
    """Ask a model, in eval mode, under the caller's precision; if it is sharded, every rank must call this."""
    training, device = model.training, model.device
    rows = embedding_rows(model)
    row = [(7 * i * i + 3 * i + 1) % rows for i in range(2 * _TOKENS)]
    ids = torch.tensor(row, device=device).view(2, _TOKENS)
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    half = torch.is_autocast_enabled(device.type) or any(weight.dtype in _HALVES for weight in model.parameters())
    return Probe(logps.cpu(), half, device.type)


def check_written(path: Path, expected: Probe, **options: Any) -> None:
    """Read a model that was written and ask it the same.

    Args:
        path: of the model.
        expected: of what it was written of.
        **options: of `load_model`.

    Raises:
        TrainingError: it says something else.
    """
    with undivided():
        written = load_model(path, **options)
    if problem := difference(probe(written).logps, expected):
        raise TrainingError(
            f"{path.name}: what was written does not compute what it was written of ({problem}); it is not kept. "
            "Checkpoints, and with LoRA adapter/, hold what was trained. Please report this."
        )


def difference(logps: Tensor, expected: Probe) -> str | None:
    """What is too different between log-probabilities and those expected, with figures; None if nothing is."""
    distance = (logps.double() - expected.logps.double()).abs()  # both on the CPU
    largest, mean = float(distance.max()), float(distance.mean())
    if expected.half:
        agrees = largest <= _HALF_LARGEST and mean <= _HALF_MEAN
    else:
        within = _CPU_WITHIN if expected.device == "cpu" else _GPU_WITHIN
        agrees = torch.allclose(logps, expected.logps, rtol=within, atol=within)
    return None if agrees else f"log-probabilities differ by up to {largest:.2g} nats a token, {mean:.2g} on average"
