"""Where a model's tokenizer lies, and how it goes along with a model that is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from minimind_dpo.config.names import is_raw_weights
from minimind_dpo.data.chat import load_tokenizer
from minimind_dpo.errors import UserError
from minimind_dpo.models.places import adapter_base, is_adapter, locate_model

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_NAMED_TEMPLATES = "additional_chat_templates"  # transformers' folder


def tokenizer_place(model: str) -> str | None:
    """Where the tokenizer of a model is to be looked for: with it; for raw weights beside them, or in `../model`.

    Returns:
        A directory, a `.gguf` file or a hub id; None where raw weights have none.
    """
    path = locate_model(model)
    if path is None:
        return model
    if is_adapter(path) and not (path / "tokenizer_config.json").is_file():
        return tokenizer_place(adapter_base(path))
    if not is_raw_weights(path):
        return str(path)
    for candidate in (path.parent, path.parent.parent / "model"):
        if (candidate / "tokenizer.json").is_file():
            return str(candidate)
    return None


def copy_tokenizer(model: str, target: Path) -> None:
    """Put a model's tokenizer into `target`, if it has one: its files as they are, with all of its chat templates."""
    place = tokenizer_place(model)
    if place is None:
        return
    source = Path(place)
    if not source.is_dir():  # inside a .gguf file, or on the hub
        try:
            load_tokenizer(place).save_pretrained(target)
        except UserError:
            if source.is_file():
                raise
        return
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / _NAMED_TEMPLATES).is_dir():
        shutil.copytree(source / _NAMED_TEMPLATES, target / _NAMED_TEMPLATES)
