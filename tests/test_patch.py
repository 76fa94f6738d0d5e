"""A model is whole outside of a scored batch, whatever was scored and however it ended."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from helpers_forks import Forks
from helpers_model import VOCAB, random_row, tiny_model
from torch import Tensor
from transformers import NanoChatConfig, NanoChatForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.fast.fusing import can_fuse
from minimind_dpo.models.fast.patch import Patch
from minimind_dpo.objective.layout import PACKED, PLAIN, PairLayout, choose_layout
from minimind_dpo.objective.scoring import PairScorer
from minimind_dpo.planning.shape import read_shape

CPU = torch.device("cpu")
IDS = torch.arange(18).view(2, 9) * 5 % VOCAB
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
ROTARY = modeling_llama.apply_rotary_pos_emb


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        random_row(generator, prefix=p, chosen=c, rejected=r, mask="all_assistant")
        for p, c, r in ((9, 4, 6), (3, 8, 2), (12, 1, 5))
    ]


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[Tensor]:
    """What a direct call gives, without padding and with, and `generate`."""
    training = model.training
    model.eval()
    replies = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, pad_token_id=0)
    logits = [model(IDS).logits, model(IDS, attention_mask=MASK).logits]
    model.train(training)
    return [replies, *logits]


def attributes(model: PreTrainedModel) -> dict[str, Any]:
    """Names of all attributes of all modules' instances, the forward passes among them, and the attention."""
    found: dict[str, Any] = {name: sorted(vars(module)) for name, module in model.named_modules()}
    found |= {f"{name}.forward": vars(module).get("forward") for name, module in model.named_modules()}
    return found | {"attention": model.config._attn_implementation}


def assert_whole(model: PreTrainedModel, score: Callable[[], Any]) -> None:
    """`score` leaves no trace."""
    before, expected = attributes(model), outputs(model)
    score()
    assert attributes(model) == before
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(model), expected, strict=True))
    assert vars(modeling_llama)["apply_rotary_pos_emb"] is ROTARY


def score(scorer: PairScorer, layout: PairLayout = PACKED) -> list[Tensor]:
    """Log-probabilities, router losses and all gradients of one batch."""
    scores = scorer(layout(rows()))
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    if not trained:
        return list(scores)
    total = scores.per_token_logps.sum() + scores.aux_losses.sum()
    return [*scores, *torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)]


def scorer_of(model: PreTrainedModel) -> PairScorer:
    scorer = PairScorer(model)
    assert choose_layout(scorer, "pairs", CPU) is PACKED
    assert scorer.fused_head
    return scorer


@pytest.fixture(params=["llama", "mistral_window", "qwen3", "qwen3_moe", "minimind_moe"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = tiny_model(request.param).train()
    if "moe" in request.param:
        model(IDS, output_router_logits=True)  # transformers' own hooks, which stay
    return model


@pytest.mark.parametrize("layout", [PACKED, PLAIN], ids=lambda layout: layout.id)
@pytest.mark.parametrize("training", [True, False])
def test_a_scored_batch_leaves_no_trace(model: PreTrainedModel, layout: PairLayout, training: bool) -> None:
    assert_whole(model, lambda: score(scorer_of(model.train(training)), layout))


def test_neither_does_one_by_the_model_s_own_head(model: PreTrainedModel) -> None:
    assert_whole(model, lambda: score(PairScorer(model)))


def test_a_scorer_needs_no_probe_to_be_right(model: PreTrainedModel) -> None:
    scorer = PairScorer(model)
    for packed, plain in zip(score(scorer), score(scorer, PLAIN), strict=True):
        assert (packed - plain).norm() <= 1e-5 * plain.norm() + 1e-7


@pytest.mark.parametrize("failing", ["self_attn", "mlp.down_proj", "mlp"])
def test_neither_does_one_that_failed(failing: str) -> None:
    model = tiny_model("llama")
    scorer = scorer_of(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("the machine is on fire")

    def fail() -> None:
        hook = model.model.layers[1].get_submodule(failing).register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="on fire"):
            score(scorer)
        hook.remove()

    assert_whole(model, fail)
    again, fresh = score(scorer), score(scorer_of(tiny_model("llama")))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, fresh, strict=True))


@pytest.mark.parametrize("layout", [PACKED, PLAIN], ids=lambda layout: layout.id)
def test_what_is_computed_again_is_the_same(model: PreTrainedModel, layout: PairLayout) -> None:
    """The backward pass under activation checkpointing, where the scored batch is over."""
    scorer = scorer_of(model)
    expected = score(scorer, layout)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    runs: list[bool] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(True))

    def checkpointed() -> None:
        runs.clear()
        found = score(scorer, layout)
        assert len(runs) == 2
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))

    assert_whole(model, checkpointed)


def test_reentrant_checkpointing_too() -> None:
    """Its first pass is without gradients."""
    model = tiny_model("llama").train()
    scorer = scorer_of(model)
    expected = score(scorer)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()

    def checkpointed() -> None:
        scorer.zero_grad()
        scores = scorer(PACKED(rows()))
        scores.per_token_logps.sum().backward()
        found = [*scores, *(parameter.grad for parameter in scorer.parameters())]
        assert all((ours - theirs).norm() <= 1e-6 * theirs.norm() for ours, theirs in zip(found, expected, strict=True))

    assert_whole(model, checkpointed)


def test_a_batch_between_forward_and_backward_changes_nothing() -> None:
    scorer = scorer_of(tiny_model("llama").train())
    expected = score(scorer)
    scorer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    scores = scorer(PACKED(rows()))
    with torch.no_grad():
        scorer(PLAIN(rows()[:1]))
        scorer.model(IDS)
    found = [*scores, *torch.autograd.grad(scores.per_token_logps.sum(), list(scorer.parameters()))]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora(checkpointing: bool) -> None:
    model = tiny_model("llama")
    add_adapters(model, r=4, alpha=8, dropout=0.0, target_modules=[], base="", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    scorer = scorer_of(model)
    assert_whole(model, lambda: score(scorer))
    model.disable_adapters()
    assert_whole(model, lambda: score(scorer))


@pytest.mark.parametrize("before", [False, True], ids=["offloaded_scorer", "scorer_of_offloaded"])
def test_an_offloaded_reference(before: bool) -> None:
    """Its weights are brought by accelerate's hooks, which wrap forward passes too: the patch goes beneath them."""
    model = tiny_model("llama").eval().requires_grad_(False)
    expected, scores = outputs(model), score(scorer_of(model))
    offloaded = tiny_model("llama").eval().requires_grad_(False)
    if before:
        cpu_offload(offloaded, execution_device=CPU)
    scorer = PairScorer(offloaded)
    if not before:
        cpu_offload(scorer, execution_device=CPU)
    assert choose_layout(scorer, "pairs", CPU) is PACKED and scorer.fused_head
    found: list[Tensor] = []
    assert_whole(offloaded, lambda: found.extend(score(scorer)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, scores, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(offloaded), expected, strict=True))
    assert all(parameter.is_meta for parameter in offloaded.model.layers.parameters())


def test_two_scorers_of_one_model_do_not_nest(model: PreTrainedModel) -> None:
    first = scorer_of(model)
    expected = score(first)
    second = scorer_of(model)
    for scorer in (second, first, second):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(score(scorer), expected, strict=True))
    assert_whole(model, lambda: [score(scorer) for scorer in (first, second)])


def test_a_copy_has_a_patch_of_its_own(model: PreTrainedModel) -> None:
    scorer = scorer_of(model)
    expected = score(scorer)
    copied = copy.deepcopy(scorer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(score(copied), expected, strict=True))


def test_making_and_asking_change_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    """Neither instances nor classes nor Python modules: a scorer not used, the planner's question, a layout chosen."""
    model.config.save_pretrained(tmp_path)
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    sources = {sys.modules[kind.__module__] for kind in kinds}
    choose_layout(PairScorer(tiny_model("llama")), "pairs", CPU)  # transformers remembers some of its own answers

    def everything() -> dict[Any, Any]:
        return {place: dict(vars(place)) for place in kinds | sources} | attributes(model)

    before = everything()
    assert can_fuse(model)
    assert read_shape(str(tmp_path)).fused
    PairScorer(model)
    Patch(model)
    after = everything()
    assert [name for name in before if before[name] != after[name]] == []
    assert_whole(model, lambda: choose_layout(PairScorer(model), "pairs", CPU))
    assert_whole(model, lambda: choose_layout(PairScorer(model), "pairs", CPU, agree=lambda answer: "no"))


def test_what_somebody_else_put_in_place_stays_in_place() -> None:
    """Another library's forward pass on an instance is not taken for its class's."""
    model = tiny_model("llama").eval()
    norm = model.model.norm
    norm.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), norm)
    logits = model(IDS).logits.log_softmax(dim=-1)
    row = {
        f"{side}_{column}": values
        for side, ids in (("chosen", IDS[0].tolist()), ("rejected", IDS[1].tolist()))
        for column, values in (("input_ids", ids), ("completion_mask", [0] + [1] * 8))
    }
    expected = logits[:, :-1].gather(2, IDS[:, 1:, None]).flatten()
    for layout in (PLAIN, PACKED):
        assert torch.allclose(scorer_of(model)(layout([row])).per_token_logps, expected, atol=1e-5)


def test_a_rotation_of_another_kind_is_left_alone() -> None:
    """NanoChat's apply_rotary_pos_emb is Llama's to the letter, while the rotate_half that it calls is not."""
    torch.manual_seed(0)
    shape = tiny_model("llama").config
    model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=VOCAB,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()
    batch = PLAIN(rows())
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = logits.flatten(0, 1)[batch.logit_positions].log_softmax(dim=-1).gather(1, batch.target_ids[:, None])
    assert torch.allclose(PairScorer(model)(batch).per_token_logps, expected[:, 0][batch.token_index], atol=1e-4)


@pytest.mark.parametrize("engine", ["multi_cpu", "ds_zero2_cpu", "ds_zero3_cpu"])
@pytest.mark.parametrize("kind", ["llama", "minimind_moe"])
def test_on_two_ranks(tmp_path: Path, forks: Forks, engine: str, kind: str) -> None:
    """Scored, backward under checkpointing and stepped by nothing, a policy computes and generates as it was loaded."""
    tiny_model(kind).save_pretrained(tmp_path / "model")
    words, program = [str(tmp_path / "model"), str(tmp_path / "run")], "tests/programs/whole_after_scoring.py"
    codes = forks.run(words, tmp_path, engine, program=program)
    said = (tmp_path / "log").read_text("utf-8")
    assert codes == [0, 0] and said.count("WHOLE") == 2, said
