"""Token ids and completion masks of a pair, through the tokenizer's chat template."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimind_dpo.config import COMPLETION_MASKS, TEMPLATE_DATE
from minimind_dpo.config.names import looks_local
from minimind_dpo.data.encoding import Span, encode_texts
from minimind_dpo.data.messages import Message, with_arguments
from minimind_dpo.data.records import PreferencePair, RowError
from minimind_dpo.data.spans import ChatTemplate, TemplateError, chat_template
from minimind_dpo.errors import UserError

WHOLE = sys.maxsize  # the `max_length` that cuts nothing
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of both sides; a mask is 1 where the token's log-probability counts (never at position 0).

    Ids and mask of a side have the same length, at most `max_length`; nothing is padded.
    """

    chosen_input_ids: list[int]
    chosen_completion_mask: list[int]
    rejected_input_ids: list[int]
    rejected_completion_mask: list[int]
    weight: float
    margin: float | None
    id: str | None
    place: str


def encode_pair(
    pair: PreferencePair, tokenizer: Any, *, max_length: int, completion_mask: str, template_date: str = TEMPLATE_DATE
) -> TokenizedPair:
    """Both sides of a pair as tokens, whether or not it has a signal; arguments of `tokenize_pair` in `data/drops.py`.

    Raises:
        RowError: the chat template refuses the conversation, or the text can't be encoded.
        UserError: no pair at all can be tokenized with this tokenizer or these settings.
        SpanError: the chat template hides where a turn lies.
    """
    check_settings(tokenizer, max_length, completion_mask)
    first_turn = pair.prompt_messages if completion_mask == "final_turn" else 0
    template = chat_template(tokenizer, template_date) if tokenizer.chat_template else None
    sides = (_render(pair, side, tokenizer, template, first_turn) for side in (pair.chosen, pair.rejected))
    texts, spans, inside = zip(*sides, strict=True)
    try:
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = encode_texts(tokenizer, texts, spans, all(inside))
    except (UnicodeEncodeError, TypeError) as error:  # the kind depends on the tokenizer
        raise RowError("not_utf8", f"{pair.place}: the text can't be encoded: {error}") from None
    whole = TokenizedPair(
        chosen_input_ids=chosen_ids,
        chosen_completion_mask=chosen_mask,
        rejected_input_ids=rejected_ids,
        rejected_completion_mask=rejected_mask,
        weight=pair.weight,
        margin=pair.margin,
        id=pair.id,
        place=pair.place,
    )
    return cut(whole, max_length)


def cut(pair: TokenizedPair, max_length: int) -> TokenizedPair:
    """The pair with at most `max_length` tokens a side; more are cut off on the right."""
    if max(len(pair.chosen_input_ids), len(pair.rejected_input_ids)) <= max_length:
        return pair
    return replace(
        pair,
        chosen_input_ids=pair.chosen_input_ids[:max_length],
        chosen_completion_mask=pair.chosen_completion_mask[:max_length],
        rejected_input_ids=pair.rejected_input_ids[:max_length],
        rejected_completion_mask=pair.rejected_completion_mask[:max_length],
    )


def shared_prefix_length(first: npt.ArrayLike, second: npt.ArrayLike) -> int:
    """How many tokens two sides share at their start; each keeps at least one token of its own.

    Args:
        first, second: ids [T1], [T2] of the two sides.
    """
    left, right = np.asarray(first), np.asarray(second)
    limit = max(min(len(left), len(right)) - 1, 0)
    differing = np.flatnonzero(left[:limit] != right[:limit])
    return int(differing[0]) if len(differing) else limit


def load_tokenizer(name: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory or a `.gguf` file, or of a hub id.

    Raises:
        UserError: there is none, or it is not a fast tokenizer (character offsets are needed for masks).
    """
    from transformers import AutoTokenizer  # late: it takes seconds, which a wrong path need not wait for

    path = Path(name).expanduser()
    _check_place(name, path)
    source, files = str(path if path.exists() else name), {}
    if path.is_file():
        source, files = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **files)
    except Exception as error:  # the hub's client and the parsers raise errors of many families
        raise UserError(f"{name}: no tokenizer can be loaded from it: {error}") from None
    _check_fast(tokenizer)
    return tokenizer


def _check_place(name: str | os.PathLike[str], path: Path) -> None:
    """Refuse a path where no tokenizer can be."""
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(
            f"{name}: a file holds no tokenizer, unless it is a .gguf file; name a directory or a hub id "
            "(--tokenizer_name_or_path)"
        )
    if path.is_dir() and not any((path / file).exists() for file in _TOKENIZER_FILES):
        raise UserError(
            f"{name}: no tokenizer in this directory (looked for {', '.join(_TOKENIZER_FILES)}); "
            "name one with --tokenizer_name_or_path"
        )
    if not path.exists() and looks_local(str(name)):
        raise UserError(
            f"{name}: no such directory (looked from {Path.cwd()}); name the tokenizer's directory or hub id"
        )


def _render(
    pair: PreferencePair, messages: list[Message], tokenizer: Any, template: ChatTemplate | None, first_turn: int
) -> tuple[str, list[Span], bool]:
    """A conversation's text, and the spans [start, end) of its assistant turns from message `first_turn` on.

    Last, whether the first span begins inside what was said, behind a beginning that the prompt gave.
    """
    if template is None:
        return _render_plain(pair, messages, tokenizer)
    if any("tool_calls" in message for message in messages):
        messages = [with_arguments(message, template.arguments, pair.place) for message in messages]
    if any(message["role"] == "developer" for message in messages) and "developer" not in str(tokenizer.chat_template):
        raise RowError(
            "wrong_role", f"{pair.place}: the chat template does not know the role 'developer'; write 'system'"
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first_turn]
    try:
        text = template.render(messages, pair.tools)
        spans = [template.assistant_span(text, messages, pair.tools, index) for index in turns]
    except TemplateError as error:
        raise RowError(
            "template_error", f"{pair.place}: the chat template refuses this conversation: {error}"
        ) from None
    begun = text.find(pair.prefill, *spans[0]) if first_turn and spans and pair.prefill else -1
    if begun >= 0:
        # What the prompt began is the prompt's; a template may have put an empty thinking block before it.
        spans[0] = begun + len(pair.prefill), spans[0][1]
    return text, spans, begun >= 0


def _render_plain(pair: PreferencePair, messages: list[Message], tokenizer: Any) -> tuple[str, list[Span], bool]:
    if not pair.plain:
        raise UserError(
            f"{pair.place}: the tokenizer has no chat template, so it can't render conversations; give a "
            "tokenizer with a chat template, or rows of plain text (prompt, chosen, rejected)"
        )
    prompt, answer = (message["content"] for message in messages)
    text = prompt + answer + (tokenizer.eos_token or "")
    return text, [(len(prompt), len(text))], True


def check_settings(tokenizer: Any, max_length: int, completion_mask: str) -> None:
    """Check what holds for every pair.

    Raises:
        UserError: no pair can be tokenized with this tokenizer or these settings.
    """
    if completion_mask not in COMPLETION_MASKS:
        raise UserError(f"completion_mask must be one of {', '.join(COMPLETION_MASKS)}, not '{completion_mask}'")
    if max_length < 2:
        raise UserError(f"max_length must be at least 2 tokens, not {max_length}")
    _check_fast(tokenizer)


def _check_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{tokenizer.name_or_path}: not a fast tokenizer; masks need character offsets, so give one with "
            "a tokenizer.json"
        )
