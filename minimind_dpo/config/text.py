"""Yaml whose scalars are the texts that stand there."""

from __future__ import annotations

from typing import Any

import yaml


class TextLoader(yaml.BaseLoader):
    """Reads every scalar as the text that stands there: the settings know their types, so 007 and 2026-11-26 stay."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ.

        Raises:
            YAMLError: a key is there twice.
        """
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key, _), name in zip(node.value, keys, strict=True):
            if keys.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)
