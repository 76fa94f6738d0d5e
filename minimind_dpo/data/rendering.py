"""The compiled template behind a tokenizer's `apply_chat_template`, for plain messages."""

from __future__ import annotations

from typing import Any

import jinja2

from minimind_dpo.data.records import Message

_OF_ALL_DICTS = frozenset(dir(dict))


def is_plain(messages: list[Message]) -> bool:
    """Whether messages hold nothing but a role and a text."""
    return all(len(message) == 2 and type(message.get("content")) is str for message in messages)


def compiled_template(tokenizer: Any) -> Any:
    """The tokenizer's template, None where the tokenizer or transformers has its own way.

    A template sees plain messages unchanged; copying and checking them takes longer than a short template does.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    compiler = getattr(chat_template_utils, "_compile_jinja_template", None)
    ordinary = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    if compiler is None or not ordinary or not isinstance(tokenizer.chat_template, str):
        return None
    try:
        environment = compiler(tokenizer.chat_template).environment.overlay()
        environment.getattr = _quick_getattr(environment.getattr)
        return environment.from_string(tokenizer.chat_template)
    except jinja2.TemplateError:  # a broken template is told when it is used
        return None


def _quick_getattr(getattr_of_sandbox: Any) -> Any:
    """`message.role` without first asking a dict for such an attribute; anything else goes through the sandbox."""

    def lookup(value: Any, name: str) -> Any:
        if type(value) is dict and name in value and name not in _OF_ALL_DICTS:
            return value[name]
        return getattr_of_sandbox(value, name)

    return lookup
