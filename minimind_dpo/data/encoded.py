"""Messages that a table keeps as text: JSON, JSON in a JSON text, or how Python writes a list (pandas to csv)."""

from __future__ import annotations

import json
import re
from typing import Any

from minimind_dpo.data.json_text import ENCODED, PYTHON, UNREADABLE, check_plain, fail, load_json, value_in
from minimind_dpo.data.messages import OTHER_ROLES, ROLES, looks_like_message, looks_like_parts, words_of_parts

# As only a message says it; `[{"role": role, ...` in someone's code is not that.
_SPEAKS = re.compile(rf"""["'](role|from)\\*["']\s*:\s*\\*["']({"|".join((*ROLES, *OTHER_ROLES))})\\*["']""")
_SAYS = re.compile(r"""["'](content|value)\\*["']\s*:\s*\\*["'\[]""")


def messages_of_text(text: str, name: str, place: str, strict: bool = False) -> Any:
    """The messages that a text holds, or the words of its parts; the text itself where it is but words.

    Args:
        text: of a column that may hold messages.
        name: of the column, for errors.
        place: of the row, for errors.
        strict: whether messages must have a known role, and content: a question may well be about other objects.

    Raises:
        RowError: the text begins as messages do, and can't be read as such.
    """
    value = value_in(text)
    if value is UNREADABLE:
        if ENCODED.match(text) and _SPEAKS.search(text) and _SAYS.search(text) and not _goes_on(text):
            fail("broken_json", place, f"{name} begins as messages do, and is neither JSON nor a list of Python's")
        return text
    if looks_like_parts(value):
        return words_of_parts(value, name, place)
    items = value if isinstance(value, list) else [value]
    if not items or not all(map(_speaks if strict else looks_like_message, items)):
        return text
    check_plain(items, place, name)
    direct = text.lstrip()[:1] in "[{" and not PYTHON.match(text)
    return load_json(text, place, name) if direct else value


def _goes_on(text: str) -> bool:
    """Whether words follow what is whole JSON: someone asks about it."""
    try:
        json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return True


def _speaks(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    return role in (*ROLES, *OTHER_ROLES) and isinstance(content, str | list)
