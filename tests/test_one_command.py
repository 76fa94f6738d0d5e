"""`minimind-dpo train --accelerate_config NAME ...` from any folder, and from a wheel outside the repository."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from helpers_run import REPOSITORY, Inputs, environment

from minimind_dpo.cli import main as cli
from minimind_dpo.config import load_config, shipped
from minimind_dpo.config.flags import GROUPS, SETTINGS
from minimind_dpo.config.launcher_flags import ACCELERATE_CONFIG, SWITCHES, VALUES, split_launcher_flags
from minimind_dpo.errors import UserError
from minimind_dpo.launch import verbs, workers

REQUIRED = ["--model_name_or_path", "m", "--train_data", "a.jsonl"]


def completed(*flags: str) -> argparse.Namespace:
    """What accelerate is told in the end."""
    args = launch_command_parser().parse_args([*flags, "program"])
    workers._complete(args)
    return args


def test_the_launchers_flags_are_accelerates() -> None:
    theirs = {
        option.removeprefix("--"): action.nargs == 0
        for action in launch_command_parser()._actions
        for option in action.option_strings
    }
    assert {name: theirs.get(name) for name in VALUES if name != ACCELERATE_CONFIG} == dict.fromkeys(
        set(VALUES) - {ACCELERATE_CONFIG}, False
    )
    assert {name: theirs.get(name) for name in SWITCHES} == dict.fromkeys(SWITCHES, True)
    assert not {*VALUES, *SWITCHES} & {*SETTINGS}


def test_flags_are_told_apart() -> None:
    line = ["--train_data", "a", "b", "--num_processes=4", "--beta", "0.2", "--same_network", "--gpu_ids", "0,1"]
    told, rest = split_launcher_flags(line)
    assert told == {"num_processes": "4", "same_network": None, "gpu_ids": "0,1"}
    assert rest == ["--train_data", "a", "b", "--beta", "0.2"]
    with pytest.raises(UserError, match="--num_processes: has no value"):
        split_launcher_flags(["--num_processes", "--beta", "0.2"])


@pytest.mark.parametrize("verb", ["train", "precompute", "evaluate"])
def test_a_verb_is_the_long_line(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []
    monkeypatch.setattr(verbs, "launch", lambda argv: said.append(argv) or 75)
    rest = [*REQUIRED, "--beta", "0.2"]
    line = ["--num_processes", "4", *rest, "--accelerate_config", "ds_zero2", "--mixed_precision", "bf16"]
    assert verbs.launched(verb, line) == 75
    start = ["--config_file", "ds_zero2", "--num_processes", "4", "--mixed_precision", "bf16"]
    assert said == [[*start, "-m", f"minimind_dpo.{verb}", *rest]]


def test_what_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verbs.launched("train", REQUIRED) is None
    assert verbs.launched("plan", ["--num_processes", "4"]) is None  # its own flag
    assert verbs.launched("train", ["--num_processes", "4", "--help"]) is None
    with pytest.raises(UserError, match="model_name_or_path: missing"):  # before anything is started
        verbs.launched("train", ["--num_processes", "2"])
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="--num_processes: this process was started by a launcher already"):
        verbs.launched("train", [*REQUIRED, "--num_processes", "2"])


@pytest.mark.parametrize("name", shipped.shipped_names("accelerate"))
def test_every_configuration_is_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = completed("--config_file", name)
    assert Path(args.config_file).is_absolute() and args.main_process_port == 0
    if name.startswith("ds_"):
        file = Path(args.deepspeed_config_file)
        assert (
            file.is_absolute() and file.stem == name.removeprefix("ds_") and "deepspeed_config_file" in args.nondefault
        )


def test_a_configuration_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate looks for its DeepSpeed file, from here; else beside it, or above."""
    folder = tmp_path / "mine"
    (folder / "accelerate").mkdir(parents=True)
    text = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"
    (folder / "accelerate" / "a.yaml").write_text(text + "main_process_port: 4321\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--config_file", "mine/accelerate/a.yaml"]
    with pytest.raises(UserError, match="deepspeed_config_file zero.json: no such file"):
        completed(*flags)
    for place in (folder, folder / "accelerate"):
        (place / "zero.json").write_text("{}")
        assert completed(*flags).deepspeed_config_file == str(place / "zero.json")
    (tmp_path / "zero.json").write_text("{}")
    args = completed(*flags)
    assert (args.deepspeed_config_file, args.main_process_port) == ("zero.json", 4321)
    assert completed(*flags, "--deepspeed_config_file", "other.json").deepspeed_config_file == "other.json"


def test_without_a_configuration_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "default_config_file", str(tmp_path / "default.yaml"))
    for gpus, flags, name, processes in (
        (0, ["--num_processes", "2"], "multi_cpu", 2),
        (0, ["--mixed_precision", "bf16"], "single_cpu", 1),
        (4, ["--mixed_precision", "bf16"], "multi_gpu", 4),
        (4, ["--num_processes", "1"], "single_gpu", 1),
    ):
        monkeypatch.setattr(workers.torch.cuda, "device_count", lambda gpus=gpus: gpus)
        args = completed(*flags)
        assert (Path(args.config_file).stem, args.num_processes) == (name, processes)
    (tmp_path / "default.yaml").write_text("num_processes: 8\n")  # what `accelerate config` leaves
    assert completed("--mixed_precision", "bf16").config_file is None


def test_one_process_where_two_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "--accelerate_config", "single_cpu", "--num_processes", "2", *REQUIRED]) == 2
    assert "is for one process (distributed_type: NO), but --num_processes is 2" in capsys.readouterr().err


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = load_config(["--config", str(REPOSITORY / "configs/dpo/minimind3.yaml"), *REQUIRED])
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "minimind3", *REQUIRED]) == by_path
    (tmp_path / "minimind3").mkdir()  # a run of that name, say
    assert load_config(["--config", "minimind3", *REQUIRED]) == by_path
    with pytest.raises(UserError, match="minimind2_small, minimind2_small_learns, minimind3, qwen3_0.6b, smollm2"):
        load_config(["--config", "minimind4", *REQUIRED])
    with pytest.raises(UserError, match="the one that comes with the package is --config minimind3$"):
        load_config(["--config", "configs/dpo/minimind3.yaml", *REQUIRED])


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["train", "--help"])
    shown = capsys.readouterr().out
    headings = [f"\n{title}:\n" for title in (*GROUPS.values(), "processes, machines, precision")]
    places = [shown.index(heading) for heading in headings]
    assert places == sorted(places) and set(GROUPS) <= set(SETTINGS)
    assert places[3] < shown.index("--train_data ") < places[4]


def test_a_wheel_elsewhere(inputs: Inputs, tmp_path: Path) -> None:
    """Built, installed beside its requirements, and used in a folder of its own: demo, ZeRO 2 on two ranks, export."""
    source, site, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    for name in ("minimind_dpo", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True, text=True)
    surroundings = environment(PYTHONPATH=str(site), MINIMIND_DPO_CACHE=str(tmp_path / "cache"))

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=work, env=surroundings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    program = str(site / "bin" / "minimind-dpo")
    assert str(site) in run(sys.executable, "-c", "import minimind_dpo; print(minimind_dpo.__file__)")
    run(program, "demo", "--max_steps", "2")
    assert (work / "runs" / "demo" / "report.html").is_file()
    launch = ["--accelerate_config", "ds_zero2_cpu", "--num_processes", "2", "--config", "minimind2_small_learns"]
    paths = ["--model_name_or_path", str(inputs.model), "--train_data", str(inputs.train_data)]
    said = run(program, "train", *launch, *paths, "--output_dir", "zero2", "--max_steps", "2")
    assert "on 2 processes under DeepSpeed" in said and said.count("\r") == 0
    assert not any(noise in said for noise in ("Traceback", "Warning", "WARNING", "Setting", "Loading weights"))
    assert json.loads((work / "zero2" / "summary.json").read_text())["steps"] == 2
    assert not os.path.lexists(work / "configs")
    said = run(program, "export", "--model", "zero2", "--format", "hf", "--output", "exported")
    assert said == "wrote exported\n"
    assert (work / "exported" / "model.safetensors").is_file()
