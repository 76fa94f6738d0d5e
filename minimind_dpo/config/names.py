"""What a name can be that a user gives: a local path, a hub id, MiniMind's raw weights."""

from __future__ import annotations

from pathlib import Path

_MODEL_SUFFIXES = (".pth", ".pt", ".bin", ".gguf", ".safetensors")


def looks_local(name: str) -> bool:
    """Whether a name that doesn't exist here must be meant as a path, not as a hub id `owner/name`."""
    if name.startswith((".", "/", "~")) or name.endswith(("/", *_MODEL_SUFFIXES)) or name.count("/") > 1:
        return True
    return "\\" in name or ("/" in name and Path(name).parent.is_dir())


def is_raw_weights(path: Path) -> bool:
    """Whether a model's path names MiniMind's raw weights: any one file, except a `.gguf` file."""
    return path.is_file() and path.suffix != ".gguf"
