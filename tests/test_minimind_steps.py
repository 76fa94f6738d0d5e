"""MiniMind's own training steps through the real command: its measured run, and an oracle for both its MoEs.

The oracle is written here from the definitions, in plain torch: a loop over unpadded sequences, dense attention,
every expert on every token. It shares no code with the package beyond the tokens of a pair.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_data import row, tiny_tokenizer, write_jsonl
from helpers_run import train_here, train_lines, weights
from torch import Tensor

from minimind_dpo.data.tokenized import load_tokenizer, tokenize_files

BETA, LEARNING_RATE, VOCAB, HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, INTERMEDIATE, EXPERTS = (
    0.1,
    1e-3,
    400,
    32,
    2,
    4,
    2,
    8,
    24,
    4,
)
State = dict[str, Tensor]


def _flags(**options: Any) -> list[str]:
    recipe = {
        "loss_type": "sigmoid_norm",
        "beta": BETA,
        "completion_mask": "all_assistant",
        "max_length": 256,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "minimind",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "shuffle": "false",
        "logging_steps": 1,
        "save_steps": 0,
        "gradient_accumulation_steps": 1,
    }
    return [word for name, value in (recipe | options).items() for word in (f"--{name}", str(value))]


def _relative_change(start: State, ours: State, theirs: State) -> float:
    """Norm of the difference between two ends over the norm of the way from the start."""
    difference = sum(float((ours[name] - theirs[name]).double().pow(2).sum()) for name in theirs)
    way = sum(float((theirs[name] - start[name]).double().pow(2).sum()) for name in theirs)
    return (difference / way) ** 0.5


def test_measured_run(shared_dir: Path, tmp_path: Path) -> None:
    """Six steps of four pairs in file order, as MiniMind's dataset, loss and schedule make them."""
    source = shared_dir / "minimind_steps"
    expected = json.loads((source / "expected_steps.json").read_text())
    tokenizer = shared_dir / "minimind_tokenizer_v2"
    train_here(
        _flags(
            model_name_or_path=source / "full_sft_64.pth",
            tokenizer_name_or_path=tokenizer,
            train_data=source / "dpo.jsonl",
            output_dir=tmp_path,
            num_train_epochs=1,
            per_device_train_batch_size=4,
        )
    )
    steps = train_lines(tmp_path)
    assert [line["step"] for line in steps] == [step["step"] for step in expected]
    for line, step in zip(steps, expected, strict=True):
        assert line["learning_rate"] == step["lr"]
        assert line["dpo_loss"] == pytest.approx(step["dpo_loss"], abs=1e-5)
        assert line["loss"] == pytest.approx(step["loss"], abs=1e-5)
        assert line["aux_loss"] == 0
        assert line["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)

    start, end = (torch.load(source / name, weights_only=True) for name in ("full_sft_64.pth", "expected_dpo_64.pth"))
    ours = weights(tmp_path)
    shared = {name: tensor for name, tensor in end.items() if name in ours}
    assert len(shared) == len(ours)
    assert _relative_change(start, ours, shared) < 1e-3

    data = tokenize_files(
        [str(source / "dpo.jsonl")],
        load_tokenizer(tokenizer),
        max_length=256,
        completion_mask="all_assistant",
        on_bad_row="fail",
    ).dataset
    counted = [sum(pair["chosen_completion_mask"]) + sum(pair["rejected_completion_mask"]) for pair in data]
    assert [sum(counted[4 * i : 4 * i + 4]) for i in range(6)] == [step["mask_tokens"] for step in expected]


@dataclass(frozen=True)
class Generation:
    """What a generation's mixture of experts does beyond the shapes of its weights."""

    number: int
    top_k: int
    eps: float
    shared_experts: int
    aux_coefficient: float
    normalises_heads: bool


GENERATIONS = [Generation(2, 2, 1e-5, 1, 0.01, False), Generation(3, 1, 1e-6, 0, 5e-4, True)]


def _random_state(generation: Generation) -> State:
    """Random weights under MiniMind's own keys, large enough that routing is uneven and replies differ."""
    torch.manual_seed(generation.number)
    swiglu = {
        "gate_proj": (INTERMEDIATE, HIDDEN),
        "up_proj": (INTERMEDIATE, HIDDEN),
        "down_proj": (HIDDEN, INTERMEDIATE),
    }
    heads, key_values = HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM
    state = {"model.embed_tokens.weight": 0.3 * torch.randn(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (heads, HIDDEN),
            "self_attn.k_proj": (key_values, HIDDEN),
            "self_attn.v_proj": (key_values, HIDDEN),
            "self_attn.o_proj": (HIDDEN, heads),
            "mlp.gate": (EXPERTS, HIDDEN),
        }
        for name, count in (("experts", EXPERTS), ("shared_experts", generation.shared_experts)):
            shapes |= {f"mlp.{name}.{i}.{key}": shape for i in range(count) for key, shape in swiglu.items()}
        state |= {f"{prefix}{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
        if generation.normalises_heads:
            norms |= {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
        state |= {f"{prefix}{name}.weight": 1 + 0.2 * torch.randn(size) for name, size in norms.items()}
    state["model.norm.weight"] = 1 + 0.2 * torch.randn(HIDDEN)
    return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions, theta 1e6: the halves of a head are the two coordinates of each angle. [L, heads, dim]."""
    length, half = x.shape[0], HEAD_DIM // 2
    angles = torch.arange(length)[:, None] / 1e6 ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attention(state: State, name: str, x: Tensor, generation: Generation) -> Tensor:
    length = len(x)
    query, key, value = (F.linear(x, state[f"{name}{part}_proj.weight"]).view(length, -1, HEAD_DIM) for part in "qkv")
    if generation.normalises_heads:
        query = _norm(query, state[f"{name}q_norm.weight"], generation.eps)
        key = _norm(key, state[f"{name}k_norm.weight"], generation.eps)
    query, key = _rotate(query), _rotate(key)
    key, value = (tensor.repeat_interleave(HEADS // KEY_VALUE_HEADS, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(HEAD_DIM)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), value)
    return F.linear(mixed.reshape(length, -1), state[f"{name}o_proj.weight"])


def _expert(state: State, name: str, x: Tensor) -> Tensor:
    gate, up, down = (state[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _experts(state: State, name: str, x: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """The block's output, and its router loss over the tokens of this one sequence."""
    scores = F.linear(x, state[f"{name}gate.weight"]).softmax(-1)  # [L, experts]
    best = scores.topk(generation.top_k, dim=-1).indices
    routed = torch.zeros_like(scores, requires_grad=False).scatter(-1, best, 1.0)
    shares = scores * routed / (scores * routed).sum(-1, keepdim=True)
    output = torch.stack([shares[:, [i]] * _expert(state, f"{name}experts.{i}.", x) for i in range(EXPERTS)]).sum(0)
    for i in range(generation.shared_experts):
        output = output + _expert(state, f"{name}shared_experts.{i}.", x)
    load = routed.sum(0) / routed.sum()  # share of the routed slots
    return output, generation.aux_coefficient * (load * EXPERTS * scores.mean(0)).sum()


def _oracle_forward(state: State, input_ids: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """Log-probabilities [L, vocabulary] after each token of one sequence, and its router loss over all layers."""
    x = state["model.embed_tokens.weight"][input_ids]
    aux_loss = torch.zeros(())
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        x = x + _attention(
            state, f"{prefix}self_attn.", _norm(x, state[f"{prefix}input_layernorm.weight"], generation.eps), generation
        )
        output, loss = _experts(
            state,
            f"{prefix}mlp.",
            _norm(x, state[f"{prefix}post_attention_layernorm.weight"], generation.eps),
            generation,
        )
        x, aux_loss = x + output, aux_loss + loss
    x = _norm(x, state["model.norm.weight"], generation.eps)
    return F.linear(x, state["model.embed_tokens.weight"]).log_softmax(-1), aux_loss  # tied embeddings


def _score(state: State, ids: list[int], mask: list[int], generation: Generation) -> tuple[Tensor, Tensor]:
    """Mean log-probability of the counted tokens of ids[1:], given ids[:-1]; and the router loss of that input."""
    log_probs, aux_loss = _oracle_forward(state, torch.tensor(ids[:-1]), generation)
    counted = torch.tensor(mask[1:], dtype=torch.float32)
    logps = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return (logps * counted).sum() / counted.sum(), aux_loss


def _oracle_steps(
    start: State, pairs: list[dict[str, Any]], batch: int, generation: Generation
) -> Iterator[tuple[float, float, float]]:
    """dpo_loss, aux_loss and gradient norm of AdamW steps in file order; `start` is changed in place."""
    reference = {name: tensor.clone() for name, tensor in start.items()}
    parameters = [tensor.requires_grad_() for name, tensor in start.items() if name != "lm_head.weight"]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    total = math.ceil(len(pairs) / batch)
    for step in range(1, total + 1):
        chunk = pairs[(step - 1) * batch : step * batch]
        losses, aux_losses = [], []
        for pair in chunk:
            margins = []
            for side in ("chosen", "rejected"):
                ids, mask = pair[f"{side}_input_ids"], pair[f"{side}_completion_mask"]
                mean, aux_loss = _score(start, ids, mask, generation)
                margins.append(mean - _score(reference, ids, mask, generation)[0])
                aux_losses.append(aux_loss)
            losses.append(-F.logsigmoid(BETA * (margins[0] - margins[1])))
        dpo_loss, aux_loss = torch.stack(losses).mean(), torch.stack(aux_losses).mean()
        optimizer.zero_grad()
        (dpo_loss + aux_loss).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
        optimizer.step()
        yield dpo_loss.item(), aux_loss.item(), grad_norm.item()


@pytest.mark.parametrize("attn_implementation", ["pairs", "sdpa"])
@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: f"generation{generation.number}")
def test_moe_follows_the_oracle(generation: Generation, attn_implementation: str, tmp_path: Path) -> None:
    """Raw weights of a mixture of experts, three steps, the last of two pairs only: both losses to 1e-6."""
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) <= VOCAB
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    start = _random_state(generation)
    model = tmp_path / "full_sft_32_moe.pth"
    torch.save(start, model)
    data = write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            row("a question", chosen="the quick brown fox", rejected="no"),
            row(
                "hello there",
                "the user answers",
                "thank you",
                chosen="a longer answer, the fox " * 3,
                rejected="bad fox",
            ),
            row("system: quick", "weather in Paris?", chosen="good", rejected="the quick assistant asks " * 2),
            row("x", chosen="the answer is here", rejected="the answer is not here"),
            row("why?", "because", "and why?", chosen="brown", rejected="fox jumps over you"),
            row("two questions: one and two", chosen="answer one two three", rejected="question"),
            row("hello", chosen="hello there", rejected="hello hello hello hello"),
            row("the brown fox", chosen="asks", rejected="answers a question"),
        ],
    )
    heads = {"num_attention_heads": HEADS} if generation.number == 2 else {}
    train_here(
        _flags(
            model_name_or_path=model,
            tokenizer_name_or_path=tmp_path / "tokenizer",
            train_data=data,
            output_dir=tmp_path / "run",
            per_device_train_batch_size=3,
            attn_implementation=attn_implementation,
            **heads,
        )
    )
    pairs = list(
        tokenize_files([data], tokenizer, max_length=256, completion_mask="all_assistant", on_bad_row="fail").dataset
    )
    lines = train_lines(tmp_path / "run")
    expected = list(_oracle_steps(start, pairs, 3, generation))
    assert len(lines) == len(expected) == 3
    for line, (dpo_loss, aux_loss, grad_norm) in zip(lines, expected, strict=True):
        assert line["dpo_loss"] == pytest.approx(dpo_loss, abs=1e-6)
        assert line["aux_loss"] == pytest.approx(aux_loss, abs=1e-6) and aux_loss > 5e-4
        assert line["loss"] == pytest.approx(dpo_loss + aux_loss, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    assert abs(expected[2][0] - expected[0][0]) > 1e-5  # the weights moved by far more than the tolerance
