"""Rows that other tools write: each is the plain form's conversation, to the token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers_data import row, say, tiny_tokenizer

from minimind_dpo.data.chat import encode_pair
from minimind_dpo.data.records import PreferencePair, RowError, parse_line, parse_row

SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}, {"from": "human", "value": "why?"}]
PLAIN = row("hello", "hi", "why?", chosen="yes", rejected="no")
WITH_SYSTEM = row("system: be kind", "hello", "hi", "why?", chosen="yes", rejected="no")
ONE = row("why?", chosen="yes", rejected="no")
ONE_SYSTEM = row("system: be kind", "why?", chosen="yes", rejected="no")
YES, NO = say("why?", "yes")[1], say("why?", "no")[1]
GPT_YES, GPT_NO = {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}
TEXTS = {"chosen": "yes", "rejected": "no"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}
CALLED = [*say("why?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]
SHAREGPT_CALLED = [
    {"from": "human", "value": "why?"},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": "3"},
]


def v1(*turns: str) -> list[dict[str, Any]]:
    return [m | {"content": [{"type": "text", "value": m["content"]}]} for m in say(*turns)]


def parts(*turns: str) -> list[dict[str, Any]]:
    return [
        m | {"content": [{"type": "text", "text": m["content"][:1]}, {"type": "text", "text": m["content"][1:]}]}
        for m in say(*turns)
    ]


HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: why?\n\nAssistant:"
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sharegpt": ({"conversations": SHAREGPT, "chosen": GPT_YES, "rejected": GPT_NO}, PLAIN),
    "sharegpt, system": (
        {"conversations": SHAREGPT, "chosen": GPT_YES, "rejected": GPT_NO, "system": "be kind"}, WITH_SYSTEM),
    "sharegpt, system inside": (
        {"conversations": [{"from": "system", "value": "be kind"}, *SHAREGPT], "chosen": GPT_YES, "rejected": GPT_NO},
        WITH_SYSTEM),
    "sharegpt, tools": (
        {"conversations": SHAREGPT_CALLED, "chosen": GPT_YES, "rejected": GPT_NO, "tools": json.dumps([TOOL])},
        {"chosen": [*CALLED, YES], "rejected": [*CALLED, NO], "tools": [TOOL]}),
    "sharegpt, bot": (
        {"conversations": SHAREGPT, "chosen": {"from": "bot", "value": "yes"}, "rejected": GPT_NO}, PLAIN),
    "openai names, one object": ({"conversations": say("hello", "hi", "why?"), "chosen": YES, "rejected": NO}, PLAIN),
    "messages, one object": ({"messages": say("hello", "hi", "why?"), "chosen": YES, "rejected": NO}, PLAIN),
    "alpaca": ({"instruction": "why?", "input": "", **TEXTS}, ONE),
    "alpaca, input": ({"instruction": "why", "input": "so?", **TEXTS}, row("why\nso?", chosen="yes", rejected="no")),
    "alpaca, system": ({"instruction": "why?", "input": None, "system": "be kind", **TEXTS}, ONE_SYSTEM),
    "alpaca, history": ({"instruction": "why?", "history": [["hello", "hi"]], **TEXTS}, PLAIN),
    "alpaca, older": ({"instruction": "why?", "input": "", "output": ["yes", "no"]}, ONE),
    "v1": ({"chosen_messages": v1("hello", "hi", "why?", "yes"), "rejected_messages": v1("hello", "hi", "why?", "no")},
           PLAIN),
    "swift, response": ({"messages": say("hello", "hi", "why?", "yes"), "rejected_response": "no"}, PLAIN),
    "swift, messages": ({"messages": say("hello", "hi", "why?", "yes"),
                         "rejected_messages": say("hello", "hi", "why?", "no")}, PLAIN),
    "swift, rejected answer": ({"messages": say("hello", "hi", "why?", "yes"), "rejected_messages": [NO]}, PLAIN),
    "swift, query": ({"query": "why?", "response": "yes", "rejected_response": "no", "history": [["hello", "hi"]]},
                     PLAIN),
    "orca": ({"system": "be kind", "question": "why?", **TEXTS}, ONE_SYSTEM),
    "orca, argilla": ({"system": "", "input": "why?", **TEXTS}, ONE),
    "text parts": ({"chosen": parts("why?", "yes"), "rejected": parts("why?", "no")}, ONE),
    "prompt list, texts": ({"prompt": say("hello", "hi", "why?"), **TEXTS}, PLAIN),
    "prompt object, objects": ({"prompt": say("why?")[0], "chosen": YES, "rejected": NO}, ONE),
    "hh-rlhf": ({"chosen": HH + " yes", "rejected": HH + " no"}, PLAIN),
    "hh-rlhf, prompt": ({"prompt": HH, "chosen": " yes", "rejected": " no"}, PLAIN),
    "hh-rlhf, prompt and both": ({"prompt": HH, "chosen": HH + " yes", "rejected": HH + " no"}, PLAIN),
    "hh-rlhf, prompt as text": ({"prompt": "why?", "chosen": HH + " yes", "rejected": HH + " no"}, PLAIN),
    "hh-rlhf, prompt as list": ({"prompt": say("hello", "hi", "why?"), "chosen": HH + " yes", "rejected": HH + " no"},
                                PLAIN),
    "hh-rlhf, crlf": ({"chosen": (HH + " yes").replace("\n", "\r\n"),
                       "rejected": (HH + " no").replace("\n", "\r\n")}, PLAIN),
    "hh-rlhf, lines": ({"chosen": (HH + " yes").replace("\n\n", "\n"), "rejected": (HH + " no").replace("\n\n", "\n")},
                       PLAIN),
    "hh-rlhf, lines in words": (
        {"chosen": HH + " a\nHuman: b", "rejected": HH + " no"},
        row("hello", "hi", "why?", chosen="a\nHuman: b", rejected="no")),
    "empty prompt beside conversations": (PLAIN | {"prompt": ""}, PLAIN),
    "empty prompt beside a prompt": ({"prompt": "", "conversations": SHAREGPT, "chosen": GPT_YES, "rejected": GPT_NO},
                                     PLAIN),
    "json text": ({"chosen": json.dumps(PLAIN["chosen"]), "rejected": json.dumps(PLAIN["rejected"])}, PLAIN),
    "json of json": ({"chosen": json.dumps(json.dumps(PLAIN["chosen"])),
                      "rejected": json.dumps(json.dumps(PLAIN["rejected"]))}, PLAIN),
    "python text": ({"chosen": str(PLAIN["chosen"]), "rejected": str(PLAIN["rejected"])}, PLAIN),
    "python text, answers": ({"prompt": str(say("why?")), "chosen": str([YES | {"name": None}]), "rejected": str(NO)},
                             ONE),
    "python text, quotes": ({"prompt": str(say("it's \"why\"?")), "chosen": str([YES]), "rejected": str([NO])},
                            row("it's \"why\"?", chosen="yes", rejected="no")),
    "question, json text": ({"question": json.dumps(say("hello", "hi", "why?")), **TEXTS}, PLAIN),
    "instruction, json text": ({"instruction": json.dumps(say("hello", "hi", "why?")), "input": "", **TEXTS}, PLAIN),
    "text parts, json text": (
        {"prompt": json.dumps(parts("why?")[0]["content"]), "chosen": json.dumps([{"type": "text", "text": "yes"}]),
         "rejected": "no"}, ONE),
    "text parts, json text inside": (
        {"chosen": [m | {"content": json.dumps(m["content"])} for m in parts("why?", "yes")],
         "rejected": say("why?", "no")}, ONE),
    "system beside text": ({"prompt": "why?", "system": "be kind", **TEXTS}, ONE_SYSTEM),
    "system prompt beside text": ({"prompt": "why?", "system_prompt": "be kind", "system": "", **TEXTS}, ONE_SYSTEM),
    "system prompt twice": (ONE | {"system_prompt": "be kind", "system": "be kind"}, ONE_SYSTEM),
    "a picture's prompt": ({"prompt": "why?", "image_prompt": "a cat", "has_image": True, "image": [], **TEXTS}, ONE),
    "system beside lists": (ONE | {"system": "be kind"}, ONE_SYSTEM),
    "system twice": (ONE_SYSTEM | {"system": "be kind"}, ONE_SYSTEM),
    # a prompt that both conversations repeat, more or less
    "prompt, repeated": (ONE | {"prompt": "why?"}, ONE),
    "prompt, a space": (ONE | {"prompt": "why? "}, ONE),
    "prompt, without system": (ONE_SYSTEM | {"prompt": say("why?")}, ONE_SYSTEM),
    "prompt, with system": (ONE | {"prompt": say("system: be kind", "why?")}, ONE_SYSTEM),
    "prompt, only the system": (ONE | {"prompt": say("system: be kind")}, ONE_SYSTEM),
    "prompt, its last turn": (ONE | {"prompt": say("hello", "hi", "why?")}, PLAIN),
    "prompt, the last turn": (PLAIN | {"prompt": "why?"}, PLAIN),
    "prompt, the last turn, and a system": (WITH_SYSTEM | {"prompt": "why?"}, WITH_SYSTEM),
    "instruction, repeated": (ONE | {"instruction": "why?"}, ONE),
    "ultrafeedback": (ONE | {"prompt": "why?", "messages": ONE["chosen"]}, ONE),
    "prefilled": ({"prompt": say("why?", "be"), "chosen": "cause", "rejected": "fore"},
                  row("why?", chosen="because", rejected="before")),
    "prefilled, lists": (
        {"prompt": say("why?", "be"), "chosen": [YES | {"content": "cause"}], "rejected": [YES | {"content": "fore"}]},
        row("why?", chosen="because", rejected="before")),
    "prefilled, repeated": (row("why?", chosen="because", rejected="before") | {"prompt": say("why?", "be")},
                            row("why?", chosen="because", rejected="before")),
    "prefilled, repeated in texts": (
        {"prompt": say("why?", "It is "), "chosen": "It is so", "rejected": "It is not"},
        row("why?", chosen="It is so", rejected="It is not")),
    "prefilled, repeated in answers": (
        {"prompt": say("why?", "It is"), "chosen": [YES | {"content": "It is so"}],
         "rejected": [NO | {"content": "It is not"}]},
        row("why?", chosen="It is so", rejected="It is not")),
    "prefilled, one word twice": (
        {"prompt": say("why?", "ha"), "chosen": "haha", "rejected": "hah"},
        row("why?", chosen="hahaha", rejected="hahah")),
    "prefilled, repeated once": (
        {"prompt": say("why?", "It is "), "chosen": "It is so", "rejected": "not"},
        row("why?", chosen="It is It is so", rejected="It is not")),
    "an answer about humans": ({"prompt": "Define one", "chosen": "Human: an ape", "rejected": "Human: a robot"},
                               row("Define one", chosen="Human: an ape", rejected="Human: a robot")),
    "a prompt that both answers begin with": ({"prompt": "The", "chosen": "The cat", "rejected": "The dog"},
                                              row("The", chosen="The cat", rejected="The dog")),
    "prompt that ends in an answer": (
        {"prompt": say("hello", "hi"), "chosen": say("why?", "yes"), "rejected": say("why?", "no")}, PLAIN),
}  # fmt: skip


def tokens(pair: PreferencePair, mask: str = "all_assistant") -> Any:
    made = encode_pair(pair, tiny_tokenizer("minimind3"), max_length=512, completion_mask=mask)
    sides = (made.chosen_input_ids, made.chosen_completion_mask, made.rejected_input_ids)
    return (*sides, made.rejected_completion_mask)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_the_plain_conversation(name: str) -> None:
    given, plain = FORMS[name]
    pair, expected = parse_line(json.dumps(given).encode(), "f:1"), parse_row(plain, "f:1")
    assert (pair.chosen, pair.rejected, pair.tools) == (expected.chosen, expected.rejected, expected.tools)
    assert tokens(pair) == tokens(expected)
    assert tokens(pair, "final_turn")[::2] == tokens(expected, "final_turn")[::2]


def test_a_prefilled_beginning_is_the_prompts() -> None:
    pair = parse_row({"prompt": say("why?", "Well, you"), "chosen": " see", "rejected": " know"}, "x")
    ids, mask, *_ = tokens(pair, "final_turn")
    counted = [token for token, counts in zip(ids, mask, strict=True) if counts]
    assert tiny_tokenizer("minimind3").decode(counted) == " see<|im_end|>\n"
    ids, mask, *_ = tokens(pair)
    counted = [token for token, counts in zip(ids, mask, strict=True) if counts]
    assert "Well, you see<|im_end|>\n" in tiny_tokenizer("minimind3").decode(counted)


def test_a_token_that_reaches_into_the_answer_counts() -> None:
    """` user` and ` assistant` are tokens: with the prompt's last space they begin before the answer does."""
    pair = parse_row({"prompt": say("why?", "a question "), "chosen": "user", "rejected": "assistant"}, "x")
    tokenizer = tiny_tokenizer("minimind3")
    assert len(tokenizer(" user")["input_ids"]) == len(tokenizer(" assistant")["input_ids"]) == 1
    made = tokens(pair, "final_turn")
    for (ids, mask), words in zip((made[:2], made[2:]), (" user", " assistant"), strict=True):
        counted = [token for token, counts in zip(ids, mask, strict=True) if counts]
        assert tokenizer.decode(counted) == f"{words}<|im_end|>\n"
    bare = tiny_tokenizer(None)
    plain = parse_row({"prompt": "a question ", "chosen": "user", "rejected": "assistant"}, "x")
    side = encode_pair(plain, bare, max_length=99, completion_mask="all_assistant")
    assert side.chosen_completion_mask[-2:] == [1, 1] and sum(side.chosen_completion_mask) == 2


@pytest.mark.parametrize(
    "bad, message",
    [
        (ONE | {"prompt": "where?"}, "chosen is a whole conversation, and prompt says something else"),
        (ONE_SYSTEM | {"prompt": say("system: be rude", "why?")}, "two different system messages"),
        (ONE_SYSTEM | {"system": "be rude"}, "two different system messages"),
        (ONE | {"prompt": say("why?", "no"), "rejected": say("why?", "yes")}, "prompt says something else"),
        ({"chosen": say("why?", "yes"), "rejected": say("why? ", "no"), "prompt": "why?"}, "repeat the prompt differ"),
        ({"prompt": "where?", "chosen": HH + " yes", "rejected": HH + " no"}, "prompt says something else"),
        ({"prompt": "a", "question": "b", **TEXTS}, "its prompt stands in prompt and in question"),
        ({"conversations": SHAREGPT, "instruction": "b", **TEXTS}, "in conversations and in instruction"),
        ({"messages": say("a", "b"), "rejected_response": "c", **TEXTS}, "its answers stand in chosen"),
        ({"instruction": "a", "output": ["b"]}, "output must hold two answers"),
        ({"instruction": "a", "output": "b"}, "found the keys instruction, output; accepted rows"),
        ({"prompt": json.dumps(say("why?"))[:-1], **TEXTS}, "prompt begins as messages do"),
        ({"prompt": "why?", "chosen": str([YES])[:-1], "rejected": "no"}, "chosen begins as messages do"),
        ({"prompt": "why?", "chosen": json.dumps(YES)[:-1], "rejected": "no"}, "chosen begins as messages do"),
        ({"prompt": str(say("a", "b", "c")).replace(",", "\n"), **TEXTS}, "prompt begins as messages do"),
        ({"prompt": f"array({say('a')}, dtype=object)", **TEXTS}, "prompt begins as messages do"),
        ({"prompt": json.dumps([{"type": "image", "image": "x.png"}]), **TEXTS}, "is of the type 'image'"),
        ({"messages": say("a", "b"), "rejected_response": ["c", "d"]}, "rejected_response must be one text"),
        ({"chosen": "a", "rejected": "b"}, "plain-text answers need a prompt"),
        ({"chosen": HH + " yes", "rejected": "no"}, "plain-text answers need a prompt"),
        ({"conversations": [{"from": "function_call", "value": "f()"}], **TEXTS}, r"conversations\[0\]|prompt\[0\]"),
        ({"conversations": SHAREGPT, "chosen": GPT_YES, "rejected": GPT_NO, "images": ["x"]}, "images: only text"),
        ({"prompt": [*CALLED[:2]], **TEXTS}, "prompt ends with a tool call"),
    ],
)
def test_what_can_be_read_in_two_ways_names_its_row(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"^f:3: .*({message})"):
        parse_row(bad, "f:3")


@pytest.mark.parametrize(
    "words",
    [
        json.dumps(say("hi")) + " What does this say?",
        '[{"role": role, "content": words}]',
        '{"from": "Paris", "to": "Rome"}',
        '[{"type": "button", "text": "go"}]',
        "{'a': 1}",
        '["yes", "no"]',
        '"[{\\"a',
    ],
)
def test_words_that_only_look_like_messages(words: str) -> None:
    assert parse_row({"question": words, **TEXTS}, "x").chosen == say(words, "yes")
    if "from" not in words:
        assert parse_row({"prompt": words, "chosen": words + "1", "rejected": "no"}, "x").chosen == say(
            words, words + "1"
        )


def test_columns_under_other_names() -> None:
    given = {"question": "why?", "good": "yes", "bad": "no", "prompt": "not this", "output": ["x", "y"]}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert parse_row(given, "x", columns).chosen == ONE["chosen"]
    assert parse_row({"question": "why?", "prompt": "a", **TEXTS}, "x", {"prompt": "prompt"}).chosen == say("a", "yes")
    assert parse_row({"prompt": "why?", "good": "yes", "rejected": "no"}, "x", {"chosen": "good"}).plain
    optional = {"system": "sys", "weight": "w"}
    assert parse_row(ONE | {"sys": "be kind"}, "x", optional).chosen == ONE_SYSTEM["chosen"]
    assert parse_row(ONE, "x", optional).chosen == ONE["chosen"]
    with pytest.raises(RowError, match="x: columns: no column good, only prompt, chosen, rejected"):
        parse_row({"prompt": "a", **TEXTS}, "x", {"chosen": "good"})
