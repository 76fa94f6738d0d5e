"""The hand-written autograd nodes against the modules they stand in for, and attention on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_model import tiny_model
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minimind_dpo.data.batch import PairSegment
from minimind_dpo.models.fast import attention, attention_cpu, fusing, head
from minimind_dpo.models.fast.fusing import can_fuse
from minimind_dpo.models.fast.head import token_logps
from minimind_dpo.models.fast.patch import Patch

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
    model = tiny_model(kind)
    x = _leaves((2, 300, 32))[0]
    compared = 0
    for name, module in model.named_modules():
        if not name.endswith(("norm", "mlp")) or "MoeBlock" in type(module).__name__:
            continue
        compared += 1
        size = 32 if name.endswith("mlp") else module.weight.shape[0]
        inputs = x[..., :size]
        results = []
        for context in (Patch(model).applied(packed=False), nullcontext()):
            with context:
                assert ("forward" in vars(module)) == (not results)
                results.append([module(inputs), *_gradients(module(inputs), [x, *module.parameters()])])
        _close(*results)
    assert compared >= 5  # two norms a layer, the last norm; dense models also two MLPs


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rotary_embedding_equals_its_model_s_own(kind: str) -> None:
    model = tiny_model(kind)
    with Patch(model).applied(packed=False):
        fused = model.model.layers[0].self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert fused is fusing._rotary
    query, key = _leaves((1, 4, 30, 8), (1, 2, 30, 8))
    cos, sin = torch.randn(2, 1, 30, 8)  # halves that differ, as no model has them
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for rotary in (fused, apply_rotary_pos_emb):
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
    assert not can_fuse(model)
    with Patch(model).applied(packed=False):
        changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert changed == ["model.layers.0.self_attn", "lm_head"]  # its rotary embedding is Llama's


def test_fused_norm_leaves_half_precision_to_the_module() -> None:
    model = tiny_model("llama").bfloat16()
    x = torch.randn(3, 32).bfloat16()
    with Patch(model).applied(packed=False):
        fused = model.model.norm(x)
    assert torch.equal(fused, model.model.norm(x))


def test_last_layer_works_on_wanted_rows_only() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda module, x, y: seen.append(x[0].shape[1]))
    ids, wanted = torch.arange(10)[None], torch.tensor([3, 4, 9])
    results = []
    for context in (Patch(model).applied(packed=False, wanted=wanted), nullcontext()):
        with context:
            states = model.model(ids, use_cache=False).last_hidden_state[0, wanted]
        results.append([states, *_gradients(states, list(model.model.parameters()))])
    assert seen == [3, 10]
    _close(*results)


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_head_in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    hidden, weight = _leaves((11, 8), (50, 8))
    targets = torch.arange(11) * 4
    expected = F.linear(hidden, weight).log_softmax(dim=-1)[range(11), targets]
    monkeypatch.setattr(head, "MOST_LOGITS", rows * 50)
    logps = token_logps(hidden, weight, targets)
    _close([logps, *_gradients(logps, [hidden, weight])], [expected, *_gradients(expected, [hidden, weight])])


def test_head_keeps_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, int] = {}
    monkeypatch.setattr(head, "MOST_LOGITS", 100 * 50)
    for count in (100, 101, 1000):
        hidden, weight = _leaves((count, 8), (50, 8))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            token_logps(hidden, weight, torch.zeros(count, dtype=torch.long))
        kept[count] = sum(sizes) - hidden.numel() - weight.numel()
    assert kept == {100: 200 + 100 * 50, 101: 202, 1000: 2000}  # targets, logsumexp; probabilities of one chunk


def test_head_in_autocast_rounds_its_factors_and_not_their_product() -> None:
    hidden, weight = _leaves((11, 8), (50, 8))
    targets = torch.arange(11)
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_logps(hidden, weight, targets)
    theirs = F.linear(hidden.bfloat16().float(), weight.bfloat16().float()).log_softmax(dim=-1)[range(11), targets]
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-5)
    for left, right in zip(_gradients(ours, [hidden, weight]), _gradients(theirs, [hidden, weight]), strict=True):
        assert left.dtype == torch.float32 and (left - right).norm() <= 0.02 * right.norm()


def test_head_that_is_no_plain_linear_layer_is_left_alone() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(32, 97, bias=True)
    assert Patch(model).head is None


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize(("block", "kept_keys"), [(128, 512), (3, 512), (3, 0), (2, 5)])
@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_attention_on_the_cpu_is_that_of_each_branch_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    block: int,
    kept_keys: int,
    heads: tuple[int, int],
    window: int | None,
) -> None:
    monkeypatch.setattr(attention_cpu, "LARGE", 150)  # of some blocks oneDNN makes the products, of others not
    monkeypatch.setattr(attention_cpu, "FILLED", 8)
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", kept_keys)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # three products are then two and one
    length = SEGMENTS[-1].start + SEGMENTS[-1].length
    leaves = _leaves((1, heads[0], length, 8), (1, heads[1], length, 8), (1, heads[1], length, 8))
    arguments = (*leaves, SEGMENTS, 0.3, window)
    plain = attention.sdpa_attention(*arguments)
    expected = [plain, *_gradients(plain, leaves)]
    output = attention_cpu.CpuPairAttention.apply(*arguments, None, library)
    _close([output, *_gradients(output, leaves)], expected)


@pytest.mark.parametrize("block", [128, 3])
@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_attention_of_wanted_queries(monkeypatch: pytest.MonkeyPatch, library: str, block: int) -> None:
    monkeypatch.setattr(attention_cpu, "LARGE", 150)
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    length = SEGMENTS[-1].start + SEGMENTS[-1].length
    leaves = _leaves((1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 8))
    wanted = (4, 6, 7, 10, 21, 22, 30)  # none of the second pair, of the third none of the rejected branch's first ones
    arguments = (*leaves, SEGMENTS, None, None)
    whole = attention_cpu.CpuPairAttention.apply(*arguments)[:, wanted]
    output = attention_cpu.CpuPairAttention.apply(*arguments, wanted, library)
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


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_under_autocast(name: str, dtype: torch.dtype) -> None:
    """fp32 inside: closer to fp64 than the module's own; rounded at once where linear layers read it."""
    module = tiny_model("qwen3").model.layers[0].get_submodule(name)
    size = module.weight.shape[0]
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    patched = tiny_model("qwen3")
    ours_module = patched.model.layers[0].get_submodule(name)
    grad = torch.randn(50, size, generator=torch.Generator().manual_seed(1))
    results = []
    with Patch(patched).applied(packed=False), torch.autocast("cpu", torch.bfloat16):
        for norm in (ours_module, module):
            leaf = x.clone().requires_grad_()
            output = norm(leaf)
            expected = torch.bfloat16 if norm is ours_module and "layernorm" in name else torch.float32
            assert output.dtype == expected
            results.append((output.bfloat16(), *torch.autograd.grad(output, leaf, grad.to(output.dtype))))
    leaf = x.double().requires_grad_()
    exact = leaf / (leaf.pow(2).mean(dim=-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight.double()
    references = (exact, *torch.autograd.grad(exact, leaf, grad.double()))
    for index, reference in enumerate(references):
        ours, own = (float((result[index] - reference).norm() / reference.norm()) for result in results)
        assert ours <= 3e-3 and (index or ours <= own + 1e-9)


def test_rotary_embedding_under_autocast() -> None:
    """What attention takes is bf16, so the node rounds at once; its gradient is closer to fp64 than the model's own."""
    states = [torch.randn(1, heads, 30, 8).bfloat16() for heads in (4, 2)]
    cos, sin = torch.randn(2, 1, 30, 8)

    def results(rotary: Any, dtype: torch.dtype, product: torch.dtype) -> list[Tensor]:
        leaves = [state.to(dtype).requires_grad_() for state in states]
        angles = (cos.double(), sin.double()) if dtype == torch.float64 else (cos, sin)
        rotated = torch.cat([state.to(product) for state in rotary(*leaves, *angles)], dim=1)
        return [rotated, *torch.autograd.grad(rotated, leaves, torch.ones_like(rotated))]

    exact = results(apply_rotary_pos_emb, torch.float64, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(rotary, *[torch.bfloat16] * 2) for rotary in (fusing._rotary, apply_rotary_pos_emb))
        assert fusing._rotary(*states, cos, sin)[0].dtype == torch.bfloat16
    for left, right, reference in zip(ours, theirs, exact, strict=True):
        assert (left - reference).norm() <= 1.001 * (right - reference).norm()
