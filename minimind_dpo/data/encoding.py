"""Two texts that begin alike as tokens, with the tokens of their common beginning computed once.

Tokens of a text depend on what stands around them, so a text may be cut only where a tokenizer cuts it itself: before
an added token such as `<|im_start|>`. It takes those out before it normalizes and splits the rest, and handles every
stretch between them on its own. Each piece here begins with an added token or with the text, so that even a rule
about the start of a text (SentencePiece's space) applies where it does in the whole.
"""

from __future__ import annotations

import json
import string
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minimind_dpo.data.words import WordEncoder, splits_like_gpt2

Span = tuple[int, int]

# Parts of tokenizers that treat each stretch between added tokens independently of the others.
_INDEPENDENT = {
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence",
        "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    },
    "normalizer": {
        "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend",
        "Replace", "Sequence", "Strip", "StripAccents",
    },
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"},
    "model": {"BPE", "Unigram", "WordLevel", "WordPiece"},
}  # fmt: skip


@dataclass(slots=True)
class Piece:
    """Part of a text: its characters, the spans that lie in it, counted from its beginning, and then its tokens.

    `mask` is 1 for each token that begins in a span, else 0.
    """

    text: str
    spans: list[Span]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)


Pieces = tuple[list[Piece], list[Piece]]  # of both texts of a pair


class PairEncoder:
    """Tokenizes pairs of texts; the pieces' tokens are those that the tokenizer gives for each text as a whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        cuts, others = cut_tokens(tokenizer)
        self._cuts = cuts
        backend = tokenizer.backend_tokenizer
        self._words = WordEncoder(backend, cuts, others) if cuts and splits_like_gpt2(backend) else None

    def encode(self, pairs: Sequence[tuple[tuple[str, str], tuple[list[Span], list[Span]]]]) -> list[Pieces]:
        """The pieces of each pair, given as two texts and the spans in each that count (disjoint, sorted).

        Raises:
            UnicodeEncodeError, TypeError: a text holds half a surrogate pair.
        """
        cut = [_cut_pair(texts, spans, self._cuts) for texts, spans in pairs]
        # What both texts share is one and the same piece.
        pieces = {id(piece): piece for pair in cut for side in pair for piece in side}.values()
        if self._cuts:
            _reset(self._tokenizer.backend_tokenizer)
        rest = [piece for piece in pieces if not (self._words and _fill(piece, self._words))]
        self._encode([piece for piece in rest if piece.spans], offsets=True)
        self._encode([piece for piece in rest if not piece.spans], offsets=False)
        return cut

    def _encode(self, pieces: list[Piece], offsets: bool) -> None:
        if not pieces:
            return
        texts = [piece.text for piece in pieces]
        if not self._cuts:
            encodings = self._tokenizer(texts, add_special_tokens=False, verbose=False).encodings
        else:
            backend = self._tokenizer.backend_tokenizer
            encode = backend.encode_batch if offsets else backend.encode_batch_fast
            encodings = encode(texts, add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            piece.ids = encoding.ids
            piece.mask = mark_tokens(_Offsets(encoding), piece.spans) if piece.spans else [0] * len(piece.ids)


def cut_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The added tokens that a text may be cut before without changing a token (none if that isn't known), and the rest.

    The tokenizer takes the former out of the raw text wherever they stand: they are not normalized, not bound to whole
    words, don't reach for spaces, and can't be confused with any other added token.
    """
    if not _encodes_plainly(tokenizer) or not _is_independent(tokenizer.backend_tokenizer):
        return [], []
    added = list(tokenizer.backend_tokenizer.get_added_tokens_decoder().values())
    written = f"{tokenizer.chat_template} {' '.join(map(str, tokenizer.special_tokens_map.values()))}"
    contents = [token.content for token in added]
    cuts = [
        token.content
        for token in added
        if token.content in written
        and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        and token.content.strip()
        and token.content[0] in string.punctuation.replace("_", "")  # ends a word before it, whoever asks
        and not any(_may_hide(token.content, other) for other in contents)
    ]
    return cuts, [content for content in contents if content not in cuts]


def mark_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token whose first character lies in a span, else 0.

    Args:
        offsets: the tokens' characters, [T] pairs of start and end in text order.
        spans: disjoint character ranges, sorted.
    """
    mask = [0] * len(offsets)

    def begin(index: int) -> int:
        first, last = offsets[index]
        if first != last:
            return first
        # Some tokenizers report a token of spaces as empty, standing behind them: it begins where the last one ended.
        ends = (end for start, end in map(offsets.__getitem__, range(index - 1, -1, -1)) if start != end)
        return min(first, next(ends, 0))

    tokens, low = range(len(offsets)), 0
    for start, end in spans:
        low = bisect_left(tokens, start, lo=low, key=begin)
        high = bisect_left(tokens, end, lo=low, key=begin)
        mask[low:high] = [1] * (high - low)
        low = high
    return mask


class _Offsets(Sequence[Span]):
    """An encoding's offsets, taken one by one: a search needs a few, and a list of all of them is costly."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, index: Any) -> Any:
        return self._encoding.token_to_chars(index)


def _fill(piece: Piece, words: WordEncoder) -> bool:
    tokens = words.encode(piece.text, piece.spans)
    if tokens is None:
        return False
    piece.ids, piece.mask = tokens
    return True


def _reset(backend: Any) -> None:
    """Undoes what earlier calls of the tokenizer leave behind."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False


def _cut_pair(texts: tuple[str, str], spans: tuple[list[Span], list[Span]], cuts: list[str]) -> Pieces:
    (first, second), (first_spans, second_spans) = texts, spans
    cut = _last_common_cut(first, second, cuts)
    # Turns that both share may be counted in one text only where the cut divides one of them.
    if not cut or _within(first_spans, 0, cut) != _within(second_spans, 0, cut):
        return [Piece(first, first_spans)], [Piece(second, second_spans)]
    common = Piece(first[:cut], _within(first_spans, 0, cut))
    return (
        [common, Piece(first[cut:], _within(first_spans, cut, len(first)))],
        [common, Piece(second[cut:], _within(second_spans, cut, len(second)))],
    )


def _within(spans: list[Span], start: int, end: int) -> list[Span]:
    """The parts of spans that lie between two places, counted from the first."""
    parts = [(max(first, start) - start, min(last, end) - start) for first, last in spans]
    return [(first, last) for first, last in parts if first < last]


def _last_common_cut(first: str, second: str, cuts: list[str]) -> int:
    """Where the last added token that both texts share at the same place begins; 0 if there is none."""
    common = _common_length(first, second) if cuts else 0
    return max(0, *(first.rfind(token, 0, common) for token in cuts)) if common else 0


def _common_length(first: str, second: str) -> int:
    """Characters that two texts share at their start."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _encodes_plainly(tokenizer: Any) -> bool:
    """Whether calling the tokenizer is calling its backend, for a text without special tokens added."""
    from transformers import PreTrainedTokenizerFast

    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    same = kind.__call__ is plain.__call__ and kind._encode_plus is plain._encode_plus
    return same and not getattr(tokenizer, "split_special_tokens", False)


def _is_independent(backend: Any) -> bool:
    if type(backend.model).__name__ not in _INDEPENDENT["model"] or getattr(backend.model, "dropout", None):
        return False
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        part = getattr(backend, name)
        if part is None:
            continue
        try:
            kinds = set(_kinds(json.loads(part.__getstate__())))
        except Exception:  # a part written in Python can't be looked into
            return False
        if not kinds <= _INDEPENDENT[name]:
            return False
    return True


def _kinds(part: dict[str, Any]) -> Iterator[str]:
    """The types of a part of a tokenizer and, in a sequence, of its parts."""
    yield part["type"]
    for name in ("normalizers", "pretokenizers", "processors"):
        for inner in part.get(name, ()):
            yield from _kinds(inner)


def _may_hide(token: str, other: str) -> bool:
    """Whether finding `other` in a text could keep `token` from being found where it stands."""
    tails = (other[start:] for start in range(int(token == other), len(other)))
    return any(tail.startswith(token) or token.startswith(tail) for tail in tails)
