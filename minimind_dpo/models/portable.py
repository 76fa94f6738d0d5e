"""Saved models that transformers 4.57 and 5 read alike: each setting under the names that both know.

Without a word 4.57 takes `rope_theta` for 10000 where only `rope_parameters` says otherwise, and it knows no tokenizer
class `TokenizersBackend`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_OLD_NAMES = {"torch_dtype": "dtype", "num_experts": "num_local_experts"}
_TOKENIZER_CLASSES = ("TokenizersBackend",)  # what transformers 5 calls any `tokenizer.json`


def make_portable(directory: Path) -> None:
    """Write into a saved model's configuration, and its tokenizer's, what the older transformers reads, in place."""
    _edit(directory / "config.json", _portable_config)
    _edit(directory / "tokenizer_config.json", _portable_tokenizer)


def _edit(path: Path, change: Any) -> None:
    if path.is_file():
        settings = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(change(settings), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _portable_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _portable_config(value)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict)
    }
    config = config | nested
    old = dict(_rope(config.get("rope_parameters") or {}))
    old |= {theirs: config.get(ours) for theirs, ours in _OLD_NAMES.items()}
    return config | {name: value for name, value in old.items() if value is not None and config.get(name) is None}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and relatives, of one set of parameters or of one for each kind of layer."""
    if "full_attention" in parameters:
        local = parameters.get("sliding_attention") or {}
        return _rope(parameters["full_attention"]) | {"rope_local_base_freq": local.get("rope_theta")}
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {
        "rope_theta": parameters.get("rope_theta"),
        "partial_rotary_factor": parameters.get("partial_rotary_factor"),
        "rope_scaling": scaling if is_scaled else None,
    }


def _portable_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("tokenizer_class") in _TOKENIZER_CLASSES:
        return settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return settings
