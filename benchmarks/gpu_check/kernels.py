"""Packed attention against a dense one in fp64, forwards and backwards: head sizes, grouped heads, windows, lengths."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu_check.machine import DTYPES
from benchmarks.gpu_check.notes import Notes, Place
from benchmarks.gpu_check.shapes import TINY
from minimind_dpo.data.batch import PairBatch, pack_pairs
from minimind_dpo.models.fast.attention import pair_attention
from minimind_dpo.models.fast.patch import PAIR_ATTENTION
from minimind_dpo.objective.scoring import PairScorer

# prefix, chosen and rejected input tokens: nothing shared, one token, around the sizes of blocks
LENGTHS = ((0, 1, 1), (1, 1, 2), (127, 1, 129), (128, 64, 65), (63, 65, 1), (1, 130, 31))
HEAD_SIZES = (24, 32, 64, 80, 96, 128, 160, 192, 256)
HEADS = ((8, 8), (8, 2), (9, 3))
WINDOWS = (None, 2, 16, 200)
# the error of torch's own attention in the same type on the same device, which may compute in fp32 inside where flash
# attention rounds probabilities
TIMES = 5.0
FLOOR = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-4}


def run(notes: Notes, place: Place) -> None:
    """A check a type and head size, of the worst over heads and windows."""
    names, sizes, heads = list(DTYPES), HEAD_SIZES, HEADS
    if place.rehearses:
        names, sizes, heads = ["fp32", "bf16"], (24, 64), ((4, 2),)
    batch = pack_pairs([_row(*lengths) for lengths in LENGTHS]).to(place.device)
    told = _told(batch)
    if place.device == "cuda":
        notes.figure("kernels of bf16", _kernels_of(batch, told))
    for name, size in itertools.product(names, sizes):
        worst, at = 0.0, ""
        for (queries, keys), window in itertools.product(heads, WINDOWS):
            states = _states(batch, queries, keys, size)
            for part, share in _compare(states, batch, told | {"sliding_window": window}, name).items():
                if share > worst or share != share:
                    worst, at = share, f"{part}, {queries} heads over {keys}, window {window}"
        notes.check(
            f"{name}, head size {size}", worst <= TIMES, f"{worst:.2f} times the error of torch's attention ({at})"
        )


def _row(prefix: int, chosen: int, rejected: int) -> dict[str, Any]:
    """A tokenised pair with so many input tokens."""
    row: dict[str, Any] = {}
    for name, count, token in (("chosen", chosen, 5), ("rejected", rejected, 6)):
        row[f"{name}_input_ids"] = [4] * prefix + [token] * (count + 1)
        row[f"{name}_completion_mask"] = [0] * prefix + [1] * (count + 1)
    return row


def _told(batch: PairBatch) -> dict[str, Any]:
    """What a scored model hands to packed attention beside its states."""
    seen: dict[str, Any] = {}

    def noting(*states: Any, **told: Any) -> Any:
        seen.update(told)
        return pair_attention(*states, **told)

    ALL_ATTENTION_FUNCTIONS[PAIR_ATTENTION] = noting
    try:
        PairScorer(LlamaForCausalLM(TINY).to(batch.input_ids.device))(batch)
    finally:
        del ALL_ATTENTION_FUNCTIONS[PAIR_ATTENTION]
    return seen | {"scaling": None}


def _states(batch: PairBatch, queries: int, keys: int, size: int) -> list[Tensor]:
    """Queries, keys, values, and what the output is multiplied by, fp64, on bf16's grid so that no type rounds them."""
    torch.manual_seed(size)
    row, device = batch.input_ids.shape[1], batch.input_ids.device
    shapes = [(1, heads, row, size) for heads in (queries, keys, keys)] + [(1, row, queries, size)]
    return [torch.randn(shape, device=device).bfloat16().double() for shape in shapes]


def _compare(states: list[Tensor], batch: PairBatch, told: dict[str, Any], name: str) -> dict[str, float]:
    """The error of packed attention over that of torch's, of the output and of each gradient."""
    module, visible = nn.Module(), _visible(batch, told["sliding_window"])
    exact = _outcome(_dense(visible), states, torch.float64)
    theirs = _outcome(_dense(visible), states, DTYPES[name])
    ours = _outcome(lambda *leaves: pair_attention(module, *leaves, None, **told)[0], states, DTYPES[name])
    errors = {}
    for part, right, own, other in zip(("output", "queries", "keys", "values"), exact, ours, theirs, strict=True):
        distances = [float((found.double() - right).norm() / right.norm()) for found in (own, other)]
        errors[part] = distances[0] / max(distances[1], FLOOR[name])
    return errors


def _outcome(attend: Any, states: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output [1, T, heads, size] and the gradients of queries, keys and values."""
    leaves = [state.to(dtype, copy=True).requires_grad_() for state in states[:3]]
    output = attend(*leaves)
    (output * states[3].to(dtype)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def _dense(visible: Tensor) -> Any:
    """torch's attention over the whole row with a mask [T, T]."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=grouped)
        return output.transpose(1, 2)

    return attend


def _visible(batch: PairBatch, window: int | None) -> Tensor:
    """[T, T] which keys a query sees, by the definition: its own branch and its pair's prefix, up to itself."""
    row, place = batch.input_ids.shape[1], batch.position_ids[0].cpu()
    pair, branch = (torch.zeros(row, dtype=torch.long) for _ in range(2))
    start = 0
    for number, (prefix, chosen, rejected) in enumerate(LENGTHS):
        pair[start : start + prefix + chosen + rejected] = number
        branch[start + prefix : start + prefix + chosen] = 1
        branch[start + prefix + chosen : start + prefix + chosen + rejected] = 2
        start += prefix + chosen + rejected
    distance = place[:, None] - place[None]
    related = (pair[:, None] == pair[None]) & ((branch[None] == 0) | (branch[:, None] == branch[None]))
    seen = related & (distance >= 0) & (distance < (row if window is None else window))
    return seen.to(batch.input_ids.device)


def _kernels_of(batch: PairBatch, told: dict[str, Any]) -> list[str]:
    """The names of the GPU's kernels in one call in bf16, forwards and backwards."""
    leaves = [state.bfloat16().requires_grad_() for state in _states(batch, 8, 2, 64)[:3]]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pair_attention(nn.Module(), *leaves, None, **told)[0].float().sum().backward()
        torch.cuda.synchronize()
    return sorted({event.name for event in profile.events() if event.device_type == DeviceType.CUDA})
