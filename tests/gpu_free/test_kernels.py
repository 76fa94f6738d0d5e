"""What the GPU's kernels are handed, and what is made of their answers, with each kernel done by hand on the CPU."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_model import random_row, tiny_model
from torch import Tensor

from minimind_dpo.data.batch import pack_pairs
from minimind_dpo.data.branches import PairSegment, plan_branches
from minimind_dpo.engine import transfer
from minimind_dpo.models.fast import attention, attention_gpu, attention_ops_gpu, nodes_gpu
from minimind_dpo.models.fast.attention_gpu import EFFICIENT, FLASH, Scores
from minimind_dpo.objective.preference import Preference
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.objective.step import score_batch

SEGMENTS = (PairSegment(0, 5, 3, 4), PairSegment(12, 1, 2, 0), PairSegment(15, 7, 1, 9))
OPERATORS = ("flash", "efficient")
EPSILON = 1e-6  # of every model here


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((output.float() * weights).sum(), inputs))


def close(ours: list[Tensor], theirs: list[Tensor], within: float = 2e-6) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == right.dtype and (left.double() - right.double()).norm() <= within * right.double().norm()


def attend(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, scale: float, window: int | None
) -> Tensor:
    """Bottom-right causal attention of each branch, [tokens, heads, head_dim], as the kernels' documentation has it."""
    outputs = []
    for index in range(len(query_ends) - 1):
        q = query[query_ends[index] : query_ends[index + 1]]
        k, v = (states[key_ends[index] : key_ends[index + 1]] for states in (key, value))
        k, v = (states.repeat_interleave(q.shape[1] // states.shape[1], dim=1) for states in (k, v))
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (distance < 0) | (distance > (len(k) if window is None else window))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v))
    return torch.cat(outputs)


def by_hand(name: str, states: Any, ends: Any, mask: Any, options: dict[str, Any], grad: Tensor | None) -> Any:
    """The answer of `attend`, or its gradients."""
    query_ends, key_ends, longest_query, longest_key = ends
    assert query_ends.dtype == key_ends.dtype == torch.int32 and query_ends.is_contiguous() and key_ends.is_contiguous()
    assert longest_query == query_ends.diff().max() and longest_key == key_ends.diff().max()
    left = options.get("window_size_left", -1)
    if name == "flash":
        assert options["window_size_right"] == 0 and mask == (left < 0)
    else:
        assert mask == 2 and states[0].shape[1] == states[1].shape[1]  # as many heads
    inputs = [state.detach().requires_grad_() for state in states]
    with torch.enable_grad():
        output = attend(*inputs, query_ends, key_ends, options["scale"], left if left >= 0 else None)
    if grad is None:
        return output.detach()
    assert grad.is_contiguous()
    return torch.autograd.grad(output, inputs, grad)


def flash_forward(*args: Any, **options: Any) -> Any:
    bind("_flash_attention_forward", args, options)
    query, key, value, *ends, dropout, causal, debug = args
    assert (dropout, debug) == (0.0, False)
    output = by_hand("flash", (query, key, value), ends, causal, options, None)
    return output, output.sum(), torch.tensor(11), torch.tensor(12), torch.empty(0)


def flash_backward(*args: Any, **options: Any) -> Any:
    bind("_flash_attention_backward", args, options)
    grad, query, key, value, output, logsumexp, *ends, dropout, causal, seed, offset = args
    assert (dropout, int(seed), int(offset)) == (0.0, 11, 12) and torch.equal(logsumexp, output.sum())
    return by_hand("flash", (query, key, value), ends, causal, options, grad)


def efficient_forward(*args: Any, **options: Any) -> Any:
    bind("_efficient_attention_forward", args, options)
    query, key, value, bias, *ends, dropout, mask, wants_logsumexp = args
    assert bias is None and dropout == 0.0 and wants_logsumexp
    output = by_hand("efficient", (query[0], key[0], value[0]), ends, mask, options, None)[None]
    return output, output.sum(), torch.tensor(11), torch.tensor(12), ends[2], ends[3]


def efficient_backward(*args: Any, **options: Any) -> Any:
    bind("_efficient_attention_backward", args, options)
    grad, query, key, value, bias, output, *ends, logsumexp, dropout, seed, offset, mask, bias_wanted = args
    assert bias is None and not bias_wanted
    assert (dropout, int(seed), int(offset)) == (0.0, 11, 12) and torch.equal(logsumexp, output.sum())
    found = by_hand("efficient", (query[0], key[0], value[0]), ends, mask, options, grad[0])
    return *(gradient[None] for gradient in found), torch.empty(0)


def bind(name: str, args: Any, options: Any) -> None:
    """Whether the installed torch's operator takes what it is called with."""
    schema = next(
        schema for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}") if not schema.overload_name
    )
    kinds = inspect.Parameter
    inspect.Signature(
        kinds(
            argument.name,
            kinds.KEYWORD_ONLY if argument.kwarg_only else kinds.POSITIONAL_OR_KEYWORD,
            default=None if argument.has_default_value() else kinds.empty,
        )
        for argument in schema.arguments
    ).bind(*args, **options)


def rms_norm_by_hand(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    bind("_fused_rms_norm", (x, shape, weight, eps), {})
    assert x.dtype == weight.dtype and shape == list(weight.shape)
    inverse = (x.float().pow(2).mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (weight.float() * x.float() * inverse).to(x.dtype), inverse


def rms_norm_backward_by_hand(
    grad: Tensor, x: Tensor, shape: list[int], inverse: Tensor, weight: Tensor, wanted: Any
) -> Any:
    bind("_fused_rms_norm_backward", (grad, x, shape, inverse, weight, wanted), {})
    assert grad.dtype == x.dtype == weight.dtype and len(wanted) == 2
    inputs = [state.detach().requires_grad_() for state in (x, weight)]
    with torch.enable_grad():
        output = rms_norm_by_hand(inputs[0], shape, inputs[1], EPSILON)[0]
    found = torch.autograd.grad(output, inputs, grad)
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernels done by hand."""
    for function in (flash_forward, flash_backward, efficient_forward, efficient_backward):
        kind, direction = function.__name__.split("_")
        monkeypatch.setattr(torch.ops.aten, f"_{kind}_attention_{direction}", function)
    for name, norm in (("", rms_norm_by_hand), ("_backward", rms_norm_backward_by_hand)):
        monkeypatch.setattr(torch.ops.aten, f"_fused_rms_norm{name}", norm)


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=OPERATORS)
def test_the_installed_torch_has_the_kernels(kernel: Any) -> None:
    assert kernel.known()


def test_a_kernel_that_asks_for_something_else_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = attention_gpu._takes.__wrapped__
    names = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    assert takes("_flash_attention_forward", names, "scale")
    assert not takes("_flash_attention_forward", names, "scale sinks")  # an option that it lacks
    assert not takes("_flash_attention_forward", names.removesuffix(" return_debug_mask"), "scale")  # one it needs
    assert not takes("_flash_attention_forward", names.replace("query key", "key query"), "scale")
    assert not takes("_flash_attention_forwards", names, "scale")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=OPERATORS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize("window", [None, 4])
def test_one_call_attends_as_each_branch_on_its_own(kernel: Any, heads: tuple[int, int], window: int | None) -> None:
    if kernel is EFFICIENT and window is not None:
        pytest.skip("windows are for flash attention")
    length = SEGMENTS[-1].start + SEGMENTS[-1].length
    inputs = leaves((1, heads[0], length, 8), (1, heads[1], length, 8), (1, heads[1], length, 8))
    plain = attention.sdpa_attention(*inputs, SEGMENTS, 0.3, window)
    output = attention_gpu.varlen_attention(*inputs, kernel, Scores(plan_branches(SEGMENTS), 0.3, window))
    assert output.shape == plain.shape
    close([output, *gradients(output, inputs)], [plain, *gradients(plain, inputs)])


@pytest.mark.parametrize(
    ("dtype", "sizes", "capability", "window", "expected"),
    [
        (torch.bfloat16, (64, 64), (8, 0), None, FLASH),
        (torch.float16, (64, 64), (9, 0), 4, FLASH),
        (torch.bfloat16, (256, 256), (9, 0), None, FLASH),
        (torch.bfloat16, (256, 256), (8, 9), None, EFFICIENT),
        (torch.float32, (64, 64), (8, 0), None, EFFICIENT),
        (torch.float16, (64, 64), (7, 5), None, EFFICIENT),
        (torch.bfloat16, (192, 128), (8, 0), None, EFFICIENT),  # values of another size
        (torch.bfloat16, (64, 64), (7, 5), None, None),
        (torch.float32, (64, 64), (8, 0), 4, None),
        (torch.float32, (20, 20), (8, 0), None, None),
        (torch.float64, (64, 64), (8, 0), None, None),
    ],
)
def test_which_kernel_takes_what(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    capability: tuple[int, int],
    window: int | None,
    expected: Any,
) -> None:
    monkeypatch.setattr(attention_gpu, "_capability", lambda _: capability)
    monkeypatch.setattr(transfer, "on_gpu", lambda _: True)
    query, value = (SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 9, size)) for size in sizes)
    scores = Scores(plan_branches(SEGMENTS), None, window)
    assert attention_gpu.kernel_for(query, value, scores) is expected  # type: ignore[arg-type]


def test_a_plan_in_numbers() -> None:
    plan = plan_branches((PairSegment(0, 2, 1, 2), PairSegment(5, 1, 2, 0)))
    assert plan.query_ends.tolist() == [0, 3, 5, 8]
    assert plan.key_ends.tolist() == [0, 3, 7, 10]
    assert plan.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert (plan.branches, plan.longest_query, plan.longest_key) == (3, 3, 4)


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),  # the residual stream under autocast, before linear layers
        (torch.bfloat16, torch.float32, torch.float32),  # a query under autocast
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),  # weights in bf16
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("kernels")
def test_norm(types: tuple[torch.dtype, ...], frozen: bool) -> None:
    """In any types the norm of fp32, rounded once."""
    x, weight = leaves((3, 5, 16), dtype=types[0]) + leaves((16,), dtype=types[1])
    weight.requires_grad_(not frozen)
    inputs = [x] if frozen else [x, weight]
    output = nodes_gpu.rms_norm(x, weight, 1e-6, types[2])
    wide = [state.detach().double().requires_grad_() for state in (x, weight)]
    exact = wide[1] * wide[0] / (wide[0].pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    found = [output, *gradients(output, inputs)]
    expected = [exact, *gradients(exact, wide[: len(inputs)])]
    dtypes = [types[2], *types[: len(inputs)]]
    within = 1e-5 if set(types) == {torch.float32} else 6e-3
    close(found, [state.to(dtype) for state, dtype in zip(expected, dtypes, strict=True)], within)


@pytest.mark.parametrize(
    ("given", "product"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
def test_rope(given: torch.dtype, product: torch.dtype) -> None:
    inputs = leaves((1, 4, 30, 8), (1, 2, 30, 8), dtype=given)
    cos, sin = torch.randn(2, 1, 1, 30, 8)  # halves that differ, as no model has them
    outputs = nodes_gpu.rope(*inputs, cos, sin, product)
    assert {output.dtype for output in outputs} == {product} and outputs[1].shape == (1, 2, 30, 8)
    wide = [state.detach().double().requires_grad_() for state in inputs]
    exact = [x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin for x in wide]
    ours, theirs = torch.cat(outputs, dim=1), torch.cat(exact, dim=1)
    expected = [theirs.to(product), *(gradient.to(given) for gradient in gradients(theirs, wide))]
    close([ours, *gradients(ours, inputs)], expected, 1e-6 if product == torch.float32 else 4e-3)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=OPERATORS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral_window", "minimind_moe", "qwen3_moe"])
def test_a_step_for_a_gpu_is_that_for_a_cpu(monkeypatch: pytest.MonkeyPatch, kind: str, kernel: Any) -> None:
    """All that is made otherwise for a GPU, with its kernels done by hand: the same losses, metrics and gradients."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        random_row(generator, prefix=prefix, chosen=chosen, rejected=rejected, mask="all_assistant")
        for prefix, chosen, rejected in ((5, 3, 4), (1, 2, 1), (9, 1, 12))
    ]
    results = []
    for on_gpu in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(transfer, "on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
            patch.setattr(attention, "kernel_for", lambda *_: kernel if kind != "mistral_window" else FLASH)
            results.append(score(kind, pack_pairs(rows)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("kernel", "window"), [(FLASH, None), (FLASH, 4), (EFFICIENT, None)])
def test_a_compiled_decoder_calls_the_same(monkeypatch: pytest.MonkeyPatch, kernel: Any, window: int | None) -> None:
    """The operators in a compiled decoder's graph; inside of them autograd, by which kernels here go back, is off."""
    monkeypatch.setattr(attention_ops_gpu, "kernel_for", lambda *_: kernel)
    monkeypatch.setattr(attention_ops_gpu, "gpu_attention_backward", attention_ops_gpu._backward_on_gpu)
    length, plan = SEGMENTS[-1].start + SEGMENTS[-1].length, plan_branches(SEGMENTS)
    states = leaves((1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 8))
    expected = attention_gpu.varlen_attention(*states, kernel, Scores(plan, 0.3, window))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    numbers = plan.query_ends, plan.key_ends, plan.key_index, plan.longest_query, plan.longest_key, 0.3, window
    context: Any = SimpleNamespace(save_for_backward=lambda *kept: setattr(context, "saved_tensors", kept))
    with torch.no_grad():
        outputs = attention_ops_gpu._forward_on_gpu(*states, *numbers)
        attention_ops_gpu._keep(context, (*states, *numbers), outputs)
        found = attention_ops_gpu._back(context, weights, *[None] * 5)
    assert len(found) == len(states) + len(numbers) and not any(state is not None for state in found[3:])
    close([outputs[0], *found[:3]], [expected, *gradients(expected, states)], 1e-6)


def score(kind: str, batch: Any) -> list[Tensor]:
    """Losses, sums of metrics and gradients of a tiny model in training."""
    scorer = PairScorer(tiny_model(kind, rms_norm_eps=EPSILON).train())
    scorer.fused_head = True
    reference = torch.linspace(-9, -1, len(batch.token_index))
    scores = score_batch(scorer, batch, reference, Preference({"sigmoid_norm": 1.0}), torch.tensor([2, 40]))
    (scores.losses + scores.aux_losses).sum().backward()
    gradients = [parameter.grad for parameter in scorer.parameters() if parameter.grad is not None]
    return [scores.losses.detach(), scores.aux_losses.detach(), scores.sums, *gradients]
