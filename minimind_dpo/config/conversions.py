"""What is told of a setting as a value of its type; each raises ValueError where it is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")  # yaml's words


def plain(value: Any) -> str:
    """A value as yaml writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_list(value: Any) -> list[str]:
    """A list of texts, or one."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"expected one text or a list of texts, found {value!r}")
    return items


def to_text(value: Any) -> str:
    """One text; a number is the text that was written."""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"expected one text value, found {value!r}")
    return plain(value)


def to_bool(value: Any) -> bool:
    """True or false, in any of yaml's words."""
    said = plain(value).lower()
    if said not in _TRUE + _FALSE:
        raise ValueError(f"expected true or false, found {value!r}")
    return said in _TRUE


def to_number(value: Any) -> float:
    """A number."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {plain(value)}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number, found {value!r}") from None


def to_int(value: Any) -> int:
    """A whole number."""
    number = to_number(value)
    if not number.is_integer():
        raise ValueError(f"expected a whole number, found {value!r}")
    return value if isinstance(value, int) else int(number)


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "list": to_list,
    "str": to_text,
    "bool": to_bool,
    "float": to_number,
    "int": to_int,
}
