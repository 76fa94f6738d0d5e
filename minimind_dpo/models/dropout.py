"""Dropout of a model's own, which a preference run wants off: policy and reference are to differ by training alone.

The configuration that is saved keeps what its author wrote.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_DROPS = re.compile(r"dropout|pdrop$")  # a probability of dropping elements, by the names that models have for it
_OTHER = re.compile(r"layerdrop|jitter_noise$")  # other randomness of a training pass
_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def set_dropout(model: PreTrainedModel, probability: float) -> dict[str, float]:
    """Have a model drop with `probability` wherever it can, and draw nothing else at random, in place.

    Adapters' own dropout stays.

    Returns:
        What of it the model's configuration had switched on, by name.
    """
    configured = {name: value for name, value in _settings(vars(model.config)) if value}
    configured |= {name: value for name, value in _settings(vars(model.config.get_text_config())) if value}
    copies: dict[int, PreTrainedConfig] = {}
    for name, module in model.named_modules():
        if "lora_dropout" in name.split("."):
            continue
        if isinstance(module, _LAYERS):
            module.p = probability
        _set(vars(module), probability)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and (configured or probability) and module is not model:
            module.config = copies.setdefault(id(config), _changed(config, probability))  # read in a forward pass
    return configured


def _settings(attributes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in list(attributes.items()):
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and (_DROPS.search(name) or _OTHER.search(name))
        ):
            yield name, value


def _set(attributes: dict[str, Any], probability: float) -> None:
    for name, _ in _settings(attributes):
        attributes[name] = 0.0 if _OTHER.search(name) else probability


def _changed(config: PreTrainedConfig, probability: float) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    for part in {id(part): part for part in (changed, changed.get_text_config())}.values():
        _set(vars(part), probability)
    return changed
