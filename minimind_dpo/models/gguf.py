"""A model as a `.gguf` file, by llama.cpp's own converter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from minimind_dpo.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
TYPES = {None: "auto", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # the converter's names
_TOLD_LINES = 8


def find_converter(llama_cpp: str | None) -> Path:
    """The converter of a checkout of llama.cpp, or the one on PATH.

    Args:
        llama_cpp: the checkout's directory; None: look on PATH.

    Raises:
        UserError: it is not there.
    """
    if llama_cpp is None:
        if found := shutil.which(CONVERTER):
            return Path(found)
        raise UserError(
            f"format gguf: {CONVERTER} of llama.cpp is not on PATH; name a checkout of "
            "https://github.com/ggml-org/llama.cpp with --llama_cpp DIR"
        )
    path = Path(llama_cpp).expanduser() / CONVERTER
    if not path.is_file():
        raise UserError(f"--llama_cpp: {path} is not there; name a checkout of https://github.com/ggml-org/llama.cpp")
    return path


def convert(converter: Path, model: Path, output: Path, dtype: str | None) -> None:
    """Run the converter on a `save_pretrained` directory.

    Args:
        converter: as `find_converter` finds it.
        model: the directory.
        output: the file to write.
        dtype: as in `export_model`.

    Raises:
        UserError: it fails, or writes nothing; with the end of what it says.
    """
    command = [sys.executable, str(converter), str(model), "--outfile", str(output), "--outtype", TYPES[dtype]]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode or not output.is_file():
        said = (result.stderr or result.stdout).strip().splitlines()[-_TOLD_LINES:]
        raise UserError(f"{converter}: failed with code {result.returncode}:\n  " + "\n  ".join(said))
