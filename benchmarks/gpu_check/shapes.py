"""Models of random weights and pairs of real lengths for the stages that look at a step."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_check.notes import Place
from benchmarks.planning import SHAPES as PLANNED
from benchmarks.workloads import MAX_LENGTH, Job, PairLengths, mix_lengths, word_tokenizer, write_pairs


def _shape(vocab_size: int, **sizes: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
    )


TINY = _shape(
    64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
SHAPES = {
    "26m": _shape(**PLANNED["minimind-26m"]),
    "135m": _shape(**PLANNED["smollm2-135m"]),
    "0.6b": _shape(  # Qwen3's
        151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
}
PAIRS = {"26m": 32, "135m": 16, "0.6b": 8}  # of a step, all at once
WARM_UP, TIMED = 3, 5  # steps


def make_job(name: str, place: Place) -> tuple[Job, list[PairLengths]]:
    """Write a shape's model, tokenizer and pairs, in a folder of its own; what contestants are told."""
    scratch = place.scratch / name
    shape, batch = (TINY, 2) if place.rehearses else (SHAPES[name], PAIRS[name])
    torch.manual_seed(0)
    with torch.device(place.device):
        LlamaForCausalLM(shape).save_pretrained(scratch / "model")
    word_tokenizer(shape.vocab_size).save_pretrained(scratch / "tokenizer")
    lengths = mix_lengths("chat", (WARM_UP + TIMED) * batch)
    if place.rehearses:
        lengths = [PairLengths(5 + index, 4, 6, 5 + index) for index in range(len(lengths))]
    return Job(
        model=str(scratch / "model"),
        tokenizer=str(scratch / "tokenizer"),
        pairs=write_pairs(scratch / "pairs.jsonl", lengths, shape.vocab_size),
        scratch=str(scratch),
        batch=batch,
        micro_batch=batch,
        max_length=MAX_LENGTH["chat"],
        windows=(WARM_UP, TIMED),
        threads=torch.get_num_threads(),
        learning_rate=0.0,  # so that every contestant has the same weights at every step
        device=place.device,
        bf16=not place.rehearses,
    ), lengths
