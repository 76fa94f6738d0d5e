"""What a model answers: greedy replies to single questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.models.loading import load_model


def speak(model_path: str, tokenizer_path: str, prompts: list[str]) -> list[str]:
    """The greedy replies of a stored model to the prompts."""
    return generate_replies(load_model(model_path), load_tokenizer(tokenizer_path), prompts)


@torch.no_grad()
def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> list[str]:
    """Greedy replies, one a prompt. Only prompts of equal token length share a batch, so nothing is padded."""
    was_training = model.training
    model.eval()
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    replies = [""] * len(prompts)
    for length in sorted({len(ids) for ids in encoded}):
        for indices in _chunks([i for i, ids in enumerate(encoded) if len(ids) == length], batch_size):
            output: Any = model.generate(  # type: ignore[operator]
                torch.tensor([encoded[i] for i in indices]),
                attention_mask=torch.ones(len(indices), length, dtype=torch.long),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            for index, row in zip(indices, output, strict=True):
                replies[index] = str(tokenizer.decode(row[length:], skip_special_tokens=True)).strip()
    model.train(was_training)
    return replies


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    message = [{"role": "user", "content": prompt}]
    text: Any = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
