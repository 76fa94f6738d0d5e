"""Chat templates that come from anywhere: a fixed day, no chance, bounds, and arguments of calls as they want them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers_data import FAMILIES, TEMPLATES, row, say, tiny_tokenizer

from minimind_dpo.data import template
from minimind_dpo.data.chat import encode_pair
from minimind_dpo.data.records import RowError, parse_line, parse_row
from minimind_dpo.data.spans import chat_template
from minimind_dpo.data.template import BadTemplate, SafeTemplate

SOURCES = {family: (TEMPLATES / f"{family}.jinja").read_text("utf-8") for family in FAMILIES}
GENERIC = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def text(source: str, date: str = "2024-07-26", **context: Any) -> str:
    return SafeTemplate(source, date).render(messages=say("q", "a"), tools=None, **context)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{{ strftime_now('%d %B %Y, %H:%M:%S') }}", "05 March 2031, 00:00:00"),
        ("{% set now = strftime_now %}{{ now('%Y-%m-%d') }}", "2031-03-05"),
        ("{% if strftime_now is defined %}{{ strftime_now('%j') }}{% endif %}", "064"),
        ("{{ date_string }}", "05 Mar 2031"),
        ("{{ 'a' ~ 3 ~ messages[0].role }}{% set x %}b{% endset %}{{ x ~ x }}", "a3userbb"),
        ("{% for i in range(3) %}{% for j in range(i) %}{{ loop.index }}{% else %}-{% endfor %}{% endfor %}", "-112"),
        ("{% macro f(x) %}{{ x }}!{% endmacro %}{{ f('a' * 3) }}{{ 7 % 4 }}{{ '%s' % 'b' }}", "aaa!3b"),
    ],
)
def test_what_a_template_says(source: str, expected: str) -> None:
    assert text(source, "2031-03-05") == expected


RUNAWAYS = [
    "{% for i in range(999999999999) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = 'a' * 30000 %}{% for i in n %}{% for j in n %}{% endfor %}{% endfor %}",
    "{{ range(10 ** 18) | list | length }}",
    "{{ 9 ** 999999999 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 99999999999 }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ 'a' | center(99999999999) }}",
    "{{ 'a'.ljust(99999999999) }}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = [n.s, n.s] | join %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "{{ lipsum() }}",
    "{{ [1, 2, 3] | random }}",
]


@pytest.mark.parametrize("source", RUNAWAYS)
def test_templates_that_run_away_are_bad_templates(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MOST_STEPS", 20_000)
    with pytest.raises(BadTemplate, match="the chat template can't be used: "):
        text(source)


def test_a_broken_template_is_one_message() -> None:
    with pytest.raises(BadTemplate, match="the chat template is broken: "):
        text("{% for m in messages %}")


def with_template(source: str) -> Any:
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer("minimind2"))
    tokenizer.chat_template = source
    return tokenizer


def ids(pair: Any, tokenizer: Any) -> Any:
    made = encode_pair(pair, tokenizer, max_length=512, completion_mask="all_assistant")
    return made.chosen_input_ids, made.chosen_completion_mask, made.rejected_input_ids, made.rejected_completion_mask


@pytest.mark.parametrize(
    "family, wanted", [("minimind2", None), ("qwen3", None), ("llama3_2", dict), ("mistral_nemo", dict)]
)
def test_arguments_as_the_template_wants_them(family: str, wanted: type | None) -> None:
    assert chat_template(tiny_tokenizer(family)).arguments is wanted


WANTS_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + ': ' + call.function.arguments }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(arguments: Any) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    talk = [*say("why?"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    talk.append({"role": "tool", "content": "3", "tool_call_id": "call00001"})
    return {side: [*talk, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("family", ["llama3_2", "mistral_nemo", "text"])
def test_json_text_and_object_are_the_same_call(family: str) -> None:
    tokenizer = with_template(WANTS_TEXT) if family == "text" else tiny_tokenizer(family)
    assert chat_template(tokenizer).arguments is (str if family == "text" else dict)
    given = {"city": "Köln", "days": [1, 2]}
    pairs = [parse_row(called(value), "x") for value in (given, json.dumps(given, ensure_ascii=False))]
    first, second = (ids(pair, tokenizer) for pair in pairs)
    assert first == second
    assert '\\"city' not in tokenizer.decode(first[0])


def test_arguments_that_are_no_object() -> None:
    for arguments, message in (("{", "is not JSON|are not JSON|not JSON"), ("[1]", "must be an object, not a list")):
        with pytest.raises(RowError, match=f"^f:1: the arguments of a tool call.*({message})"):
            ids(parse_row(called(arguments), "f:1"), tiny_tokenizer("llama3_2"))


def test_what_arrow_fills_in_is_taken_out() -> None:
    plain = called({"city": "Paris"})
    filled = json.loads(json.dumps(plain))
    filled["chosen"][1]["tool_calls"][0]["function"]["arguments"]["days"] = None
    for message in filled["chosen"] + filled["rejected"]:
        message |= {"tool_calls": message.get("tool_calls"), "name": None}
    assert parse_line(filled, "x") == parse_row(plain, "x")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"]}}}
    filled["tools"] = [{"function": tool["function"] | {"strict": None}, "type": "function"}]
    assert parse_line(filled, "x").tools == [tool]
    filled["tools"] = [{"type": "function", "function": {"name": "f", "parameters": '{"type": "object", "a": null}'}}]
    assert parse_line(filled, "x").tools[0]["function"]["parameters"] == {"type": "object", "a": None}
    # a null that somebody wrote into a line is what is meant
    given = json.dumps(called({"city": None})).encode()
    assert parse_line(given, "x").chosen[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_the_role_developer_where_the_template_knows_it() -> None:
    talk = row("why?")
    for side in ("chosen", "rejected"):
        talk[side] = [{"role": "developer", "content": "be kind"}, *talk[side]]
    pair = parse_row(talk, "f:1")
    with pytest.raises(RowError, match="^f:1: the chat template does not know the role 'developer'"):
        ids(pair, tiny_tokenizer("minimind2"))
    knows = with_template(GENERIC + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# developer #}")
    assert "developer\nbe kind" in knows.decode(ids(pair, knows)[0])
