"""Nothing that comes from elsewhere is executed, and no secret is written (SECURITY.md)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_data import tiny_tokenizer, write_jsonl
from helpers_forks import Forks
from helpers_run import Inputs, train_here
from test_trackers import HERE, places

from minimind_dpo.config import load_config
from minimind_dpo.errors import UserError
from minimind_dpo.models.loading import load_model

SECRETS = (
    *("HF_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"),
)


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_not_run(tmp_path: Path, name: str, writer: Any) -> None:
    writer({"model.embed_tokens.weight": Hostile(tmp_path / "touched")}, tmp_path / name)
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_model(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_a_yaml_tag_is_not_run(tmp_path: Path) -> None:
    file, touched = tmp_path / "c.yaml", tmp_path / "touched"
    file.write_text(f'run_name: !!python/object/apply:os.system ["touch {touched}"]\n')
    with pytest.raises(UserError):
        load_config(["--config", str(file), "--model_name_or_path", "m", "--train_data", "a"])
    assert not touched.exists()


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch TOUCHED') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_stays_in_its_sandbox(inputs: Inputs, tmp_path: Path, attack: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = attack.replace("TOUCHED", str(tmp_path / "touched")) + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError):
        train_here(inputs.flags(tmp_path / "run", tokenizer_name_or_path=tmp_path / "tokenizer"))
    assert not (tmp_path / "touched").exists()


def test_a_row_can_not_write_into_the_report(inputs: Inputs, tmp_path: Path) -> None:
    """A run's name, and the place of its data, are shown as text."""
    data = tmp_path / "<script>alert(1)</script>.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(inputs.train_data.read_bytes())
    train_here(inputs.flags(tmp_path / "run", train_data=data, run_name="<img src=x onerror=alert(1)>", max_steps=1))
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "<img src=x" not in report and "<script>alert(1)" not in report


def test_no_secret_is_written(inputs: Inputs, tmp_path: Path, forks: Forks) -> None:
    """A run with every installed tracker, an evaluation and a skipped step, whose surroundings hold canaries."""
    canaries = {name: f"canary-{number}-" + "c" * 32 for number, name in enumerate(SECRETS)}
    rows = inputs.train_data.read_text("utf-8").splitlines()
    rows[2] = rows[2][:-1] + ', "weight": 3e38}'
    options = {
        "train_data": write_jsonl(tmp_path / "data.jsonl", list(rows)),
        "eval_data": inputs.eval_data,
        "save_steps": 1,
        "on_nonfinite": "skip",
        "reference": "cache",
    }
    flags = [*inputs.flags(tmp_path / "run", **options), "--report_to", *HERE]
    codes = forks.run(flags, tmp_path, **places(tmp_path) | canaries)
    assert codes == [0], (tmp_path / "log").read_text("utf-8")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 20 and (tmp_path / "run" / "nonfinite").is_dir() and (tmp_path / "run" / "wandb").is_dir()
    for path in written:
        assert b"canary-" not in path.read_bytes(), path
