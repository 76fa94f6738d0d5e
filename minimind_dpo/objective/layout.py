"""How pairs are laid out for a model: packed where a numeric probe says that it computes the same, else plain.

The probe runs under the run's own precision. Two made-up pairs are scored by the model's own forward pass in the plain
layout, and whatever is faster is used only where it gives the same: the head on its own (`fast/head.py`; a model may
scale or cap its logits afterwards), and the packed layout (recurrent or state-space layers, or an attention of the
model's own, cannot do it).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minimind_dpo.data.batch import PairBatch, pack_pairs, pad_pairs
from minimind_dpo.engine.devices import summable
from minimind_dpo.errors import UserError
from minimind_dpo.models.fast import (
    attention,
    attention_blocks,
    attention_cpu,
    attention_gpu,
    fusing,
    head,
    nodes,
    nodes_gpu,
    patch,
    products,
)
from minimind_dpo.models.probe import embedding_rows
from minimind_dpo.objective.scoring import PairScorer

logger = logging.getLogger(__name__)

Autocast = Callable[[], AbstractContextManager[Any]]
Agree = Callable[[Any], Any]
Collate = Callable[[Sequence[dict[str, Any]]], PairBatch]


@dataclass(frozen=True, slots=True)
class PairLayout:
    """A way to lay out pairs; called with tokenised rows it gives their batch.

    Attributes:
        id: its name in the paths of caches.
        function: of `data/batch.py`.
    """

    id: str
    function: Collate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> PairBatch:
        """The batch of `rows`."""
        return self.function(rows)


PACKED, PLAIN = PairLayout("packed", pack_pairs), PairLayout("plain", pad_pairs)

# Log-probabilities a token (nats) may differ by this much at most, and on average, where products are rounded to half
# precision. Rounding alone gives at most 0.21 on trained models; a model that reads packed rows as something else is
# off by 4.4 and more, on average by 0.5 and more.
_HALF_LARGEST, _HALF_MEAN = 1.0, 0.25
_FP32_WITHIN = 1e-3  # relative and absolute

# What a model raises that was handed inputs, or an attention, which it knows nothing of.
_REFUSALS = (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError, AttributeError)
_OWN = (attention, attention_blocks, attention_cpu, attention_gpu, fusing, head, nodes, nodes_gpu, patch, products)
_KERNELS = {module.__file__ for module in _OWN}
_TORCH = str(Path(torch.__file__).parent)


@torch.no_grad()
def choose_layout(
    scorer: PairScorer,
    attn_implementation: str,
    device: torch.device,
    autocast: Autocast = nullcontext,
    agree: Agree = lambda answer: answer,
) -> PairLayout:
    """Decide between the packed and the plain layout, and whether the head can be fused. Collective.

    The latter is kept on `scorer`; the model stays as it is.

    Args:
        scorer: of the policy; of a sharded one every rank must call this.
        attn_implementation: `pairs` asks for the packed layout.
        device: that batches go to.
        autocast: the precision of the run's forward passes.
        agree: of every rank's answer the main process's, on all ranks.

    Raises:
        torch.OutOfMemoryError, RuntimeError: memory ran out, or one of our own kernels failed.
    """
    with _probing(scorer, autocast):
        expected = _probe_head(scorer, device, agree)
        if attn_implementation != "pairs":
            return PLAIN
        problem = "its rotary frequencies depend on the length of a row" if scorer.needs_rows else None
        problem = problem or agree(_problem(scorer, PACKED, expected))
    if problem is None:
        return PACKED
    logger.warning(
        "%s cannot attend over packed pairs (%s): each side gets a padded row of its own",
        type(scorer.model).__name__,
        problem,
    )
    return PLAIN


@torch.no_grad()
def adopt_layout(
    scorer: PairScorer,
    policy: PairScorer,
    layout: PairLayout,
    device: torch.device,
    autocast: Autocast = nullcontext,
    agree: Agree = lambda answer: answer,
    *,
    named: bool,
) -> None:
    """Have a reference score batches of the policy's layout. Collective.

    Args:
        scorer: of the reference.
        policy: for which `layout` was chosen.
        layout: of all batches.
        device: that batches go to.
        autocast: the precision of the run's forward passes.
        agree: of every rank's answer the main process's, on all ranks.
        named: the reference is another model than the policy's start, so what is true of one need not be of the other.

    Raises:
        UserError: it is, and it cannot.
    """
    if not named:
        scorer.fused_head = policy.fused_head
        return
    with _probing(scorer, autocast):
        expected = _probe_head(scorer, device, agree)
        problem = "its rotary frequencies depend on the length of a row" if scorer.needs_rows else None
        problem = (problem or agree(_problem(scorer, PACKED, expected))) if layout is PACKED else None
    if problem is not None:
        raise UserError(
            f"ref_model_name_or_path: {type(scorer.model).__name__} cannot attend over packed pairs as the "
            f"policy does ({problem}); set attn_implementation: sdpa"
        )


@contextmanager
def _probing(scorer: PairScorer, autocast: Autocast) -> Iterator[None]:
    training = scorer.training
    scorer.eval()
    try:
        with autocast():
            yield
    finally:
        scorer.train(training)


def _probe_head(scorer: PairScorer, device: torch.device, agree: Agree) -> Tensor:
    """Decide whether the head can be fused; the probe pairs' log-probabilities [M] by the model's own head."""
    scorer.fused_head = False
    expected = _probe(scorer, PLAIN, device)
    scorer.fused_head = True
    scorer.fused_head = agree(_problem(scorer, PLAIN, expected)) is None
    return expected


def _problem(scorer: PairScorer, layout: PairLayout, expected: Tensor) -> str | None:
    """Why the probe pairs in `layout` do not score as `expected`, or None."""
    try:
        scores = _probe(scorer, layout, expected.device)
    except _REFUSALS as error:
        if _is_fault(error):
            raise
        return _reason(error)
    return difference(scores, expected, half=_computes_in_half(scorer.model, expected.device))


def difference(scores: Tensor, expected: Tensor, half: bool) -> str | None:
    """What is too different between log-probabilities [M] of the same tokens, with figures; None if nothing is.

    Args:
        scores: in nats.
        expected: the same by another computation.
        half: whether products were rounded to half precision.
    """
    distance = (summable(scores) - summable(expected)).abs()
    largest, mean = float(distance.max()), float(distance.mean())
    if half:
        agrees = largest <= _HALF_LARGEST and mean <= _HALF_MEAN
    else:
        agrees = torch.allclose(scores, expected, rtol=_FP32_WITHIN, atol=_FP32_WITHIN)
    return None if agrees else f"log-probabilities differ by up to {largest:.2g} nats a token, {mean:.2g} on average"


def _computes_in_half(model: PreTrainedModel, device: torch.device) -> bool:
    return model.dtype != torch.float32 or torch.is_autocast_enabled(device.type)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says so; what torch raises on a CPU is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _is_fault(error: Exception) -> bool:
    """Whether an error is no refusal: memory or the machine gave out, or one of our own kernels did."""
    if ran_out_of_memory(error) or isinstance(error, (torch.AcceleratorError, torch.distributed.DistError)):
        return True
    if isinstance(error, NotImplementedError):  # a kernel's own word for what it has no form for
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return next((file for file in reversed(files) if not file.startswith(_TORCH)), "") in _KERNELS


def _probe(scorer: PairScorer, layout: PairLayout, device: torch.device) -> Tensor:
    """Log-probabilities [M] of two small made-up pairs."""
    vocabulary = embedding_rows(scorer.model)
    tokens = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(24)]
    rows = [_row(tokens[:6], tokens[6:10], tokens[10:15]), _row(tokens[15:18], tokens[18:21], tokens[21:])]
    return scorer(layout(rows).to(device)).per_token_logps


def _row(prefix: list[int], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, rest in (("chosen", chosen), ("rejected", rejected)):
        row[f"{name}_input_ids"] = prefix + rest
        row[f"{name}_completion_mask"] = [0] * len(prefix) + [1] * len(rest)
    return row
