"""Log-probabilities of given tokens from hidden states, without keeping what a vocabulary's logits would take.

The largest tensors of a DPO step are logits: 4,000 counted tokens x 151,936 words x 4 bytes are 2.3 GiB, and autograd
keeps several of that size. Here at most `MOST_LOGITS` of them exist at a time; in the backward pass a slice's logits
are computed again (a third more work for the head, none elsewhere). If all of them fit into one slice, their softmax is
kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_dpo.models.fast.precision import autocast
from minimind_dpo.models.fast.products import TORCH, Multiply, add_product, multiply_of

MOST_LOGITS = 1 << 25  # 128 MiB of fp32 logits


class _TokenLogps(torch.autograd.Function):
    """log softmax(h W^T) at the targets: logits[target] - logsumexp(logits), row by row."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, multiply: Multiply, squares: bool
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, MOST_LOGITS // len(weight))
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        logsumexp, probabilities = torch.empty_like(logps), None
        log_squares = torch.empty_like(logps) if squares else logps.new_empty(0)
        for first in range(0, len(hidden), rows):
            own = slice(first, first + rows)
            logits = _logits(hidden[own], weight, multiply)
            logps[own] = logits.gather(1, targets[own, None])[:, 0]
            largest = logits.amax(dim=-1, keepdim=True)
            numerators = logits.sub_(largest).exp_()
            total = numerators.sum(dim=-1, keepdim=True)
            logsumexp[own] = (largest + total.log())[:, 0]
            if squares:
                log_squares[own] = 2 * (torch.linalg.vector_norm(numerators, dim=-1) / total[:, 0]).log()
            if len(hidden) <= rows:
                probabilities = numerators.div_(total)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, probabilities)
        ctx.rows, ctx.multiply = rows, multiply
        ctx.mark_non_differentiable(log_squares)
        return logps.sub_(logsumexp), log_squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, logsumexp, kept = ctx.saved_tensors
        multiply = ctx.multiply
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for first in range(0, len(hidden), ctx.rows):
            own = slice(first, first + ctx.rows)
            probabilities = kept
            if probabilities is None:
                probabilities = _logits(hidden[own], weight, multiply).sub_(logsumexp[own, None]).exp_()
            grad_logits = probabilities.mul_(-grad[own, None])
            grad_logits.scatter_add_(1, targets[own, None], grad[own, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[own] = multiply(grad_logits, weight.to(hidden.dtype).t())
            if ctx.needs_input_grad[1]:
                if grad_weight is None:
                    grad_weight = multiply(grad_logits.t(), hidden[own].t()).float()  # slices add up in fp32
                elif hidden.dtype == torch.float32:
                    add_product(grad_weight, grad_logits.t(), hidden[own].t(), multiply)
                else:
                    grad_weight += grad_logits.t() @ hidden[own]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
    """h W^T [K, V] in fp32, of half-precision factors too.

    Logits rounded to bf16 put 0.16 nats (rms) into the sum of 100 log-probabilities.
    """
    if hidden.dtype == torch.float32:
        return multiply(hidden, weight.to(hidden.dtype))
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return multiply(hidden.float(), weight.float())  # no other device has a product of that kind


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, library: str = TORCH) -> Tensor:
    """Log-probabilities (nats, fp32) [K] of `targets` [K] from hidden states [K, D] and a head's weight [V, D].

    `library` makes the products that are fp32 on a CPU.
    """
    return _token_logps(hidden, weight, targets, library, squares=False)[0]


def token_logps_and_squares(
    hidden: Tensor, weight: Tensor, targets: Tensor, library: str = TORCH
) -> tuple[Tensor, Tensor]:
    """As `token_logps`, and beside them log sum_v p(v)^2 [K] over the vocabulary, without gradient."""
    return _token_logps(hidden, weight, targets, library, squares=True)


def _token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, library: str, squares: bool) -> tuple[Tensor, Tensor]:
    hidden, weight = autocast(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden, weight, targets, multiply_of(library, hidden, weight), squares)
