"""A tiny tokenizer that carries any model's chat template, and shorthands for conversations and files."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
# name -> special tokens, beginning of text, end of text
FAMILIES = {
    "minimind2": (CHATML, "<|im_start|>", "<|im_end|>"),
    "minimind3": (CHATML, "<|im_start|>", "<|im_end|>"),
    "smollm2": (CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen3": (CHATML, None, "<|im_end|>"),
    "llama3": (LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2": (LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral_v0.2": (MISTRAL, "<s>", "</s>"),
    "mistral_v0.3": (MISTRAL, "<s>", "</s>"),
    "mistral_nemo": (MISTRAL, "<s>", "</s>"),
    "deepseek_r1_distill": (DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}
CORPUS = [
    "the quick brown fox asks the assistant a question and the user answers it",
    "system user assistant tool think question answer hello there thank you",
    '{"name": "weather", "arguments": {"city": "Paris"}} <tool_call> </tool_call>',
    "你好，世界。 Ünïcödé\n\n  two   spaces\n",
]


def tiny_tokenizer(family: str | None = "minimind2") -> Any:
    """A byte-level BPE of some hundred tokens with a family's special tokens and chat template; None: no template.

    Each call gives a copy, since tests put other templates on what they are given.
    """
    return deepcopy(_trained_tokenizer(family))


@cache
def _trained_tokenizer(family: str | None) -> Any:
    specials, bos, eos = FAMILIES[family or "minimind2"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=specials[0])
    if family is not None:
        tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


def say(*turns: str) -> list[dict[str, Any]]:
    """Messages from turns: user and assistant by turns; `system: ...` and `tool: ...` name another role."""
    messages = []
    asking = True
    for turn in turns:
        role, found, words = turn.partition(": ")
        if found and role in ("system", "tool", "user", "assistant"):
            messages.append({"role": role, "content": words})
            asking = role != "user"
        else:
            messages.append({"role": "user" if asking else "assistant", "content": turn})
            asking = not asking
    return messages


def row(*prompt: str, chosen: str = "good", rejected: str = "bad", **columns: Any) -> dict[str, Any]:
    """A row with an implicit prompt."""
    messages = say(*prompt)
    answers = ({"role": "assistant", "content": words} for words in (chosen, rejected))
    return {name: [*messages, answer] for name, answer in zip(("chosen", "rejected"), answers, strict=True)} | columns


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Writes rows, or lines that are text or bytes already, one a line."""
    lines = [item if isinstance(item, bytes | str) else json.dumps(item, ensure_ascii=False) for item in rows]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return str(path)
