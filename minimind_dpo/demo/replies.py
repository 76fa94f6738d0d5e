"""What a model answers: greedy replies to single questions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.models.generation import Manner, answer, equal_lengths
from minimind_dpo.models.loading import load_model


def speak(model_path: str, tokenizer_path: str, prompts: list[str]) -> list[str]:
    """The greedy replies of a stored model to the prompts."""
    return generate_replies(load_model(model_path), load_tokenizer(tokenizer_path), prompts)


def generate_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int = 32
) -> list[str]:
    """Greedy replies, one a prompt."""
    was_training = model.training
    model.eval()
    manner = Manner([tokenizer.eos_token_id], max_new_tokens)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    replies = [""] * len(prompts)
    for batch in equal_lengths(encoded):
        answers = answer(model, torch.tensor([encoded[index] for index in batch]), manner)
        for index, ids in zip(batch, answers, strict=True):
            replies[index] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    model.train(was_training)
    return replies


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    message = [{"role": "user", "content": prompt}]
    text: Any = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)
