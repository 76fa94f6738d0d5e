"""Ids are the tokenizer's own for every text as a whole; masks say which tokens begin in a span."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from helpers_data import CORPUS, FAMILIES, say, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minimind_dpo.data.chat import encode_pair
from minimind_dpo.data.encoding import encode_texts, mask_tokens
from minimind_dpo.data.records import PreferencePair
from minimind_dpo.data.spans import SpanError, chat_template

PIECES = [
    "hello", "the assistant", "don't", "'s", "I'LL'll", "42", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x1c",
    "\x0b",
    "\x85", "\xa0", "!?", "...", "_", "naïve", "e\u0301", "\u0301", "你好", "🙂", "👩‍👩‍👧", "\u200b", "<", "|>",
    "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n", "<|endoftext|>", "<|im_start", "im_end|>",
    "<think>", "</think>", "<tool_response>", "</s>", "[INST]", "<|eot_id|>", "▁", "\x00", "MARKA0MARK",
]  # fmt: skip
NASTY = st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.text(max_size=12))


def trained(normalizer: Any, pre_tokenizer: Any, tokens: list[Any], post: Any = None) -> Any:
    """A tokenizer of the given parts with MiniMind's template and `tokens` added."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator(CORPUS * 4, trainer)
    if post is not None:
        backend.post_processor = post
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = tiny_tokenizer("minimind2").chat_template
    return tokenizer


def special(content: str, **options: bool) -> AddedToken:
    return AddedToken(content, special=True, normalized=False, **options)


MARKS = [special("<|im_start|>"), special("<|im_end|>")]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
MADE: dict[str, Any] = {
    "bytes": lambda: trained(None, BYTES, MARKS),
    "trimmed offsets": lambda: trained(None, BYTES, MARKS, processors.ByteLevel(trim_offsets=True)),
    "prefix space": lambda: trained(None, pre_tokenizers.ByteLevel(add_prefix_space=True), MARKS),
    "composed": lambda: trained(normalizers.NFC(), BYTES, MARKS),
    "no splitting": lambda: trained(None, None, MARKS),
    "metaspace": lambda: trained(None, pre_tokenizers.Metaspace(prepend_scheme="always"), MARKS),
    "llama 2": lambda: trained(LLAMA_2, None, MARKS),
    "more tokens": lambda: trained(
        None, BYTES, [*MARKS, AddedToken("hello", single_word=True), special("!?", lstrip=True),
                      special("42", rstrip=True), AddedToken("the ", normalized=True)]),
    "greedy to the left": lambda: trained(None, BYTES, [special(mark.content, lstrip=True) for mark in MARKS]),
}  # fmt: skip


@cache
def made(name: str) -> Any:
    return MADE[name]()


def first_characters(offsets: list[tuple[int, int]]) -> list[int]:
    """Where each token begins; one that is reported empty begins where the last one with characters ended."""
    firsts, end = [], 0
    for start, stop in offsets:
        firsts.append(start if start != stop else min(start, end))
        end = stop if start != stop else end
    return firsts


def check(tokenizer: Any, texts: list[str], spans: list[list[tuple[int, int]]]) -> None:
    """Ids against those of each text by itself, masks against one question a token."""
    for text, counted, (ids, masked) in zip(texts, spans, encode_texts(tokenizer, texts, spans), strict=True):
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids == whole["input_ids"]
        firsts = first_characters(whole["offset_mapping"])
        mask = [int(any(start <= first < end for start, end in counted)) for first in firsts]
        assert masked == [0, *mask[1:]][: len(mask)]


def check_talk(tokenizer: Any, turns: list[str], answers: tuple[str, str]) -> None:
    """A conversation with two answers, rendered."""
    template = chat_template(tokenizer)
    texts, spans = [], []
    for answer in answers:
        asked = zip(("user", "assistant") * len(turns), turns, strict=False)
        talk = say(*(f"{role}: {said}" for role, said in asked), f"assistant: {answer}")
        text = template.render(talk)
        indices = [index for index, message in enumerate(talk) if message["role"] == "assistant"]
        try:
            spans.append([template.assistant_span(text, talk, None, index) for index in indices])
        except SpanError:
            spans.append([])
        texts.append(text)
    check(tokenizer, texts, spans)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=30, deadline=None)
@given(st.lists(NASTY, min_size=1, max_size=4), st.tuples(NASTY, NASTY))
def test_conversations_with_every_kind_of_tokenizer(name: str, turns: list[str], answers: tuple[str, str]) -> None:
    check_talk(made(name), turns, answers)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(st.lists(NASTY, min_size=2, max_size=2), st.tuples(NASTY, NASTY))
def test_conversations_in_every_template(family: str, words: list[str], answers: tuple[str, str]) -> None:
    check_talk(tiny_tokenizer(family), [*words, words[0]], answers)


@pytest.mark.parametrize("name", ["bytes", "trimmed offsets", "metaspace", "greedy to the left"])
@settings(max_examples=60, deadline=None)
@given(st.lists(NASTY, min_size=1, max_size=3), st.data())
def test_any_text_and_any_span(name: str, texts: list[str], data: st.DataObject) -> None:
    spans = []
    for text in texts:
        places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
        spans.append([(a, b) for a, b in zip(places[::2], places[1::2], strict=False)])
    check(made(name), texts, spans)


def test_mask_tokens_by_hand() -> None:
    #         a        b      c       of one character   spaces, reported empty
    offsets = [(0, 2), (2, 3), (3, 4), (3, 4), (4, 6), (8, 8), (8, 9)]
    assert mask_tokens(offsets, [(3, 4)]) == [0, 0, 1, 1, 0, 0, 0]
    assert mask_tokens(offsets, [(6, 8)]) == [0, 0, 0, 0, 0, 1, 0]
    assert mask_tokens(offsets, [(0, 1), (5, 9)]) == [0, 0, 0, 0, 0, 1, 1]
    assert mask_tokens([], []) == []
    assert mask_tokens(offsets, [(1, 3), (5, 9)], inside=True) == [0, 1, 0, 0, 0, 1, 1]
    assert mask_tokens(offsets, [(5, 9)], inside=True) == [0, 0, 0, 0, 1, 1, 1]
    assert mask_tokens(offsets, [(4, 9)], inside=True) == [0, 0, 0, 0, 1, 1, 1]


def test_state_left_by_earlier_calls_has_no_effect() -> None:
    tokenizer = trained(None, BYTES, MARKS)
    text = "<|im_start|>user\nhello 你好 there<|im_end|>\n<|im_start|>assistant\n"
    expected = encode_texts(tokenizer, [text], [[(4, 20)]])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert encode_texts(tokenizer, [text], [[(4, 20)]]) == expected


def test_a_span_that_begins_inside_a_word() -> None:
    """An answer that opens with a newline, which merges with the header's."""
    talk = say("question", "\n\nhello")
    tokenizer = tiny_tokenizer("minimind2")
    pair = PreferencePair(talk, say("question", "no"), 1, "f:1")
    done = encode_pair(pair, tokenizer, max_length=99, completion_mask="final_turn")
    counted = [token for token, on in zip(done.chosen_input_ids, done.chosen_completion_mask, strict=True) if on]
    text = tokenizer.decode(counted)
    assert "\n\nhello<|im_end|>\n".endswith(text) and text.endswith("hello<|im_end|>\n")
