"""One program on a CUDA that computes nothing, for all tests here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guard.cpp, built for the installed torch."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations is not None
    torch_dir, library = Path(spec.submodule_search_locations[0]), tmp_path_factory.mktemp("guard") / "guard.so"
    flags = [
        *("-std=c++20", "-shared", "-fPIC", "-O0"),
        *(f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"),
        *(f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_dir}/lib"),
    ]
    subprocess.run([compiler, str(HERE / "guard.cpp"), "-o", str(library), *flags], check=True, timeout=300)
    return library


@pytest.fixture(scope="session")
def steps(guard: Path) -> dict[str, dict[str, Any]]:
    """What each step asked of the device, and what each pass kept."""
    result = subprocess.run(
        [sys.executable, str(HERE / "program.py"), str(guard)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
