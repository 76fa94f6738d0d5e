"""What makes a pair that training would keep doubtful. Each rule returns what it saw, or None."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from minimind_dpo.data.chat import TokenizedPair
from minimind_dpo.data.forms import is_whole, transcript
from minimind_dpo.data.records import PreferencePair
from minimind_dpo.data.said import asked, is_long, plain_words


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Of a tokenizer: the token that begins a text (None where it has none), and those that can end an answer."""

    bos: int | None
    bos_text: str
    ends: frozenset[int]
    blanks: dict[int, bool] = field(default_factory=dict)  # what has been asked so far


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> SpecialTokens:
    """A tokenizer's; any special token may end an answer, unless it is there to begin texts or to stand for others."""
    special = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    ends = ({*special, *tokenizer.all_special_ids} - others) | {tokenizer.eos_token_id}
    return SpecialTokens(tokenizer.bos_token_id, tokenizer.bos_token or "", frozenset(ends - {None}))


def prompt_difference(pair: PreferencePair) -> str | None:
    """Whether the two sides answer different prompts: they part at something that was said to the assistant."""
    at = pair.prompt_messages
    chosen, rejected = pair.chosen[at], pair.rejected[at]
    if chosen == rejected and len(pair.chosen) != len(pair.rejected):
        return f"one side goes on after message {at + 1}, where the other ends"
    roles = {chosen["role"], rejected["role"]}
    if roles != {"assistant"}:
        return f"the sides differ from message {at + 1} on ({' and '.join(sorted(roles))}), before the answers"
    return None


def early_parting(pair: PreferencePair) -> str | None:
    """Whether the two sides part at an answer before their last one, as two trajectories do."""
    at = pair.prompt_messages
    last = at == len(pair.chosen) - 1 == len(pair.rejected) - 1
    return None if last or prompt_difference(pair) else f"the sides part at message {at + 1}, an earlier answer"


def repeated_prompt(pair: PreferencePair) -> str | None:
    """Whether the answers say the prompt again: both begin with it, or one is a whole transcript."""
    answers = pair.chosen[pair.prompt_messages], pair.rejected[pair.prompt_messages]
    if any(message["role"] != "assistant" for message in answers):
        return None
    texts = [str(message["content"] or "").removeprefix(pair.prefill) for message in answers]
    if any(is_whole(transcript(text)) for text in texts):
        return "an answer is a whole transcript (Human: ... Assistant: ...)"
    begun = plain_words(pair.prefill)
    question = next((words for role, words in reversed(asked(pair)) if role == "user"), "")
    for what, words, known in (
        ("that the prompt begins them with", begun, len(begun) > 3),
        ("of the prompt", question, is_long(question)),
    ):
        if known and all(plain_words(text).startswith(words) for text in texts):
            return f"both answers begin with the words {what}"
    return None


def empty_prompt(pair: PreferencePair, tokenizer: Any) -> str | None:
    """Whether a turn that should ask something has no words; without a template it has no turn either."""
    silent = [role for role, words in asked(pair) if role == "user" and not words]
    return "what the user says is empty" if silent and tokenizer.chat_template else None


def double_bos(pair: PreferencePair, whole: TokenizedPair, tokenizer: Any) -> str | None:
    """Whether a side begins with the beginning-of-text token twice, or a message brings its own along.

    Only where the text begins with it already: `<s><s>[INST] ...`, `<s>[INST] <s>...`.
    """
    tokens = special_tokens(tokenizer)
    if tokens.bos is None:
        return None
    sides = (("chosen", pair.chosen, whole.chosen_input_ids), ("rejected", pair.rejected, whole.rejected_input_ids))
    for name, messages, ids in sides:
        if ids[0] != tokens.bos:
            continue
        if ids[1] == tokens.bos:
            return f"{name} begins with {tokens.bos_text} twice"
        # Without a template the text begins with the first message, whose token is then the only one.
        for index, message in enumerate(messages):
            brings = str(message.get("content") or "").lstrip().startswith(tokens.bos_text)
            if brings and (index > 0 or tokenizer.chat_template):
                return f"message {index + 1} of {name} begins with {tokens.bos_text}, which is there already"
    return None


def missing_end_token(whole: TokenizedPair, tokenizer: Any) -> str | None:
    """Whether an answer's last counted token, white space aside, is none that ends an answer."""
    tokens = special_tokens(tokenizer)
    sides = (
        ("chosen", whole.chosen_input_ids, whole.chosen_completion_mask),
        ("rejected", whole.rejected_input_ids, whole.rejected_completion_mask),
    )
    for name, ids, mask in sides:
        last = bytes(mask).rindex(1)
        while last > 0 and mask[last] and _is_blank(ids[last], tokens, tokenizer):
            last -= 1
        if ids[last] not in tokens.ends:
            return f"the {name} answer ends with {tokenizer.decode([ids[last]])!r}, not with an end token"
    return None


def _is_blank(token: int, tokens: SpecialTokens, tokenizer: Any) -> bool:
    if token not in tokens.blanks:
        tokens.blanks[token] = not tokenizer.decode([token], skip_special_tokens=False).strip()
    return tokens.blanks[token]
