"""What is imported when: nothing slow before the work begins, nothing optional unless it is asked for."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import json
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_forks import Forks
from helpers_run import REPOSITORY, Inputs, environment, same_bits, train_here
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minimind_dpo
from minimind_dpo import TrainConfig, load_model, train_dpo
from minimind_dpo.cli import VERBS
from minimind_dpo.config import load_config
from minimind_dpo.errors import StoppedEarly, UserError
from minimind_dpo.training import metrics

SLOW = ["torch", "transformers", "accelerate", "datasets", "pyarrow", "matplotlib"]
OPTIONAL = ["wandb", "deepspeed", "peft", "tensorboard", "mlflow", "swanlab", "trackio"]


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=REPOSITORY,
    )


def imported(program: str, *arguments: str) -> set[str]:
    """The top-level modules that a program has imported when it ends, by `sys.exit` too."""
    shown = f"""
import json, sys
try:
    exec({program!r})
except SystemExit as end:
    assert not end.code, end.code
finally:
    print("\\n" + json.dumps(sorted(sys.modules)))
"""
    result = python(shown, *arguments)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_package_itself_imports_only_pythons_own() -> None:
    ours = imported("import minimind_dpo") - imported("pass")
    assert {name.split(".")[0] for name in ours} <= {"minimind_dpo", *sys.stdlib_module_names}


@pytest.mark.parametrize("verb", VERBS)
def test_help_needs_nothing_slow(verb: str) -> None:
    modules = imported("from minimind_dpo.cli import main; sys.exit(main(sys.argv[1:]))", *verb.split(), "--help")
    assert not modules.intersection(SLOW + OPTIONAL)


@pytest.mark.parametrize("module", ["train", "precompute"])
def test_help_of_a_module_needs_nothing_slow(module: str) -> None:
    program = f"import runpy; runpy.run_module('minimind_dpo.{module}', run_name='__main__', alter_sys=True)"
    assert not imported(program, "--help").intersection(SLOW + OPTIONAL)


def test_a_mistake_in_the_settings_is_told_before_anything_slow() -> None:
    program = "from minimind_dpo.cli import main; assert main(sys.argv[1:]) == 2"
    assert not imported(program, "train", "--learning_rte", "1").intersection(SLOW + OPTIONAL)


ELSEWHERE = """
import os, signal, sys
sys.modules["deepspeed"] = None  # importing it fails
import accelerate, datasets, psutil, torch, transformers  # whose Linux versions may use what is taken away next
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for module, name in ((os, "sched_getaffinity"), (signal, "SIGUSR1"), (signal, "SIGHUP")):
    delattr(module, name)
import minimind_dpo.launch
from minimind_dpo.cli import main
assert main(["train", *sys.argv[1:]]) == 0
"""


def test_training_where_there_is_only_what_every_system_has(inputs: Inputs, forks: Forks, tmp_path: Path) -> None:
    """And without LoRA and trackers nothing that is optional is imported."""
    modules = imported(ELSEWHERE, *inputs.flags(tmp_path / "elsewhere", eval_data=inputs.eval_data, save_steps=2))
    assert not modules.intersection(OPTIONAL) - {"deepspeed"}  # which is in sys.modules as the None above
    assert forks.run(inputs.flags(tmp_path / "here"), tmp_path) == [0]
    assert same_bits(tmp_path / "elsewhere", tmp_path / "here")


@pytest.mark.parametrize(("system", "kib"), [("linux", 2048), ("darwin", 2), ("win32", 4)])
def test_peak_memory_elsewhere(monkeypatch: pytest.MonkeyPatch, system: str, kib: int) -> None:
    """getrusage counts KiB, on macOS bytes; Windows has none, and counts bytes."""
    monkeypatch.setattr(Path, "is_file", lambda path: False)  # no /proc
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=2048))
    counted = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=4096))
    monkeypatch.setattr(metrics.psutil, "Process", lambda: counted)
    assert metrics._peak_resident_kib() == kib


def test_training_imports_deepspeed_only_when_it_is_launched_so(inputs: Inputs, tmp_path: Path) -> None:
    program = "from minimind_dpo.cli import main; assert main(['train', *sys.argv[1:]]) == 0"
    assert not imported(program, *inputs.flags(tmp_path)).intersection(OPTIONAL)


def test_ranks_that_write_no_report_need_no_matplotlib() -> None:
    assert "matplotlib" not in imported("import minimind_dpo.training.loop, minimind_dpo.training.run_directory")


def requirements(option: str = "install_requires", section: str = "options") -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = [line.strip() for line in config[section][option].splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def third_party_imports() -> dict[str, set[str]]:
    """Every package from elsewhere that ours imports, and where."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (REPOSITORY / "minimind_dpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}: a relative import"
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - {"minimind_dpo", *sys.stdlib_module_names}:
                found[top].add(path.name)
    return found


def test_every_import_is_declared_and_every_requirement_imported() -> None:
    extras = ("quant", "tensorboard", "mlflow", "swanlab", "trackio")
    optional = [needed for extra in extras for needed in requirements(extra, "options.extras_require")]
    declared = {canonicalize_name(requirement.name) for requirement in [*requirements(), *optional]}
    distributions = {requirement.name: [requirement.name] for requirement in optional} | packages_distributions()
    needed = {top: {canonicalize_name(name) for name in distributions[top]} for top in third_party_imports()}
    assert {top: names for top, names in needed.items() if not names & declared} == {}
    through_accelerate = {"tensorboard", "sqlalchemy", "alembic"}  # the last two through mlflow
    assert declared - through_accelerate == set().union(*needed.values()) & declared


def test_deepspeed_is_for_linux() -> None:
    (deepspeed,) = (requirement for requirement in requirements() if requirement.name == "deepspeed")
    assert deepspeed.marker is not None
    systems = {name: deepspeed.marker.evaluate({"platform_system": name}) for name in ("Linux", "Darwin", "Windows")}
    assert systems == {"Linux": True, "Darwin": False, "Windows": False}


def test_the_pinned_versions_lie_within_the_bounds() -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    bounded = {requirement.name for requirement in requirements() if "<" in str(requirement.specifier)}
    assert bounded == {"torch", "accelerate", "deepspeed", "transformers", "datasets", "peft"}


def test_what_is_public_comes_when_it_is_asked_for() -> None:
    for name in minimind_dpo.__all__:
        assert getattr(minimind_dpo, name) is not None and name in dir(minimind_dpo)
    with pytest.raises(AttributeError, match="no attribute 'pack_pair'"):
        minimind_dpo.pack_pair  # noqa: B018
    assert minimind_dpo.train.__name__ == "minimind_dpo.train"  # the module, whatever else is public


def test_public_scorer_scores_public_batches(inputs: Inputs) -> None:
    """Hand-made pairs: the scorer's log-probabilities are those of the model called directly."""
    model = load_model(inputs.model)
    row = {
        "chosen_input_ids": [5, 6, 7, 8],
        "chosen_completion_mask": [0, 0, 1, 1],
        "rejected_input_ids": [5, 6, 9],
        "rejected_completion_mask": [0, 0, 1],
        "weight": 1.0,
    }
    with torch.no_grad():
        logps = minimind_dpo.PairScorer(model)(minimind_dpo.pack_pairs([row])).per_token_logps
        expected = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row[f"{side}_input_ids"]])
            all_logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            expected.append(all_logps[1:])
    torch.testing.assert_close(logps.sort().values, torch.cat(expected).sort().values, rtol=1e-5, atol=1e-5)


def config_of(flags: list[str], **changes: object) -> TrainConfig:
    return dataclasses.replace(load_config(flags), **changes)  # type: ignore[arg-type]


def test_train_dpo_is_the_commands_run(inputs: Inputs, tmp_path: Path) -> None:
    train_here(inputs.flags(tmp_path / "command", eval_data=inputs.eval_data))
    flags = inputs.flags(tmp_path / "python", eval_data=inputs.eval_data)
    summary = train_dpo(config_of(flags, learning_rate="1e-2", train_data=str(inputs.train_data)))
    assert same_bits(tmp_path / "command", tmp_path / "python")
    assert summary == json.loads((tmp_path / "python" / "summary.json").read_text())
    assert summary["pairs_seen"] == 21 and summary["eval_after"].keys() >= {"eval_loss", "eval_rewards/margins"}


def test_train_dpo_tells_the_commands_errors(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train_dpo(config_of(inputs.flags(tmp_path / "a"), beta=-1.0, learning_rate="much", loss_type="sigmod"))
    for problem in ("beta: must be positive", "learning_rate: expected a number", "loss_type: 'sigmod' is none of"):
        assert problem in str(error.value)
    with pytest.raises(UserError, match="model_name_or_path: missing"):
        train_dpo(TrainConfig())
    with pytest.raises(UserError, match="no such model"):
        train_dpo(config_of(inputs.flags(tmp_path / "a"), model_name_or_path="./nowhere"))


def test_train_dpo_that_is_stopped(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind_dpo.train.run", lambda config, **_: 75)
    with pytest.raises(StoppedEarly, match="the same call continues"):
        train_dpo(config_of(inputs.flags(tmp_path)))
    monkeypatch.setattr("minimind_dpo.train.run", lambda config, **_: 2)
    with pytest.raises(SystemExit, match="2"):
        train_dpo(config_of(inputs.flags(tmp_path)))
