"""The house: rooms that import in one direction, modules and functions of a size that is read at a glance."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers_run import Inputs

from minimind_dpo.cli import main as cli
from minimind_dpo.losses import LOSSES

PACKAGE = Path(__file__).resolve().parent.parent / "minimind_dpo"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]

# No module imports a later room; modules of one room may import each other, without circles.
ROOMS = [
    "errors",
    "files",
    "ending",
    "losses",
    "config",
    "engine",
    "checkpoints",
    "data",
    "models",
    "objective",
    "reference",
    "report",
    "tracking",
    "training",
    "launch",
    "train",
    "precompute",
    "evaluation",
    "evaluate",
    "export",
    "planning",
    "demo",
    "cli",
    "__init__",
]


def room(name: str) -> int:
    """The place of a module, `models.fast.head` say, in the order of rooms."""
    return ROOMS.index(name.split(".")[0])


def imported(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Modules of the package that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                is_module = (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").is_file()
                yield (name if is_module else base), node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)


def own(path: Path) -> Iterator[str]:
    """Of those the package's own, without its name."""
    for name, _ in imported(path):
        if name.startswith("minimind_dpo."):
            yield name.removeprefix("minimind_dpo.")


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name: str) -> None:
    here = name.removesuffix(".py").replace("/", ".")
    later = [other for other in own(PACKAGE / name) if room(other) > room(here)]
    assert not later, f"{name} imports {later}, which come later"


@pytest.mark.parametrize("name", NAMES)
def test_a_late_import_says_why(name: str) -> None:
    """In its own line, or above the block of imports that it is part of."""
    lines = (PACKAGE / name).read_text("utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            above = node.lineno - 2
            while lines[above].lstrip().startswith(("from ", "import ")):
                above -= 1
            assert any("#" in lines[place] for place in (node.lineno - 1, above)), f"{name}:{node.lineno}"


def test_there_are_no_circles() -> None:
    """Every module can be taken off once all that it imports is gone."""
    graph = {
        str(path.relative_to(PACKAGE)).removesuffix(".py").removesuffix("/__init__").replace("/", "."): set(own(path))
        for path in MODULES
    }
    graph = {name: {other for other in others if other in graph} - {name} for name, others in graph.items()}
    while ready := [name for name, others in graph.items() if not others]:
        for name in ready:
            del graph[name]
        graph = {name: others - set(ready) for name, others in graph.items()}
    assert not graph, f"these import each other: {graph}"


def test_the_root_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_small(name: str) -> None:
    text = (PACKAGE / name).read_text("utf-8")
    assert text.count("\n") <= 250
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert all(length <= 50 for length in lengths.values()), {k: v for k, v in lengths.items() if v > 50}


def test_the_way_from_the_console_to_the_loss_is_short(inputs: Inputs, tmp_path: Path) -> None:
    """The package's own frames, from `minimind-dpo train` down to the function of a loss."""
    frames: list[list[str]] = []

    honest = LOSSES["sigmoid"]

    def watched(**inputs: Any) -> Any:
        stack = [frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        frames.append([frame.function for frame in stack])
        return honest.function(**inputs)

    with mock.patch.dict(LOSSES, sigmoid=replace(honest, function=watched)):
        assert cli(["train", *inputs.flags(tmp_path, max_steps=1)]) == 0
    way = ["main", "main", "run", "train", "optimizer_step", "_go_back_apart", "score_batch", "dpo_losses"]
    assert frames[0][::-1] == way
