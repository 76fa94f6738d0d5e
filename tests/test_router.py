from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from minimind_dpo.models import MiniMindMoeConfig, RouterSettings, router_aux_loss, router_settings

EVERYTHING = [slice(None)]


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_minimind_formula_by_hand() -> None:
    """Two tokens, top 1 of 2. Token 0 goes to expert 0 (0.75), token 1 to expert 1 (0.6).

    Load (1/2, 1/2); mean scores ((0.75 + 0.4) / 2, (0.25 + 0.6) / 2) = (0.575, 0.425).
    2 x (0.5 x 0.575 + 0.5 x 0.425) = 1, times 0.1.
    """
    layer = logits_of([[0.75, 0.25], [0.4, 0.6]])
    loss = router_aux_loss([layer], EVERYTHING, kind="minimind", top_k=1, coefficient=0.1)
    torch.testing.assert_close(loss, torch.tensor([0.1]))


def test_layers_are_summed_by_minimind_and_pooled_by_transformers() -> None:
    """Layer A sends its token to expert 0 (0.8), layer B to expert 1 (0.9).

    MiniMind: 2 x 0.8 + 2 x 0.9 = 3.4. Pooled: load (1/2, 1/2), scores (0.45, 0.55): 2 x 0.5 x 1 = 1.
    """
    layers = [logits_of([[0.8, 0.2]]), logits_of([[0.1, 0.9]])]
    minimind = router_aux_loss(layers, EVERYTHING, kind="minimind", top_k=1, coefficient=1.0)
    pooled = router_aux_loss(layers, EVERYTHING, kind="transformers", top_k=1, coefficient=1.0)
    torch.testing.assert_close(minimind, torch.tensor([3.4]))
    torch.testing.assert_close(pooled, torch.tensor([1.0]))


def test_a_shared_prefix_counts_in_both_sequences() -> None:
    """Rows 0 and 1 are the prefix, row 2 the chosen branch, rows 3 and 4 the rejected one."""
    torch.manual_seed(0)
    rows = [torch.randn(5, 4), torch.randn(5, 4)]
    settings = RouterSettings("minimind", top_k=2, coefficient=0.01)
    chosen, rejected = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3, 4])
    packed = router_aux_loss(rows, [chosen, rejected], **asdict(settings))
    for loss, positions in zip(packed, (chosen, rejected), strict=True):
        unpacked = [layer[positions] for layer in rows]
        alone = router_aux_loss(unpacked, EVERYTHING, **asdict(settings))
        torch.testing.assert_close(loss, alone[0])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_formula_is_load_balancing_loss_func(top_k: int) -> None:
    torch.manual_seed(top_k)
    layers = tuple(torch.randn(11, 5) for _ in range(3))
    expected = load_balancing_loss_func(layers, num_experts=5, top_k=top_k)
    loss = router_aux_loss(layers, EVERYTHING, kind="transformers", top_k=top_k, coefficient=1.0)
    torch.testing.assert_close(loss[0], expected)


def test_gradient_flows_through_the_scores_only() -> None:
    """One token with scores p: the loss is 2 max(p), so d loss / d logits = 2 p0 (1 - p0) (1, -1)."""
    layer = torch.tensor([[1.0, 0.0]], requires_grad=True)
    router_aux_loss([layer], EVERYTHING, kind="minimind", top_k=1, coefficient=1.0).sum().backward()
    score = 1 / (1 + math.exp(-1))
    slope = 2 * score * (1 - score)
    torch.testing.assert_close(layer.grad, torch.tensor([[slope, -slope]]))


def test_half_precision_logits_give_a_float32_loss() -> None:
    loss = router_aux_loss([torch.randn(3, 4).half()], EVERYTHING, kind="minimind", top_k=1, coefficient=1.0)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), None),
        (MixtralConfig(router_aux_loss_coef=0.02), RouterSettings("transformers", 2, 0.02)),
        (Qwen3MoeConfig(num_experts_per_tok=4), RouterSettings("transformers", 4, 0.001)),
        (GptOssConfig(router_aux_loss_coef=0.9), RouterSettings("transformers", 4, 0.9)),
        (Qwen3MoeConfig(router_aux_loss_coef=0.0), None),
        (MiniMindMoeConfig(), RouterSettings("minimind", 2, 0.01)),
        (
            Qwen3MoeConfig(num_experts_per_tok=1, router_aux_loss_coef=5e-4, minimind_generation=3),
            RouterSettings("minimind", 1, 5e-4),
        ),
    ],
)
def test_settings_of_a_configuration(config, expected) -> None:
    assert router_settings(config) == expected
