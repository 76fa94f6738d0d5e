from __future__ import annotations

import random
from typing import Any

import pytest
from helpers_data import CORPUS, FAMILIES, row, say, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minimind_dpo.data.chat import TokenizedPair, encode_pair, load_tokenizer, shared_prefix_length
from minimind_dpo.data.drops import DroppedRow, tokenize_pair
from minimind_dpo.data.records import PreferencePair, RowError, parse_row
from minimind_dpo.data.spans import chat_template
from minimind_dpo.errors import UserError

CHAT_ML = ("minimind2", "minimind3", "smollm2", "qwen3")
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


def with_template(template: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(None).backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def counted(
    tokenizer: Any, messages: list[dict[str, Any]], mask: str = "all_assistant", tools: Any = None, shared: int = 0
) -> list[str]:
    """The runs of completion tokens as text; also checks that they are what the spans say."""
    pair = PreferencePair(
        chosen=messages,
        rejected=[*messages[:-1], {"role": "assistant", "content": "other words"}],
        prompt_messages=shared or len(messages) - 1,
        place="here:1",
        tools=tools,
    )
    done = tokenize_pair(pair, tokenizer, max_length=4096, completion_mask=mask)
    assert isinstance(done, TokenizedPair), done
    runs: list[list[int]] = []
    before = 0
    for token, counts in zip(done.chosen_input_ids, done.chosen_completion_mask, strict=True):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


END = {"llama3": "<|eot_id|>", "llama3_2": "<|eot_id|>"} | dict.fromkeys(CHAT_ML, "<|im_end|>\n")
END |= dict.fromkeys(("mistral_v0.2", "mistral_v0.3", "mistral_nemo"), "</s>")
END["deepseek_r1_distill"] = "<｜end▁of▁sentence｜>"


def answer(family: str, words: str, last: bool = True) -> str:
    """What a plain answer looks like in a family's template, from the first counted character."""
    thinks = family == "minimind3" or (family == "qwen3" and last)
    lead = "<think>\n\n</think>\n\n" if thinks else " " if family == "mistral_v0.3" else ""
    return lead + words + END[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_single_and_multi_turn(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    assert counted(tokenizer, say("question", "hello there")) == [answer(family, "hello there")]
    talk = say("question", "one", "and then?", "two", "what else?", "three")
    expected = [answer(family, "one", False), answer(family, "two", False), answer(family, "three")]
    assert counted(tokenizer, talk) == expected
    assert counted(tokenizer, talk, mask="final_turn") == expected[-1:]
    assert counted(tokenizer, talk, mask="final_turn", shared=2) == expected[1:]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral_v0.2"])
def test_system_prompt(family: str) -> None:
    talk = say("system: be brief", "question", "hello")
    assert counted(tiny_tokenizer(family), talk) == [answer(family, "hello")]


@pytest.mark.parametrize("family, prompt", [("minimind2", "You are a helpful assistant"), ("smollm2", "SmolLM")])
def test_default_system_prompt_is_rendered_and_does_not_count(family: str, prompt: str) -> None:
    tokenizer = tiny_tokenizer(family)
    text = chat_template(tokenizer).render(say("question", "hello"))
    assert prompt in text
    assert counted(tokenizer, say("question", "hello")) == ["hello<|im_end|>\n"]


@pytest.mark.parametrize("family", FAMILIES)
def test_forged_markers_do_not_count(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    # Everything the template itself puts around an answer, typed by the user.
    real = chat_template(tokenizer).render(say("question", "forged", "question"))
    header = chat_template(tokenizer).render(say("question"), add_generation_prompt=True)
    for forgery in (real, header, f"MARKA0MARK {real} MARKB0MARK", real + header):
        talk = say(forgery, "one", f"x{forgery}", "two")
        assert counted(tokenizer, talk) == [answer(family, "one", False), answer(family, "two")]


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_inside_an_answer_count_to_the_real_end(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    words = f"a{END[family]}b{END[family]}c"
    assert counted(tokenizer, say("question", words, "more", "two")) == [
        answer(family, words, False),
        answer(family, "two"),
    ]


PIECES = ["hello", "你好", " ", "\n", "MARKA0MARK", "assistant", "{", "words1", "question", "[/INST]", "</s>"]
PIECES += ["<|im_start|>assistant\n", "<|im_end|>\n", "<|eot_id|>", "<｜Assistant｜>"]
PIECES += ["<|start_header_id|>assistant<|end_header_id|>\n\n"]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_spans_are_exact_whatever_is_said(family: str, answers: list[list[str]], data: st.DataObject) -> None:
    """Slices of the rendered text, for answers and questions made of every family's markers."""
    words = ["".join(pieces).strip() or "x" for pieces in answers]
    questions = ["".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=4))).strip() for _ in words]
    talk = say(*(f"{role}: {said}" for pair in zip(questions, words, strict=True)
                 for role, said in zip(("user", "assistant"), pair, strict=True)))  # fmt: skip
    template = chat_template(tiny_tokenizer(family))
    text = template.render(talk)
    for turn, said in enumerate(words):
        start, end = template.assistant_span(text, talk, None, 2 * turn + 1)
        assert text[start:end] == answer(family, said, last=turn == len(words) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_tokenizers_own_way(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    talk = say("a question", "hello there", "and then?", "thank you")
    pair = PreferencePair(talk, [*talk[:-1], *say("assistant: no")], 3, "f:1")
    done = tokenize_pair(pair, tokenizer, max_length=512, completion_mask="final_turn")
    assert isinstance(done, TokenizedPair)
    options = {"date_string": "26 Jul 2024"} if family == "llama3_2" else {}
    assert done.chosen_input_ids == tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("family, trims", [("llama3", True), ("mistral_v0.3", True), ("minimind2", False)])
def test_spaces_around_an_answer(family: str, trims: bool) -> None:
    expected = "  hello  " if not trims else "hello"
    assert counted(tiny_tokenizer(family), say("question", "  hello  ")) == [answer(family, expected)]


def test_thinking_blocks_belong_to_the_answer() -> None:
    for family in ("minimind3", "qwen3"):
        tokenizer = tiny_tokenizer(family)
        talk = say("question", "hello")
        talk[-1]["reasoning_content"] = "let me see"
        assert counted(tokenizer, talk) == ["<think>\nlet me see\n</think>\n\nhello<|im_end|>\n"]
        inline = say("question", "<think>\nlet me see\n</think>\n\nhello")
        assert counted(tokenizer, inline) == ["<think>\nlet me see\n</think>\n\nhello<|im_end|>\n"]


def test_qwen3_forgets_earlier_thoughts() -> None:
    talk = say("question", "<think>\nsecret\n</think>\n\none", "more", "two")
    expected = [answer("qwen3", "one", False), answer("qwen3", "two")]
    assert counted(tiny_tokenizer("qwen3"), talk) == expected
    assert "secret" in "".join(counted(tiny_tokenizer("minimind3"), talk))


def test_qwen3_tool_results_written_by_the_user() -> None:
    """Qwen3 looks at the user's words to find the last real question; a stand-in of the same shape would mislead."""
    talk = say("question", "one", "<tool_response>42</tool_response>", "two")
    counts = counted(tiny_tokenizer("qwen3"), talk)
    assert counts == ["one<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"]


def tool_talk(content: str | None) -> list[dict[str, Any]]:
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "<|im_start|>assistant\n{sunny}", "tool_call_id": "abcdefghi"}
    return [*say("weather?"), call, result, {"role": "assistant", "content": "it is sunny"}]


@pytest.mark.parametrize(
    "family, call, last",
    [
        ("minimind2", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', ""),
        (
            "minimind3",
            '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            "<think>\n\n</think>\n\n",
        ),
        (
            "qwen3",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            "<think>\n\n</think>\n\n",
        ),
        ("llama3_2", '{"name": "weather", "parameters": {"city": "Paris"}}', ""),
        ("mistral_v0.3", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]', " "),
        ("mistral_nemo", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]', ""),
    ],
)
def test_tool_turns(family: str, call: str, last: str) -> None:
    expected = [call + END[family], last + "it is sunny" + END[family]]
    for tools in (None, [TOOL]):
        assert counted(tiny_tokenizer(family), tool_talk(None), tools=tools) == expected
        assert counted(tiny_tokenizer(family), tool_talk(None), "final_turn", tools) == expected[1:]


def test_words_before_a_tool_call_count() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert counted(tiny_tokenizer("minimind2"), tool_talk("let me look"))[0] == f"let me look\n{call}<|im_end|>\n"


def test_an_answer_after_a_tool_without_a_header() -> None:
    """DeepSeek's template announces answers with a header, but not the one that follows a tool's output."""
    talk = say("weather?", "let me look", "tool: <｜Assistant｜>sunny", "assistant: it is sunny", "thanks", "bye")
    end = "<｜end▁of▁sentence｜>"
    expected = [f"let me look{end}", f"it is sunny{end}", f"bye{end}"]
    assert counted(tiny_tokenizer("deepseek_r1_distill"), talk) == expected


def test_a_call_that_is_not_closed_is_a_counted_drop() -> None:
    """The end marker of the *next* turn must not be taken for that of the call."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    tokenizer = with_template(template)
    pair = parse_row({"chosen": tool_talk(None), "rejected": [*tool_talk(None)[:-1], *say("assistant: no")]}, "f:1")
    done = tokenize_pair(pair, tokenizer, max_length=99, completion_mask="all_assistant")
    assert isinstance(done, DroppedRow) and done.reason == "template_hides_turns" and done.message.startswith("f:1: ")


def test_template_that_leaves_tool_calls_out_is_a_counted_drop() -> None:
    pair = parse_row(
        {
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            "rejected": say("q", "a"),
        },
        "f:1",
    )
    done = tokenize_pair(pair, tiny_tokenizer("llama3"), max_length=99, completion_mask="all_assistant")
    assert isinstance(done, DroppedRow) and done.reason == "template_hides_turns"


def test_template_that_rewrites_earlier_turns_is_a_counted_drop() -> None:
    tokenizer = with_template(
        "{{ messages[-1].content | length }}{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    )
    done = tokenize_pair(parse_row(row("q", chosen="a longer answer"), "f:1"), tokenizer, max_length=99,
                         completion_mask="final_turn")  # fmt: skip
    assert isinstance(done, DroppedRow) and done.reason == "template_hides_turns"


def test_refused_conversation_names_its_place() -> None:
    pair = parse_row({"chosen": say("user: a", "user: b", "x"), "rejected": say("user: a", "user: b", "y")}, "f:9")
    with pytest.raises(RowError, match="f:9: the chat template refuses .* must alternate") as caught:
        tokenize_pair(pair, tiny_tokenizer("mistral_v0.2"), max_length=99, completion_mask="final_turn")
    assert caught.value.reason == "template_error"


def test_conversation_that_starts_with_the_assistant() -> None:
    talk = [{"role": "assistant", "content": "welcome"}, *say("question", "hello")]
    assert counted(tiny_tokenizer("llama3"), talk) == ["welcome<|eot_id|>", "hello<|eot_id|>"]
    assert counted(tiny_tokenizer("minimind2"), talk) == ["welcome<|im_end|>\n", "hello<|im_end|>\n"]


def test_date_in_a_template_does_not_change_from_day_to_day() -> None:
    text = chat_template(tiny_tokenizer("llama3_2")).render(say("question", "hello"))
    assert "Today Date: 26 Jul 2024" in text


def done(pair: dict[str, Any], tokenizer: Any = None, max_length: int = 512, mask: str = "all_assistant") -> Any:
    tokenizer = tokenizer or tiny_tokenizer()
    return tokenize_pair(parse_row(pair, "f.jsonl:3"), tokenizer, max_length=max_length, completion_mask=mask)


def test_columns_travel_with_the_pair() -> None:
    pair = done(row("question", weight=0.5, margin=2, id="x7"))
    assert (pair.weight, pair.margin, pair.id, pair.place) == (0.5, 2.0, "x7", "f.jsonl:3")


@pytest.mark.parametrize(
    "pair, reason",
    [
        (row("question", chosen="same", rejected="same"), "identical_sides"),
        (row("question", rejected=" \n "), "empty_answer"),
        (row("question", chosen=""), "empty_answer"),
        (row("question " * 200), "no_completion_token"),
        (row("question " * 200, chosen="same", rejected="same"), "identical_sides"),  # whatever max_length is
    ],
)
@pytest.mark.parametrize("mask", ["all_assistant", "final_turn"])
def test_pairs_without_signal_are_dropped(pair: dict[str, Any], reason: str, mask: str) -> None:
    drop = done(pair, max_length=64, mask=mask)
    assert isinstance(drop, DroppedRow)
    assert drop.reason == reason and drop.message.startswith("f.jsonl:3: ")


def test_answers_cut_off_behind_earlier_turns() -> None:
    pair = row("a", "b", "question " * 200)
    assert done(pair, max_length=64).reason == "identical_after_truncation"
    assert done(pair, max_length=64, mask="final_turn").reason == "no_completion_token"


def test_plain_text() -> None:
    texts = {"prompt": "question ", "chosen": "hello there", "rejected": "no"}
    assert done(texts).chosen_input_ids == done(row("question ", chosen="hello there", rejected="no")).chosen_input_ids
    bare = tiny_tokenizer(None)
    pair = done(texts, bare)
    assert bare.decode(pair.chosen_input_ids) == "question hello there<|im_end|>"
    split = len(bare("question ")["input_ids"])
    assert pair.chosen_completion_mask[-1] == 1 and sum(pair.chosen_completion_mask) in (
        len(pair.chosen_input_ids) - split,
        len(pair.chosen_input_ids) - split + 1,
    )
    with pytest.raises(UserError, match="f.jsonl:3: the tokenizer has no chat template"):
        done(row("question"), bare)
    assert done({"prompt": "", "chosen": "hello", "rejected": "no"}, bare).chosen_completion_mask[0] == 0


@pytest.mark.parametrize("kwargs", [{"max_length": 1}, {"mask": "everything"}])
def test_wrong_settings(kwargs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        done(row("question"), **kwargs)


def test_broken_surrogates_name_their_place() -> None:
    with pytest.raises(RowError, match=r"f.jsonl:3: .*encoded") as caught:
        done(row("a \ud800 b"))
    assert caught.value.reason == "not_utf8"


def test_shared_prefix_leaves_each_side_a_token() -> None:
    assert shared_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_prefix_length([1, 2], [1, 2, 3]) == 1
    assert shared_prefix_length([1], [2]) == shared_prefix_length([1], [1, 2]) == shared_prefix_length([], [1]) == 0


def test_load_tokenizer_errors(tmp_path: Any) -> None:
    for name, message in [
        (tmp_path, "no tokenizer in this directory"),
        (tmp_path / "absent", "no such directory"),
        ("./absent", "no such directory"),
        (__file__, "a file holds no tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(name)


def original_mask(ids: list[int], opening: list[int], closing: list[int], length: int) -> list[int]:
    """MiniMind's way, for comparison: everything between one token pattern and the next, found by search."""
    mask = [0] * length
    position = 0
    while position < length:
        if ids[position : position + len(opening)] != opening:
            position += 1
            continue
        start = position + len(opening)
        ends = (end for end in range(start, length) if ids[end : end + len(closing)] == closing)
        end = next(ends, length) + len(closing)
        mask[start:end] = [1] * (min(end, length) - start)
        position = end
    return mask


def original_side(tokenizer: Any, messages: list[dict[str, Any]], length: int) -> tuple[list[int], list[int]]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = tokenizer(text)["input_ids"][:length]
    padded = ids + [tokenizer.pad_token_id] * (length - len(ids))
    opening = tokenizer(f"{tokenizer.bos_token}assistant\n", add_special_tokens=False)["input_ids"]
    closing = tokenizer(f"{tokenizer.eos_token}\n", add_special_tokens=False)["input_ids"]
    mask = original_mask(padded, opening, closing, length)
    # In a cut-off answer the original's mask runs on over the padding it adds; only real tokens are compared.
    return ids, mask[: len(ids)]


WORDS = "hello world 你好 世界 🙂 naïve\n1 + 1 = 2 <b> assistant user\n\nlist:\n- a\n- b".split(" ")


def random_talk(generator: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def words(most: int) -> str:
        # The original misses the header when words begin with a newline that merges with the header's.
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most))).lstrip("\n")

    turns = [words(8) for _ in range(2 * generator.randint(0, 3) + 1)]
    prompt = ([{"role": "system", "content": words(5)}] if generator.random() < 0.3 else []) + say(*turns)
    return tuple([*prompt, {"role": "assistant", "content": words(20)}] for _ in range(2))  # type: ignore[return-value]


def compare_with_original(tokenizer: Any, seed: int, lengths: list[int] | None = None) -> int:
    """Compares ids and masks of a random pair at the given lengths, or at every length; returns the counted tokens."""
    chosen, rejected = random_talk(random.Random(seed))
    pair = parse_row({"chosen": chosen, "rejected": rejected}, "f:1")
    whole = len(original_side(tokenizer, chosen, 4096)[0])
    tokens = 0
    for length in lengths or range(2, whole + 2):
        ours = encode_pair(pair, tokenizer, max_length=length, completion_mask="all_assistant")
        assert (ours.chosen_input_ids, ours.chosen_completion_mask) == original_side(tokenizer, chosen, length)
        assert (ours.rejected_input_ids, ours.rejected_completion_mask) == original_side(tokenizer, rejected, length)
        tokens += sum(ours.chosen_completion_mask)
    return tokens


@pytest.mark.parametrize("family", ["minimind2", "minimind3"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_agrees_with_the_original_dataset(family: str, seed: int) -> None:
    compare_with_original(tiny_tokenizer(family), seed, [2, 16, 40, 64, 65, 100, 200, 1024])


@pytest.mark.parametrize("generation", [2, 3])
def test_agrees_with_the_original_dataset_on_its_own_tokenizer(shared_dir: Any, generation: int) -> None:
    tokenizer = load_tokenizer(shared_dir / f"minimind_tokenizer_v{generation}")
    assert sum(compare_with_original(tokenizer, seed, [8, 24, 50, 64, 97, 128, 1024]) for seed in range(40)) > 5000
    assert sum(compare_with_original(tokenizer, seed) for seed in range(41, 45)) > 1000  # truncation at every length


def test_metaspace_tokenizer() -> None:
    """SentencePiece-like tokens carry the space before a word; the one that opens a Mistral answer counts."""
    specials, bos, eos = FAMILIES["mistral_v0.3"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *specials], show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = tiny_tokenizer("mistral_v0.3").chat_template
    talk = say("question", "hello there", "user", "thank you")
    assert counted(tokenizer, talk) == ["hello there</s>", "thank you</s>"]
    ids = done(row("question", chosen="hello there"), tokenizer)
    first = tokenizer.convert_ids_to_tokens(ids.chosen_input_ids)[ids.chosen_completion_mask.index(1)]
    assert first.startswith("▁")
