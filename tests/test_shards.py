"""Fragments of a trained state on disk, models written file by file, and LoRA merged on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_model import tiny_model
from helpers_run import Inputs, make_inputs, train_here
from safetensors.torch import load_file

from minimind_dpo import load_model
from minimind_dpo.checkpoints.files import FragmentReader, write_fragments
from minimind_dpo.checkpoints.state import TrainerState, check_identity
from minimind_dpo.cli import main as cli
from minimind_dpo.engine.fragments import Fragment
from minimind_dpo.engine.launched import evenly_divided
from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import add_adapters
from minimind_dpo.models.saving import save_adapter, save_model, split_shards


def fragment(name: str, shape: tuple[int, ...], start: int, values: list[float]) -> Fragment:
    weight = torch.tensor(values, dtype=torch.float32)
    return Fragment(name, shape, start, {"weight": weight, "exp_avg": weight + 100, "exp_avg_sq": weight + 200})


def test_any_readers_parts_come_from_any_writers_parts(tmp_path: Path) -> None:
    """[2, 5] = 0..9 written as 0-2, 3-6, 7-9 by three ranks; read as 2-7, and whole."""
    write_fragments(tmp_path, 0, [fragment("w", (2, 5), 0, [0, 1, 2]), fragment("v", (1,), 0, [7])])
    write_fragments(tmp_path, 1, [fragment("w", (2, 5), 3, [3, 4, 5, 6])])
    write_fragments(tmp_path, 2, [fragment("w", (2, 5), 7, [7, 8, 9])])
    reader = FragmentReader(tmp_path)
    assert reader.shapes == {"w": (2, 5), "v": (1,)}
    assert reader.read("exp_avg", "w", 2, 6).tolist() == [102, 103, 104, 105, 106, 107]
    assert torch.equal(reader.weight("w"), torch.arange(10.0).view(2, 5))
    mine = fragment("w", (2, 5), 4, [0, 0])
    reader.fill(mine)
    assert [mine.states[kind].tolist() for kind in mine.states] == [[4, 5], [104, 105], [204, 205]]


def test_a_hole_is_an_error(tmp_path: Path) -> None:
    write_fragments(tmp_path, 0, [fragment("w", (4,), 0, [0, 1])])
    with pytest.raises(KeyError, match="weight of w: 2 of 4 values are not in the checkpoint"):
        FragmentReader(tmp_path).weight("w")


def test_parts_are_bounded(tmp_path: Path) -> None:
    """Fragments of 3 x 4 x 4 = 48 bytes, parts closed at 50 bytes: two fragments a file."""
    parts = [fragment(f"p{index}", (4,), 0, [1, 2, 3, 4]) for index in range(5)]
    assert len(write_fragments(tmp_path, 3, parts, file_bytes=50)) == 3
    assert FragmentReader(tmp_path).shapes.keys() == {f"p{index}" for index in range(5)}


def test_ranks_that_hold_everything_divide_the_writing() -> None:
    """Sizes 6, 2, 2, 2 on two ranks: the first six of twelve elements are rank 0's."""
    assert evenly_divided([6, 2, 2, 2], rank=0, world_size=2) == [True, False, False, False]
    assert evenly_divided([6, 2, 2, 2], rank=1, world_size=2) == [False, True, True, True]


def test_split_shards() -> None:
    assert split_shards([("a", 3), ("b", 3), ("c", 3), ("d", 1)], 5) == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe", "minimind_moe"])
def test_a_model_in_several_files_is_what_save_pretrained_writes(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    ours = {name: tensor for file in files for name, tensor in load_file(tmp_path / "ours" / file).items()}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    loaded = load_model(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_lora_is_merged_into_the_model_and_opens_in_peft(tmp_path: Path) -> None:
    """The merged model, the base model with peft's adapter, and the adapted model in memory give the same logits."""
    from peft import PeftModel

    model = tiny_model("llama").eval()
    model.save_pretrained(tmp_path / "base")
    before = model(torch.arange(8)[None]).logits
    add_adapters(model, r=4, alpha=8, dropout=0.0, target_modules=[], base=str(tmp_path / "base"), seed=0)
    assert torch.equal(model(torch.arange(8)[None]).logits, before)  # B starts at 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    logits = model(torch.arange(8)[None]).logits
    assert float((logits - before).abs().max()) > 0.1
    for name in ("merged", "adapter"):
        (tmp_path / name).mkdir()
    save_model(model, tmp_path / "merged")
    save_adapter(model, tmp_path / "adapter")
    merged = load_model(tmp_path / "merged")(torch.arange(8)[None]).logits
    opened = PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(merged, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(opened.eval()(torch.arange(8)[None]).logits, logits, rtol=1e-5, atol=1e-5)


def test_unknown_lora_modules_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="lora_target_modules: .*nonsense"):
        add_adapters(tiny_model("llama"), r=4, alpha=8, dropout=0.0, target_modules=["nonsense"], base="b", seed=0)


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4}])
def test_a_checkpoint_exports_as_the_model_of_its_step(tmp_path: Path, lora: dict[str, int]) -> None:
    """At the last step that is the final model, to the bit; without LoRA also in several files, never whole."""
    inputs: Inputs = make_inputs(tmp_path / "inputs")
    train_here(inputs.flags(tmp_path / "run", save_steps=2, **lora))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    assert cli(["export", "--model", str(checkpoint), "--format", "hf", "--output", str(tmp_path / "out")]) == 0
    ours, final = (load_file(path / "model.safetensors") for path in (tmp_path / "out", tmp_path / "run" / "model"))
    assert ours.keys() == final.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], final[name], rtol=0, atol=1e-7 if lora else 0)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file() == bool(lora)
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default() -> None:
    saved, now = TrainerState(identity={"beta": 0.1}), TrainerState(identity={"beta": 0.1, "new": "usual"})
    check_identity(saved, now, Path("step-000001"), defaults={"new": "usual"})
    now.identity["new"] = "other"
    with pytest.raises(UserError, match="new: was usual, is other"):
        check_identity(saved, now, Path("step-000001"), defaults={"new": "usual"})
