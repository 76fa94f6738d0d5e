"""JSON that people wrote, read strictly: what could be read in two ways, or breaks what comes later, is an error."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NoReturn

from minimind_dpo.errors import UserError

DEEPEST = 100  # levels of lists and objects in what a chat template gets; tool schemas have some ten
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

ENCODED = re.compile(r"""\s*"?\s*(array\(\s*)?(\[\s*)?\{\s*\\*["']""")  # an object, or some in a list
PYTHON = re.compile(r"\s*(\[\s*)?\{\s*'")
UNREADABLE = object()


class RowError(UserError):
    """A row that can't be used; `reason` is a short name under which such rows are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, str(self))


def fail(reason: str, place: str, message: str) -> NoReturn:
    """Refuse the row at `place`.

    Raises:
        RowError: always.
    """
    raise RowError(reason, f"{place}: {message}")


def load_json(text: str, place: str, name: str = "") -> Any:
    """The value of a JSON text.

    Args:
        text: one JSON value.
        place: of the row, for the message.
        name: what in the row the text is; empty for the row itself.

    Raises:
        RowError: it is not JSON, or holds a key twice, NaN, half a surrogate pair, or more levels or digits than can
            be read.
    """
    what = f"{name} is not JSON" if name else "broken JSON"
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        if _SURROGATE.search(text):  # a whole pair is a character, a half can't be written as UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        whole = "" if name else "; every line must be one whole JSON object"
        fail("broken_json", place, f"{what}: {error.msg} (column {error.colno}){whole}")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        fail("not_utf8", place, f"{name or 'the row'} holds half a surrogate pair ({half!a}); write whole characters")
    except RecursionError:
        fail("broken_json", place, f"{what}: nested too deep")
    except ValueError as error:
        fail("broken_json", place, f"{what}: {error}")
    return value


def value_in(text: str, deep: int = 3) -> Any:
    """The object, or list of some, that is written in a text: as JSON, as JSON `deep` times over, or as Python's.

    `UNREADABLE` where there is none.
    """
    if not ENCODED.match(text):
        return UNREADABLE
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not PYTHON.match(text):
            return UNREADABLE
        try:
            value = without_nulls(ast.literal_eval(text.strip()))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return UNREADABLE
    if isinstance(value, str):
        return value_in(value, deep - 1) if deep else UNREADABLE
    return value


def check_plain(value: Any, place: str, name: str) -> None:
    """Check what a chat template gets beside words (tools, calls): of bounded depth, and all text in it UTF-8.

    Raises:
        RowError: naming `name`.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [part for parent in level for part in _parts(parent)]
        for text in (part for part in level if isinstance(part, str)):
            check_text(text, place, name)
        if not level:
            return
    fail("broken_json", place, f"{name}: nested more than {DEEPEST} levels deep")


def check_text(text: str, place: str, name: str) -> None:
    """Check that a text can be written as UTF-8.

    Raises:
        RowError: it holds half a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        fail("not_utf8", place, f"{name} holds half a surrogate pair; write whole characters")


def without_nulls(value: Any) -> Any:
    """A value of a table, without what is absent: Arrow gives every object of a column the keys of all, as None."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; keep one of them")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
