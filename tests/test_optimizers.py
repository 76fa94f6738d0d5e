"""Optimizers beside AdamW: what they compute, what they hold, and that a run resumes with their bits."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_forks import Forks, train_on
from helpers_run import Inputs, make_inputs, same_bits, train_here
from safetensors import safe_open
from torch import nn

from minimind_dpo.config import OPTIMIZERS, TrainConfig
from minimind_dpo.engine import optimizers
from minimind_dpo.engine.launcher import start_engine
from minimind_dpo.engine.optimizers import kept_states, make_optimizer, set_step_count, step_count
from minimind_dpo.errors import UserError

BNB = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra 'quant' (bitsandbytes)")
ALL = [pytest.param(name, marks=BNB if "8bit" in name else ()) for name in OPTIMIZERS]
SHAPES = ((64, 96), (96, 64), (96,))
# bitsandbytes', where its optimizers work on the CPU without pages
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("tiny"))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.01 for shape in SHAPES]


def stepped(optim: str, steps: int, learning_rate: float = 1e-3, **options: Any) -> list[nn.Parameter]:
    ours = parameters()
    optimizer = make_optimizer(ours, learning_rate, options.get("weight_decay", 0.1), optim)
    for step in range(steps):
        for parameter, gradient in zip(ours, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return ours


def test_adafactor_is_torch_s_without_its_scaling_by_the_parameter() -> None:
    """torch's Adafactor has a rate of min(lr, 1 / sqrt(step)) x max(1e-3, rms(parameter)); ours is the schedule's.

    So torch's, told lr / rms(parameter) before each step, and as much less decay, takes the same steps.
    """
    lr, decay = 1e-3, 0.1
    ours, theirs = stepped("adafactor", 5, lr, weight_decay=decay), parameters()
    alone = [torch.optim.Adafactor([parameter], lr=lr, weight_decay=decay) for parameter in theirs]
    for step in range(5):
        for parameter, gradient, optimizer in zip(theirs, gradients(step), alone, strict=True):
            parameter.grad = gradient
            scaled = lr / float(parameter.detach().norm() / parameter.numel() ** 0.5)
            optimizer.param_groups[0] |= {"lr": scaled, "weight_decay": decay * lr / scaled}
            optimizer.step()
    for mine, other, start in zip(ours, theirs, parameters(), strict=True):
        assert float((mine - start).abs().max()) > 3e-3
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_adafactor_s_first_step_by_hand() -> None:
    """With one step the estimate of g^2 is rows x columns / mean; the update is clipped to a root mean square of 1."""
    (weight, *_), gradient = stepped("adafactor", 1, 0.01), gradients(0)[0].double()
    square = gradient**2 + 1e-30
    estimate = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    update = gradient / estimate.sqrt()
    update /= max(1.0, math.sqrt(float((update**2).mean())))
    start = parameters()[0].double()
    torch.testing.assert_close(weight.double(), start - 0.01 * 0.1 * start - 0.01 * update, rtol=0, atol=1e-7)


@BNB
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bits_follow_adamw(optim: str) -> None:
    full, eight, start = stepped("adamw", 20), stepped(optim, 20), parameters()
    for place, (mine, other, begin) in enumerate(zip(eight, full, start, strict=True)):
        away = float((mine - other).norm() / (other - begin).norm())
        assert away < (0.05 if place < 2 else 1e-5), away  # less than 4096 elements stay in fp32
        assert away > 0 or place == 2


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [
        ("adamw", 8),
        pytest.param("adamw_8bit", 2 + 8 / 256, marks=BNB),
        pytest.param("paged_adamw_8bit", 2 + 8 / 256, marks=BNB),
        ("adafactor", 4 * (64 + 96) / (64 * 96)),
    ],
)
def test_bytes_of_states(optim: str, bytes_each: float) -> None:
    ours = parameters()
    states = kept_states(make_optimizer(ours, 1e-3, 0.1, optim), ours[0])
    assert sum(t.numel() * t.element_size() for t in states.values()) / ours[0].numel() == pytest.approx(bytes_each)


@pytest.mark.parametrize("optim", ALL)
def test_states_put_back_step_on_with_the_same_bits(optim: str) -> None:
    """Into an optimizer that has taken no step."""
    whole = stepped(optim, 5)
    first = parameters()
    optimizer = make_optimizer(first, 1e-3, 0.1, optim)
    for step in range(5):
        if step == 2:
            second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
            fresh = make_optimizer(second, 1e-3, 0.1, optim)
            for old, new in zip(first, second, strict=True):
                ours, theirs = kept_states(fresh, new), kept_states(optimizer, old)
                assert ours.keys() == theirs.keys() and ours.keys()
                for kind in ours:
                    ours[kind].copy_(theirs[kind])
            set_step_count(fresh, step_count(optimizer))
            assert step_count(fresh) == 2
            first, optimizer = second, fresh
        for parameter, gradient in zip(first, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, whole, strict=True))


@pytest.mark.parametrize("optim", ALL)
def test_a_norm_that_is_not_finite_leaves_weights_and_states(optim: str, tmp_path: Path) -> None:
    engine = start_engine(TrainConfig(output_dir=str(tmp_path)))
    model = nn.Linear(96, 64)
    scorer, optimizer = engine.prepare(model, make_optimizer(model.parameters(), 1e-3, 0.1, optim), "nearest")
    for value in (1.0, math.inf, math.nan, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        states = [{k: v.clone() for k, v in f.states.items()} for f in engine.fragments()]
        scorer(torch.ones(2, 96)).sum().backward()
        model.weight.grad[0, 0] = value
        norm = engine.step(1.0)
        same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        kept = all(
            torch.equal(f.states[kind], state)
            for f, old in zip(engine.fragments(), states, strict=True)
            for kind, state in old.items()
        )
        assert bool(norm.isfinite()) == math.isfinite(value)
        assert all(same) == kept == (not math.isfinite(value))


def test_without_bitsandbytes_one_sentence_says_what_to_install() -> None:
    with mock.patch.object(optimizers, "version", side_effect=optimizers.PackageNotFoundError("bitsandbytes")):
        with pytest.raises(
            UserError, match=r"optim: adamw_8bit needs bitsandbytes: pip install 'minimind-dpo\[quant\]'"
        ):
            make_optimizer(parameters(), 1e-3, 0.0, "adamw_8bit")


@pytest.mark.parametrize("engine", [None, "multi_cpu"])
@pytest.mark.parametrize("optim", ALL[1:])
def test_a_resumed_run_has_the_same_bits(
    tiny: Inputs, forks: Forks, tmp_path: Path, optim: str, engine: str | None
) -> None:
    if engine is not None and optim == "paged_adamw_8bit":
        pytest.skip("on a CPU it is adamw_8bit")

    def trained(name: str, **options: Any) -> Path:
        flags = tiny.flags(tmp_path / name, optim=optim, learning_rate=1e-3, **options)
        train_on(engine, flags, forks, tmp_path)
        return tmp_path / name

    whole = trained("whole", save_steps=1)
    checkpoint = whole / "checkpoints" / "step-000002"
    if "8bit" in optim:
        assert _stored_types(checkpoint)["state1|model.embed_tokens.weight|0"] == "U8"
    parts = trained("parts", resume=checkpoint)
    assert same_bits(parts, whole)
    if engine is None:
        with pytest.raises(UserError, match=f"optim: was {optim}, is adamw"):
            train_here(tiny.flags(tmp_path / "other", resume=checkpoint, learning_rate=1e-3))


def _stored_types(checkpoint: Path) -> dict[str, str]:
    types = {}
    for path in checkpoint.glob("state-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            types |= {key: file.get_slice(key).get_dtype() for key in file.keys()}
    return types


def test_deepspeed_takes_adamw_only(tiny: Inputs, tmp_path: Path, forks: Forks) -> None:
    flags = tiny.flags(tmp_path / "run", optim="adafactor")
    assert forks.run(flags, tmp_path, "ds_zero2_cpu --num_processes 1") == [2]
    said = (tmp_path / "log").read_text("utf-8")
    assert "optim: is adafactor, but DeepSpeed divides the states of adamw only" in said


def test_every_optimizer_learns(tiny: Inputs, tmp_path: Path) -> None:
    losses = {}
    for optim in ("adamw", "adafactor", *(["adamw_8bit"] if find_spec("bitsandbytes") else [])):
        output = tmp_path / optim
        options = {"optim": optim, "learning_rate": 3e-3, "num_train_epochs": 2, "eval_data": tiny.train_data}
        assert train_here(tiny.flags(output, **options)) == 0
        losses[optim] = json.loads((output / "summary.json").read_text())["eval_after"]["eval_loss"]
    assert all(loss < 0.5 for loss in losses.values()), losses
    if "adamw_8bit" in losses:
        assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.02)
