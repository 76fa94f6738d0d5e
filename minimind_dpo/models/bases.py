"""The base that LoRA matrices were trained beside, noted with them: which weights, and in what form they were held."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from minimind_dpo.errors import UserError
from minimind_dpo.models.adapters import ADAPTER
from minimind_dpo.models.places import read_object

_FILE = "base_model.json"
_NOTED = "_minimind_dpo_base"


@dataclass(frozen=True)
class AdapterBase:
    """What peft's own file, which names the path, does not say of a base.

    Attributes:
        digest: of its weights in memory, None where nobody noted it.
        dtype: that they were loaded in.
        quantization: `none` or `nf4`.
        num_attention_heads: for raw weights, which do not tell.
    """

    digest: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    num_attention_heads: int | None = None


def note_base(model: PreTrainedModel, base: AdapterBase) -> None:
    """Keep with an adapted model what its base was."""
    setattr(model.peft_config[ADAPTER], _NOTED, base)


def check_base(model: PreTrainedModel, directory: Path) -> None:
    """Refuse to put a checkpoint's matrices beside another base; one without a note is taken at its word.

    Raises:
        UserError: they were trained beside other weights than those of `model`.
    """
    now, then = getattr(model.peft_config[ADAPTER], _NOTED, None), read_base(directory)
    if now is None or then is None or then.digest in (None, now.digest):
        return
    raise UserError(
        f"model_name_or_path: the LoRA matrices of {directory} were trained beside other weights than "
        f"{model.peft_config[ADAPTER].base_model_name_or_path} has now. Bring those back, or choose another output_dir"
    )


def write_base(model: PreTrainedModel, directory: Path) -> None:
    """Write what `note_base` kept beside the matrices' configuration."""
    base = getattr(model.peft_config[ADAPTER], _NOTED, None)
    if base is not None:
        (directory / _FILE).write_text(json.dumps(asdict(base), indent=1) + "\n", "utf-8")


def read_base(directory: Path) -> AdapterBase | None:
    """What `write_base` wrote, None where it did not: another program's adapter, or an older one.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / _FILE
    if not path.is_file():
        return None
    noted = read_object(path)
    if unknown := noted.keys() - AdapterBase.__dataclass_fields__.keys():
        raise UserError(f"{path}: damaged, or of a later version: nothing is known of {', '.join(sorted(unknown))}")
    return AdapterBase(**noted)
