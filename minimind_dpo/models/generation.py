"""What a model answers: greedy or sampled replies, the same for any number of ranks.

The model is as transformers has it, unpatched, and draws from a generator of its own, so nothing of a run notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from minimind_dpo.engine.protocol import Engine

_BATCH = 64  # prompts at once, at most
_GRAM = 4


class Manner(NamedTuple):
    """How replies are made.

    Attributes:
        end_token_ids: of the tokens that end an answer.
        max_new_tokens: after which an answer is cut off.
        temperature: of sampling from the model's whole distribution; 0 takes the likeliest token.
        seed: of sampling.
    """

    end_token_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def generate(
    engine: Engine,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    manner: Manner,
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The reply to each prompt, token ids up to the end token, on every rank. Collective.

    Batches are dealt out to the ranks; what is in one, and what it is drawn with, does not depend on how many there
    are. Weights that are divided among ranks are gathered layer by layer, which takes all ranks at each token.

    Args:
        engine: of the model.
        model: in evaluation mode.
        prompts: token ids, the answer's header at their end.
        manner: how.
        check: called before each round, by all ranks; what it raises ends the work.
    """
    batches = equal_lengths(prompts)
    own: dict[int, list[int]] = {}
    # weights in fp32 are taken as they are: rounded for each product they would hide what a run has moved little
    whole = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for first in range(0, len(batches), engine.world_size):
        check()
        number = first + engine.rank
        if number >= len(batches) and not engine.gathers_weights:
            continue
        batch = batches[min(number, len(batches) - 1)]  # one that is left over keeps the others company
        ids = torch.tensor([list(prompts[index]) for index in batch], device=engine.device)
        with nullcontext() if whole else engine.autocast():
            replies = answer(model, ids, manner, number, synced=engine.gathers_weights and engine.world_size > 1)
        own |= dict(zip(batch, replies, strict=True)) if number < len(batches) else {}
    gathered = {index: reply for part in engine.gather_objects(own) for index, reply in part.items()}
    return [gathered[index] for index in range(len(prompts))]


def answer(
    model: PreTrainedModel, ids: torch.Tensor, manner: Manner, number: int = 0, synced: bool = False
) -> list[list[int]]:
    """The replies to prompts of one length [B, T], token ids up to the end token.

    Args:
        model: in evaluation mode.
        ids: of the prompts.
        manner: how.
        number: of the batch: with the seed it decides what is drawn.
        synced: other ranks generate at the same time, and need this one until all are done.
    """
    ends = manner.end_token_ids
    with _plainly(model, manner), torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(hash((manner.seed, number)))
        output: Any = model.generate(ids, attention_mask=torch.ones_like(ids), synced_gpus=synced)  # type: ignore[operator]
    replies = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        replies.append(row[: end + 1])
    return replies


def equal_lengths(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of prompts in batches of equal length, so that nothing is padded; the shortest first."""
    lengths = [len(prompt) for prompt in prompts]
    batches = []
    for length in sorted(set(lengths)):
        members = [index for index, other in enumerate(lengths) if other == length]
        batches += [members[begin : begin + _BATCH] for begin in range(0, len(members), _BATCH)]
    return batches


def repetition(reply: Sequence[int]) -> float:
    """The share of a reply's 4-grams that were there before (Welleck et al. 2020, arXiv:1908.04319, section 4)."""
    grams = [tuple(reply[begin : begin + _GRAM]) for begin in range(len(reply) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@contextmanager
def _plainly(model: PreTrainedModel, manner: Manner) -> Iterator[None]:
    """Generate as told and no otherwise: a model's own settings of generation would bend what it says."""
    drawn = {"do_sample": True, "temperature": manner.temperature, "top_k": 0} if manner.temperature > 0 else {}
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=manner.max_new_tokens,
        eos_token_id=manner.end_token_ids or None,
        pad_token_id=manner.end_token_ids[0] if manner.end_token_ids else 0,
        **drawn,
    )
    try:
        yield
    finally:
        model.generation_config = before
