"""What `torch_compile` gives: forward and backward passes of one micro-batch, compiled and not, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.compiled [--pairs 4] [--rounds 8]

Times of a shared machine vary; the two take turns, and the ratio of their medians is what to read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minimind_dpo.data.batch import PairBatch, pack_pairs
from minimind_dpo.models.fast.compiling import CompiledDecoder
from minimind_dpo.objective.scoring import PairScorer

VOCABULARY, PREFIX, REST = 6400, 96, 80  # tokens that the sides of a pair share, and that each has of its own


def main(argv: list[str] | None = None) -> None:
    """Print the seconds of both, and how many times as fast the compiled one is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4, help="a micro-batch")
    parser.add_argument("--rounds", type=int, default=8, help="of each, after one that is not timed")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, compiled = make_scorer(device), make_scorer(device)
    compiled.compiled = CompiledDecoder()
    batch = make_batch(options.pairs).to(device)
    began = time.perf_counter()
    seconds(compiled, batch)
    first = time.perf_counter() - began
    seconds(plain, batch)
    times = [(seconds(plain, batch), seconds(compiled, batch)) for _ in range(options.rounds)]
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found = {"device": name, "threads": torch.get_num_threads(), "compiled": compiled.compiled.works}
    found |= {"compiling s": round(first, 1), "uncompiled s": round(before, 4), "compiled s": round(after, 4)}
    print(json.dumps(found | {"times as fast": round(before / after, 3)}))


def make_scorer(device: torch.device) -> PairScorer:
    """Of MiniMind's 26M shape, with random weights."""
    torch.manual_seed(0)
    shape = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, **shape)  # type: ignore[arg-type]
    scorer = PairScorer(LlamaForCausalLM(config).to(device).train())
    scorer.fused_head = True
    return scorer


def make_batch(pairs: int) -> PairBatch:
    """Made-up pairs of one length."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(pairs):
        shared = torch.randint(3, VOCABULARY, (PREFIX,), generator=generator).tolist()
        row: dict[str, object] = {"weight": 1.0}
        for side in ("chosen", "rejected"):
            row[f"{side}_input_ids"] = shared + torch.randint(3, VOCABULARY, (REST,), generator=generator).tolist()
            row[f"{side}_completion_mask"] = [0] * PREFIX + [1] * REST
        rows.append(row)
    return pack_pairs(rows)


def seconds(scorer: PairScorer, batch: PairBatch) -> float:
    """Of one pass forwards and back."""
    began = time.perf_counter()
    scorer(batch).per_token_logps.sum().backward()
    scorer.zero_grad()
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
