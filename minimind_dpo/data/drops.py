"""Which rows teach nothing, and why: the one copy of these rules, for training and for `data check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minimind_dpo.config import TEMPLATE_DATE
from minimind_dpo.data.chat import WHOLE, TokenizedPair, check_settings, cut, encode_pair
from minimind_dpo.data.records import PreferencePair
from minimind_dpo.data.said import is_empty
from minimind_dpo.data.spans import SpanError


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """Why a row became no pair: a short reason to count by, and a sentence that begins with its place.

    Reasons of pairs that can't teach anything: `template_hides_turns`, `empty_answer`, `identical_sides`,
    `no_completion_token`, `identical_after_truncation`. A row that is `malformed` has the reason of its `RowError`.
    """

    reason: str
    message: str
    malformed: bool = False


def tokenize_pair(
    pair: PreferencePair, tokenizer: Any, *, max_length: int, completion_mask: str, template_date: str = TEMPLATE_DATE
) -> TokenizedPair | DroppedRow:
    """Both sides of a pair as tokens, or why the pair has no signal.

    Args:
        pair: a validated pair.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens a side may have; more are cut off on the right.
        completion_mask: `all_assistant` counts every assistant turn, `final_turn` those after the messages that
            both sides share. A turn reaches from the first token after its header through its end marker.
        template_date: what a chat template takes for today, `YYYY-MM-DD`.

    Raises:
        RowError: the chat template refuses the conversation, or the text can't be encoded.
        UserError: no pair at all can be tokenized with this tokenizer or these settings.
    """
    check_settings(tokenizer, max_length, completion_mask)
    whole = encode_whole(pair, tokenizer, completion_mask, template_date)
    if isinstance(whole, DroppedRow):
        return whole
    return find_drop(pair, whole, max_length) or cut(whole, max_length)


def encode_whole(
    pair: PreferencePair, tokenizer: Any, completion_mask: str, template_date: str = TEMPLATE_DATE
) -> TokenizedPair | DroppedRow:
    """Both sides as tokens, nothing cut off, or why not; arguments and errors are those of `tokenize_pair`."""
    try:
        return encode_pair(
            pair, tokenizer, max_length=WHOLE, completion_mask=completion_mask, template_date=template_date
        )
    except SpanError as error:
        return DroppedRow("template_hides_turns", f"{pair.place}: can't tell where the answer lies: {error}")


def find_drop(pair: PreferencePair, whole: TokenizedPair, max_length: int) -> DroppedRow | None:
    """Why the pair has no signal within `max_length` tokens a side, or None; the first reason that holds.

    Args:
        pair: as it was read.
        whole: its tokens, nothing cut off.
        max_length: tokens a side may have.
    """
    for name, messages in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if is_empty(messages[-1]):
            return DroppedRow("empty_answer", f"{pair.place}: the {name} answer is empty")
    if whole.chosen_input_ids == whole.rejected_input_ids:
        return DroppedRow("identical_sides", f"{pair.place}: both sides have the same tokens")
    for name, mask in (("chosen", whole.chosen_completion_mask), ("rejected", whole.rejected_completion_mask)):
        if not any(mask[:max_length]):
            message = f"{pair.place}: none of the {name} answer's tokens is left within max_length {max_length}"
            return DroppedRow("no_completion_token", message)
    if whole.chosen_input_ids[:max_length] == whole.rejected_input_ids[:max_length]:
        message = f"{pair.place}: both sides have the same tokens within max_length {max_length}"
        return DroppedRow("identical_after_truncation", message)
    return None
