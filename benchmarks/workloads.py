"""Preference pairs of known token lengths, as text that every contestant tokenises into the same tokens.

A word is a token: the tokenizer splits at spaces and knows exactly the words `w3`, `w4`, ... So a row of text has the
lengths it was made for, whoever tokenises it. The end-of-text token that closes an answer counts as part of it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_LENGTHS = Path(__file__).parent / "chat_pair_lengths.json"
FIXED_MIXES = {"long_prompt": (1000, 100, 100), "long_answer": (100, 500, 500)}  # prompt, chosen, rejected tokens
MIXES = ("chat", *FIXED_MIXES)
MAX_LENGTH = {"chat": 1024, "long_prompt": 2048, "long_answer": 1024}
JITTER = 0.1
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True, slots=True)
class PairLengths:
    """Tokens of one pair.

    Attributes:
        prompt: before the answers.
        chosen, rejected: of the answers, the end-of-text token included.
        shared: longest common prefix of the two sides, at least the prompt.
    """

    prompt: int
    chosen: int
    rejected: int
    shared: int

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def packed(self) -> int:
        """Input tokens when the common prefix is stored once and last tokens are targets only."""
        return 2 * self.prompt + self.chosen + self.rejected - self.shared - 2

    @property
    def counted(self) -> int:
        """Positions whose next token counts; those inside the common prefix once."""
        return self.chosen + self.rejected - (self.shared - self.prompt)


@dataclass(frozen=True, slots=True)
class Job:
    """What every contestant is told: paths, pairs an optimizer step and a micro-batch, steps of each window.

    `device` is for those that take it; the product asks its launcher. `bf16` is autocast over fp32 weights, which
    `_bf16` in a contestant's name asks for too.
    """

    model: str
    tokenizer: str
    pairs: str
    scratch: str
    batch: int
    micro_batch: int
    max_length: int
    windows: tuple[int, ...]
    threads: int
    loss_type: str = "sigmoid"
    beta: float = 0.1
    learning_rate: float = 1e-6
    minimind: str | None = None
    device: str = "cpu"
    bf16: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of all windows."""
        return sum(self.windows)


def mix_lengths(mix: str, count: int, seed: int = 0) -> list[PairLengths]:
    """`count` pairs of a mix: for `chat` drawn from real ones that fit MAX_LENGTH, else around the mix's lengths."""
    rng = random.Random(seed)
    if mix == "chat":
        rows = json.loads(CHAT_LENGTHS.read_text("utf-8"))["pairs"]
        return rng.sample(
            [pair for pair in (PairLengths(*row) for row in rows) if pair.longest <= MAX_LENGTH[mix]], count
        )
    lengths = []
    for _ in range(count):
        prompt, chosen, rejected = (round(size * rng.uniform(1 - JITTER, 1 + JITTER)) for size in FIXED_MIXES[mix])
        lengths.append(PairLengths(prompt, chosen, rejected, shared=prompt))
    return lengths


def text_row(lengths: PairLengths, vocab_size: int, rng: random.Random) -> dict[str, str]:
    """A row of plain text with these lengths."""

    def words(count: int) -> list[str]:
        return [f"w{rng.randrange(len(SPECIAL_TOKENS), vocab_size)}" for _ in range(count)]

    common = words(lengths.shared - lengths.prompt)
    answers = []
    for first, size in zip(
        rng.sample(range(len(SPECIAL_TOKENS), vocab_size), 2), (lengths.chosen, lengths.rejected), strict=True
    ):
        own = size - len(common) - 1  # the end-of-text token is added by whoever tokenises
        assert own > 0, lengths
        answers.append(" ".join([*common, f"w{first}", *words(own - 1)]))
    return {"prompt": " ".join(words(lengths.prompt)) + " ", "chosen": answers[0], "rejected": answers[1]}


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template that knows `vocab_size` - 3 words and three special tokens."""
    words = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(len(SPECIAL_TOKENS), vocab_size))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_shape(vocab_size: int) -> LlamaConfig:
    """A small body, so that in memory the head dominates."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def minimind_shape() -> LlamaConfig:
    """MiniMind's 26M model of generation 2."""
    return LlamaConfig(
        vocab_size=6400,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def save_model(shape: LlamaConfig, directory: Path) -> str:
    """Write a model of random weights, the same at every call; its path."""
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(directory)
    return str(directory)


def parameter_counts(model: str) -> tuple[int, int]:
    """Parameters of a saved model, tied ones once, and of its head; no weight is read."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return sum(weight.numel() for weight in empty.parameters()), empty.get_output_embeddings().weight.numel()


def write_pairs(path: Path, lengths: list[PairLengths], vocab_size: int, seed: int = 0) -> str:
    """Write the rows of pairs with these lengths, a line each; its path."""
    rng = random.Random(seed)
    path.write_text("".join(json.dumps(text_row(pair, vocab_size, rng)) + "\n" for pair in lengths), "utf-8")
    return str(path)


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of a file of pairs."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def padded_batch(rows: list[dict[str, str]], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    """B rows as MiniMind's dataset lays them out: every side padded to `max_length`.

    Returns:
        For each side [B, max_length - 1] tensors: `x_` inputs, `y_` next tokens, `mask_` 1 where `y_` counts.
    """
    batch = {}
    for side in ("chosen", "rejected"):
        ids = torch.zeros(len(rows), max_length, dtype=torch.long)
        mask = torch.zeros(len(rows), max_length, dtype=torch.long)
        for index, row in enumerate(rows):
            prompt = len(tokenizer(row["prompt"])["input_ids"])
            tokens = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"][:max_length]
            ids[index, : len(tokens)] = torch.tensor(tokens)
            mask[index, prompt : len(tokens)] = 1
        batch |= {f"x_{side}": ids[:, :-1], f"y_{side}": ids[:, 1:], f"mask_{side}": mask[:, 1:]}
    return batch
