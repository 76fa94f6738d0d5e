"""The hand-written autograd nodes against the modules they stand in for, and attention in its three forms."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_model import tiny_model
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.models.fast import attention, attention_cpu, head
from minimind_dpo.models.fast import nodes as fused_modules
from minimind_dpo.models.fast.head import split_head, token_logps
from minimind_dpo.models.fast.nodes import fuse, restrict_last_layer

SEGMENTS = (PairSegment(0, 5, 3, 4), PairSegment(12, 1, 2, 0), PairSegment(15, 7, 1, 9))


def _leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).requires_grad_() for shape in shapes]


def _gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def _close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert (left - right).norm() <= 2e-6 * right.norm()


@pytest.mark.parametrize("kind", ["llama", "mistral_window", "qwen3", "minimind_moe"])
def test_fused_modules_equal_their_own_forward(kind: str) -> None:
    plain, fused = tiny_model(kind), tiny_model(kind)
    fuse(fused)
    x = _leaves((2, 300, 32))[0]
    changed = 0
    for (name, one), (_, other) in zip(plain.named_modules(), fused.named_modules(), strict=True):
        if "forward" not in vars(other) or isinstance(other, nn.Linear):
            continue
        changed += 1
        size = one.weight.shape[0] if isinstance(one, LlamaRMSNorm) or name.endswith("norm") else 32
        inputs = x[..., :size]
        results = [[module(inputs), *_gradients(module(inputs), [x, *module.parameters()])] for module in (other, one)]
        _close(*results)
    assert changed >= 5  # two norms a layer, the last norm; dense models also two MLPs


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rotary_embedding_equals_its_model_s_own(kind: str) -> None:
    model = tiny_model(kind)
    fuse(model)
    source = sys.modules[type(model.model.layers[0].self_attn).__module__]
    assert source.apply_rotary_pos_emb is fused_modules._rotary
    query, key = _leaves((1, 4, 30, 8), (1, 2, 30, 8))
    cos, sin = torch.randn(2, 1, 30, 8)  # halves that differ, as no model has them
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for rotary in (fused_modules._rotary, fused_modules._llama_rotary):
            rotated = torch.cat(rotary(query.to(dtype), key.to(dtype), cos.to(dtype), sin.to(dtype)), dim=1).float()
            results.append([rotated, *_gradients(rotated, [query, key])])
        _close(*results)


def test_modules_that_compute_something_else_are_left_alone() -> None:
    """Gemma's norm multiplies with 1 + weight, its MLP uses GELU."""
    model = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    fuse(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_fused_norm_leaves_half_precision_to_the_module() -> None:
    plain, fused = tiny_model("llama").bfloat16(), tiny_model("llama").bfloat16()
    fuse(fused)
    x = torch.randn(3, 32).bfloat16()
    assert torch.equal(fused.model.norm(x), plain.model.norm(x))


def test_last_layer_works_on_wanted_rows_only() -> None:
    whole, model = tiny_model("llama").model, tiny_model("llama")
    wanted = restrict_last_layer(model)
    seen: list[int] = []
    model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda module, x, y: seen.append(x[0].shape[1]))
    wanted.positions = torch.tensor([3, 4, 9])
    ids = torch.arange(10)[None]
    states, all_states = (m(ids, use_cache=False).last_hidden_state[0, [3, 4, 9]] for m in (model.model, whole))
    assert seen == [3]
    _close(
        [states, *_gradients(states, list(model.model.parameters()))],
        [all_states, *_gradients(all_states, list(whole.parameters()))],
    )


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_head_in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    hidden, weight = _leaves((11, 8), (50, 8))
    targets = torch.arange(11) * 4
    expected = F.linear(hidden, weight).log_softmax(dim=-1)[range(11), targets]
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * 50)
    logps = token_logps(hidden, weight, targets)
    _close([logps, *_gradients(logps, [hidden, weight])], [expected, *_gradients(expected, [hidden, weight])])


def test_head_keeps_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, int] = {}
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 100 * 50)
    for count in (100, 101, 1000):
        hidden, weight = _leaves((count, 8), (50, 8))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            token_logps(hidden, weight, torch.zeros(count, dtype=torch.long))
        kept[count] = sum(sizes) - hidden.numel() - weight.numel()
    assert kept == {100: 200 + 100 * 50, 101: 202, 1000: 2000}  # targets, logsumexp; probabilities of one chunk


def test_head_in_autocast_computes_in_its_type() -> None:
    hidden, weight = _leaves((11, 8), (50, 8))
    targets = torch.arange(11)
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logps(hidden, weight, targets)
        theirs = F.linear(hidden, weight).float().log_softmax(dim=-1)[range(11), targets]
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-5)
    for left, right in zip(_gradients(ours, [hidden, weight]), _gradients(theirs, [hidden, weight]), strict=True):
        assert left.dtype == torch.float32 and (left - right).norm() <= 0.02 * right.norm()


def test_head_that_is_no_plain_linear_layer_is_left_alone() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, 97, bias=True)
    assert split_head(model) is None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize(("block", "kept_keys"), [(128, 512), (3, 512), (3, 0), (2, 5)])
def test_attention_has_one_result_in_three_forms(
    monkeypatch: pytest.MonkeyPatch, block: int, kept_keys: int, heads: tuple[int, int], window: int | None
) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", kept_keys)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # three products are then two and one
    length = SEGMENTS[-1].start + SEGMENTS[-1].length
    leaves = _leaves((1, heads[0], length, 8), (1, heads[1], length, 8), (1, heads[1], length, 8))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen_by_hand)
    arguments = (*leaves, SEGMENTS, 0.3, window)
    plain = attention.sdpa_attention(*arguments)
    expected = [plain, *_gradients(plain, leaves)]
    for form in (attention_cpu.CpuPairAttention.apply, attention.varlen_attention):
        output = form(*arguments)
        _close([output, *_gradients(output, leaves)], expected)


@pytest.mark.parametrize("block", [128, 3])
def test_attention_of_wanted_queries(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    length = SEGMENTS[-1].start + SEGMENTS[-1].length
    leaves = _leaves((1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 8))
    wanted = (4, 6, 7, 10, 21, 22, 30)  # none of the second pair, of the third none of the rejected branch's first ones
    arguments = (*leaves, SEGMENTS, None, None)
    whole = attention_cpu.CpuPairAttention.apply(*arguments)[:, wanted]
    output = attention_cpu.CpuPairAttention.apply(*arguments, wanted)
    assert output[:, :4].count_nonzero() == output[:, 12:21].count_nonzero() == 0
    _close([output[:, wanted], *_gradients(output[:, wanted], leaves)], [whole, *_gradients(whole, leaves)])
    assert sum(block.end - block.start for block in attention_cpu.query_blocks(SEGMENTS, wanted)) == 4 + 2 + 2 + 2


def test_attention_keeps_its_softmax_where_few_keys_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "BLOCK", 4)
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", 10)
    query, key, value = _leaves((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8))
    segment = PairSegment(start=0, prefix=5, chosen=7, rejected=8)  # 4 queries see 4, 8, 12 keys, then 9 and 13
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        attention_cpu.CpuPairAttention.apply(query, key, value, (segment,), None, None)
    assert sum(sizes) - query.numel() - key.numel() - value.numel() == 4 * 4 * (4 + 8 + 9)


def _varlen_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What flash attention's documentation says of variable lengths: causal is aligned to the bottom right."""
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    repeats = query.shape[1] // key.shape[1]
    outputs: list[Any] = []
    for index in range(len(query_ends) - 1):
        q = query[query_ends[index] : query_ends[index + 1]]
        k, v = (
            states[key_ends[index] : key_ends[index + 1]].repeat_interleave(repeats, dim=1) for states in (key, value)
        )
        place = torch.arange(len(q))[:, None] + len(k) - len(q)
        distance = place - torch.arange(len(k))
        hidden = (distance < 0) | ((window_size[0] >= 0) & (distance > window_size[0]))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v))
    return torch.cat(outputs)
