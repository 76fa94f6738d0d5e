"""Makes the embedded demo's assets again: tokenizer, SFT-trained model and preference pairs.

    python scripts/make_demo.py [--output_dir minimind_dpo/demo/assets] [--steps 1200] [--seed 0]

A quarter of an hour on one CPU core. Everything follows from the seed and one thread adds up in one order, so the
same kind of CPU and the same torch give the same weights again. The assets lie in the repository: nobody has to run
this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minimind_dpo.demo import task
from minimind_dpo.demo.replies import generate_replies

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in MiniMind's tokenizers
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRAIN_PAIRS, HELDOUT_PAIRS = 640, 160


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with MiniMind's three special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> PreTrainedTokenizerFast:
    """Write the two files that MiniMind's tokenizers consist of, and read them back as a user would."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0],
        "unk_token": SPECIALS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(path)


def build_model(vocab_size: int, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """MiniMind's generation-2 dense model: Llama with its rope, norm and head settings, embeddings tied."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64 * math.ceil(hidden_size * 8 / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and labels that count the assistant's reply alone (-100 elsewhere)."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    start = len(tokenizer.encode(prompt, add_special_tokens=False))
    ids = tokenizer.encode(full, add_special_tokens=False)
    return ids, [-100] * start + ids[start:]


def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded [batch, longest] ids and labels."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return {"input_ids": ids, "labels": labels}


def sft(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, batch: int, learning_rate: float, seed: int
) -> None:
    """Plain supervised fine-tuning from random weights, every conversation seen once."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: (
            (k + 1) / warmup if k < warmup else 0.02 + 0.49 * (1 + math.cos(math.pi * (k - warmup) / (steps - warmup)))
        ),
    )
    stream = task.conversations(seed)
    probe = [row["chosen"][0]["content"] for row in task.preference_pairs("heldout", 100, seed)]
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        rows = [encode(tokenizer, messages) for messages in itertools.islice(stream, batch)]
        loss = model(**collate(rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == 1:
            seconds = time.monotonic() - started
            print(
                f"step {step:5d}  loss {loss.item():.4f}  {seconds:.0f} s  {score(model, tokenizer, probe)}", flush=True
            )


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> str:
    """Shares of greedy replies with the right content, the right manner, and both."""
    found = [task.verdict(p, r) for p, r in zip(prompts, generate_replies(model, tokenizer, prompts), strict=True)]
    kinds = [task.read_prompt(prompt)[1] for prompt in prompts]
    by_kind = {
        name: sum(v.content for v, kind in zip(found, kinds, strict=True) if kind == name) / kinds.count(name)
        for name in task.KINDS
    }
    content = sum(v.content for v in found) / len(found)
    manner = sum(v.manner for v in found) / len(found)
    both = sum(v.content and v.manner for v in found) / len(found)
    details = " ".join(f"{name} {share:.2f}" for name, share in by_kind.items())
    return f"content {content:.3f} ({details})  manner {manner:.3f}  rule {both:.3f}"


def save_minimind(model: LlamaForCausalLM, path: Path) -> None:
    """Half-precision weights under MiniMind's own keys (Llama's); the tied embedding has both of its keys."""
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, path)


def write_rows(rows: list[dict[str, list]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "minimind_dpo/demo/assets")
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    out: Path = options.output_dir
    texts = (m["content"] for talk in itertools.islice(task.conversations(options.seed), 20_000) for m in talk)
    roles = ["user\n", "assistant\n"] * 20_000  # the words of the chat template, so that they become tokens too
    tokenizer = save_tokenizer(train_tokenizer(itertools.chain(texts, roles), options.vocab_size), out / "tokenizer")
    model = build_model(len(tokenizer), options.hidden_size, options.layers)
    print(f"{len(tokenizer)} tokens, {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    sft(model, tokenizer, options.steps, options.batch, options.learning_rate, options.seed)
    heldout = task.preference_pairs("heldout", HELDOUT_PAIRS, options.seed)
    write_rows(task.preference_pairs("train", TRAIN_PAIRS, options.seed), out / "train.jsonl")
    write_rows(heldout, out / "heldout.jsonl")
    save_minimind(model, out / f"full_sft_{options.hidden_size}.pth")
    print("held-out prompts:", score(model, tokenizer, [row["chosen"][0]["content"] for row in heldout]))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {out}")


if __name__ == "__main__":
    main()
