"""A tokenizer's chat template, compiled so that it says the same every day and can't run away.

Templates come with models, from anywhere. transformers compiles them in a sandbox that keeps them from files and from
Python; here they also get a fixed clock, nothing random, and a bound on how long they run and how much they write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes

from minimind_dpo.errors import UserError

MOST_STEPS = 500_000  # rounds of loops in one conversation; real templates take some hundreds
_STEPS_OF_A_CALL = 50  # of a macro, as long as that many rounds
LARGEST = 50_000_000  # characters, items, or digits of one value
_OPERATORS = frozenset({"+", "*", "**", "%"})


class BadTemplate(UserError):
    """The chat template can't be used for any conversation."""


class _Runaway(Exception):
    """A bound is passed. Not one of the errors that a template raises itself."""


class SafeTemplate:
    """A compiled template; `date` (`YYYY-MM-DD`) is today's in it.

    Raises:
        BadTemplate: the text is no template.
    """

    def __init__(self, source: str, date: str) -> None:
        self._date = datetime.fromisoformat(date)
        self._steps = 0
        try:
            self._template = self._compile(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadTemplate(f"the chat template is broken: {error or type(error).__name__}") from None

    def render(self, **context: Any) -> str:
        """The text for a conversation.

        Raises:
            BadTemplate: it runs on and on, or makes more text than memory should hold.
            jinja2.TemplateError, TypeError, ...: what it raises for this conversation.
        """
        self._steps = 0
        try:
            return self._template.render(date_string=f"{self._date:%d %b %Y}", **context)
        except (_Runaway, MemoryError) as error:
            raise BadTemplate(
                f"the chat template can't be used: {error or 'it needs more memory than there is'}; name a tokenizer "
                "with another one (tokenizer_name_or_path)"
            ) from None

    def _compile(self, source: str) -> jinja2.Template:
        # late: it takes seconds, which --help need not wait for
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # transformers' own sandbox, filters and tags, of an empty template since compiling computes what is constant;
        # what is replaced below is replaced in this copy only
        environment = _compile_jinja_template("").environment.overlay()
        environment.filters = {name: _measured(made) for name, made in environment.filters.items()}
        environment.filters["random"] = _refuse_chance
        environment.intercepted_binops = _OPERATORS
        compute, call = environment.call_binop, environment.call
        environment.call_binop = lambda context, operator, left, right: _measure(
            compute(context, operator, *_bounded(operator, left, right))
        )
        environment.call = lambda *arguments, **named: _measure(
            call(*_small(arguments), **dict(zip(named, _small(tuple(named.values())), strict=True)))
        )
        tree = environment.parse(source)
        for loop in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            steps = 1 if isinstance(loop, nodes.For) else _STEPS_OF_A_CALL
            loop.body.insert(0, nodes.ExprStmt(_call("step__", [nodes.Const(steps)])))
        _replace_joins(tree)
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = nodes.Filter(block.filter, "string", [], [], None, None)
        own = {
            "step__": self._step,
            "join__": lambda *parts: _measure("".join(map(str, _measured_parts(parts)))),
            "range": self._range,
            "lipsum": _refuse_chance,
            "strftime_now": self._date.strftime,
        }
        return environment.from_string(tree, globals=own)

    def _step(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise _Runaway(f"its loops take more than {MOST_STEPS} rounds for one conversation")

    def _range(self, *arguments: int) -> range:
        made = range(*arguments)
        try:
            self._step(len(made))
        except OverflowError:
            self._step(MOST_STEPS + 1)
        return made


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


def _replace_joins(node: nodes.Node) -> None:
    """`a ~ b` as a call: jinja compiles it to a join that nothing can look into."""
    for field, value in list(node.iter_fields()):
        items = value if isinstance(value, list) else [value]
        made = [_call("join__", item.nodes) if isinstance(item, nodes.Concat) else item for item in items]
        setattr(node, field, made if isinstance(value, list) else made[0])
    for child in node.iter_child_nodes():
        _replace_joins(child)


def _refuse_chance(*arguments: Any, **named: Any) -> NoReturn:
    raise _Runaway("it writes something random: the same data would differ from run to run")


def _measure(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > LARGEST:
        raise _Runaway(f"it makes a value of more than {LARGEST} characters or items")
    return value


def _measured_parts(parts: Sequence[Any]) -> Sequence[Any]:
    if sum(len(part) for part in parts if isinstance(part, str)) > LARGEST:
        raise _Runaway(f"it makes a text of more than {LARGEST} characters")
    return parts


def _measured(made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that neither takes nor makes what is too large; `wraps` keeps what jinja notes on filters."""

    @wraps(made)
    def measured(*arguments: Any, **named: Any) -> Any:
        _small(tuple(named.values()))
        return _measure(made(*_small(arguments), **named))

    return measured


def _small(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of calls, among which widths and counts are bounded."""
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > LARGEST:
            raise _Runaway(f"it asks for a width or number above {LARGEST}")
    return arguments


def _bounded(operator: str, left: Any, right: Any) -> tuple[Any, Any]:
    """The operands of an operator, if their result is."""
    size = 0.0
    if operator == "*" and isinstance(left, int) != isinstance(right, int):
        number, items = (left, right) if isinstance(left, int) else (right, left)
        size = number * len(items) if isinstance(items, str | list | tuple) else 0
    elif operator == "*" and isinstance(left, int):
        size = left.bit_length() + right.bit_length()
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        size = left.bit_length() * abs(right) * 100  # products of such numbers take long, too
    elif operator == "+" and isinstance(left, str | list | tuple):
        size = len(left) + len(right) if isinstance(right, str | list | tuple) else 0
    elif operator == "%" and isinstance(left, str):
        size = max((int(digits) for digits in _digits(left)), default=0)
    if size > LARGEST:
        raise _Runaway(f"it makes a value of more than {LARGEST} characters, items or digits")
    return left, right


def _digits(text: str) -> list[str]:
    return "".join(c if c.isascii() and c.isdigit() else " " for c in text).split()
