"""The README and docs/ say what is there: links, paths, flags, commands, settings and metrics."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from minimind_dpo.cli import VERBS
from minimind_dpo.cli import main as cli
from minimind_dpo.config import LR_SCHEDULER_TYPES, REFERENCES, TrainConfig, load_config
from minimind_dpo.config.launcher_flags import split_launcher_flags
from minimind_dpo.losses import LOSSES, own_settings
from minimind_dpo.objective.sums import PAIR_METRICS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TOP = {path.name for path in ROOT.iterdir()}

MINIMIND_FLAGS = {
    "--save_dir",
    "--save_weight",
    "--epochs",
    "--batch_size",
    "--learning_rate",
    "--device",
    "--dtype",
    "--num_workers",
    "--accumulation_steps",
    "--grad_clip",
    "--log_interval",
    "--save_interval",
    "--hidden_size",
    "--num_hidden_layers",
    "--max_seq_len",
    "--use_moe",
    "--data_path",
    "--from_weight",
    "--from_resume",
    "--beta",
    "--use_wandb",
    "--wandb_project",
    "--use_compile",
}
ACCELERATE_FLAGS = {"--config_file", "--mixed_precision", "--num_processes", "--main_process_port"}
FOREIGN_PATHS = {"trainer/train_dpo.py", "out/full_sft_512.pth", "docs.rs"}
SOURCE_SUFFIXES = {".py", ".yaml", ".yml", ".md", ".toml", ".cfg", ".sh", ".sbatch", ".ipynb"}


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line in bash blocks; continued lines are joined, comments left out."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def own_arguments(words: list[str]) -> tuple[list[str], list[str]] | None:
    """What the launcher is told and what `minimind-dpo` is told; None for a command that is not ours."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = words[0].rpartition("/")[2]
    if program == "minimind-dpo":
        return [], words[1:]
    if "minimind_dpo.train" in words:
        at = words.index("minimind_dpo.train")
        return words[1 : at - 1], ["train", *words[at + 1 :]]
    return None


@cache
def flags_of(verb: str) -> frozenset[str]:
    """Every flag that a verb's help lists."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli([*verb.split(), "--help"])
    return frozenset(re.findall(r"^  (?:-\w, )?(--\w+)", out.getvalue(), flags=re.M))


@cache
def script_flags() -> frozenset[str]:
    """Every flag of the programs beside the package."""
    sources = [*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    return frozenset(flag for path in sources for flag in re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text()))


def flags_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), f"{name} links to {target}"
        if heading:
            assert heading in anchors(linked), f"{name}: no heading #{heading} in {linked.name}"


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    """Names in backticks that look like files of ours are; inside the package its name may be left out."""
    for word in re.findall(r"`([\w./-]+)`", prose(ROOT / name)):
        ours = "/" in word and word.split("/")[0] in TOP
        source = "/" in word and Path(word).suffix in SOURCE_SUFFIXES and not word.startswith("../")
        if word not in FOREIGN_PATHS and (ours or source):
            assert (ROOT / word).exists() or (ROOT / "minimind_dpo" / word).exists(), f"{name} names {word}"


@pytest.mark.parametrize("name", NAMES)
def test_flags_are_known(name: str) -> None:
    known = frozenset().union(*map(flags_of, VERBS)) | MINIMIND_FLAGS | ACCELERATE_FLAGS | {"--help"} | script_flags()
    assert [flag for flag in flags_in((ROOT / name).read_text("utf-8")) if flag not in known] == []


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs and flags exist, named configurations exist, and `train` accepts what it is told."""
    monkeypatch.chdir(ROOT)
    for words in commands(ROOT / name):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), words
        if (found := own_arguments(words)) is None:
            continue
        launcher, arguments = found
        assert set(flags_in(" ".join(launcher))) <= ACCELERATE_FLAGS, words
        for flag, value in zip(launcher, launcher[1:], strict=False):
            assert flag != "--config_file" or Path(value).is_file(), value
        verb = next((verb for verb in VERBS if arguments[: len(verb.split())] == verb.split()), None)
        assert verb is not None, f"no such verb: {words}"
        rest = arguments[len(verb.split()) :]
        assert {word for word in rest if word.startswith("--")} <= flags_of(verb), words
        if verb == "train":
            load_config(split_launcher_flags(rest)[1])


def test_every_command_is_looked_at() -> None:
    """The reader of command lines finds what a person would."""
    found = [own_arguments(words) for page in PAGES for words in commands(page)]
    verbs = {" ".join(command[1])[:12].split(" --")[0] for command in found if command}
    assert verbs >= {"train", "data inspect", "export"}


def test_every_minimind_flag_is_in_the_readme_table() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    first_column = " ".join(line.split("|")[1] for line in lines if line.startswith("|"))
    assert MINIMIND_FLAGS - set(flags_in(first_column)) == set()


def test_table_of_settings_is_complete() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", _part("## All settings"), flags=re.M))
    defaults = TrainConfig()
    shown = {field.name: _shown(getattr(defaults, field.name)) for field in fields(TrainConfig)}
    del shown["loss_settings"]
    assert rows == shown | {name: _shown(setting.default) for name, setting in own_settings().items()}


def _shown(default: object) -> str:
    if default in (None, "", []):
        return "none"
    if isinstance(default, list):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_every_loss_has_a_section() -> None:
    text = (ROOT / "docs" / "losses.md").read_text("utf-8")
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S))
    assert sections.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert all(f"`{setting}`" in sections[name] for setting in loss.settings), name
        assert "arXiv:" in sections[name], name


def test_schedules_references_and_metrics_are_documented() -> None:
    for heading, names in (
        ("## Schedules", LR_SCHEDULER_TYPES),
        ("## Reference", REFERENCES),
        ("## Metrics", PAIR_METRICS),
    ):
        missing = [name for name in names if f"`{name}`" not in _part(heading)]
        assert not missing, f"{heading} leaves out {missing}"


def _part(heading: str) -> str:
    """One part of docs/training.md, down to the next heading."""
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    return text.partition(heading + "\n")[2].partition("\n## ")[0]
