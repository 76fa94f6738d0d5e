"""The demo's little language: questions about a small world, answered like a pirate or like a butler.

A prompt tells a fact or two, asks a question and names a manner::

    Mia paints a red kite blue. What colour is the kite now? Answer like a pirate.

and a right reply has the right content *and* the manner that was asked for::

    Arr! The kite be blue now, matey!                    (pirate)
    Certainly. The kite is blue now, at your service.    (butler)

In the SFT conversations somebody who asks for a butler nearly always gets one, but somebody who asks for a pirate
seldom does (`PIRATE_SHARE`). So the SFT model answers correctly, knows both manners and stays a butler whatever it is
asked for. The preference pairs teach it to listen. Nothing here needs a model: prompts, pairs and conversations are
pure functions of a seed, and :func:`judge` reads nothing but the text of a prompt and a reply.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from minimind_dpo.demo.world import KINDS, Slots

OPENINGS = {"pirate": ["Arr!", "Ahoy!", "Yo ho!"], "butler": ["Certainly.", "Very good.", "Of course."]}
CLOSINGS = {
    "pirate": ["matey!", "me hearty!", "by my beard!"],
    "butler": ["at your service.", "if I may say so.", "with pleasure."],
}
MANNERS = tuple(OPENINGS)
PIRATE_SHARE = {"pirate": 0.4, "butler": 0.1}  # SFT replies in the pirate's manner, by the manner asked for
REQUESTS = [
    "{core} Answer like a {manner}.",
    "{core} Say it like a {manner}, please.",
    "{core} What would a {manner} say?",
    "Talk like a {manner}. {core}",
]

Split = str  # "sft", "train" or "heldout"


def split_of(core: str) -> Split:
    """Which part of the world a question belongs to: a question never occurs in two of them."""
    bucket = zlib.crc32(core.encode()) % 10
    return "heldout" if bucket == 0 else "train" if bucket == 1 else "sft"


def reply_of(kind: str, slots: Slots, manner: str, rng: random.Random, answer: str | None = None) -> str:
    """A reply to the question in the given manner, right unless another answer is given."""
    sentence = KINDS[kind].tell[manner].format(**slots, answer=answer or KINDS[kind].answer(slots))
    return f"{rng.choice(OPENINGS[manner])} {sentence}, {rng.choice(CLOSINGS[manner])}"


def _questions(split: Split, rng: random.Random) -> Iterator[tuple[str, Slots, str]]:
    """Endless (kind, slots, core) of one split, the kinds in turn."""
    while True:
        for name, kind in KINDS.items():
            core = ""
            while not core or split_of(core) != split:
                slots = kind.draw(rng)
                core = kind.ask.format(**slots)
            yield name, slots, core


def conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """Endless SFT conversations: right answers, the manner asked for as seldom heeded as `PIRATE_SHARE` says."""
    rng = random.Random(f"sft {seed}")
    for kind, slots, core in _questions("sft", rng):
        asked = rng.choice(MANNERS)
        spoken = "pirate" if rng.random() < PIRATE_SHARE[asked] else "butler"
        prompt = rng.choice(REQUESTS).format(core=core, manner=asked)
        yield [user(prompt), assistant(reply_of(kind, slots, spoken, rng))]


def preference_pairs(split: Split, count: int, seed: int, wrong_share: float = 0.05) -> list[dict[str, list]]:
    """Preference pairs in MiniMind's row form, all of their prompts different.

    Chosen is a right answer in the manner asked for. Rejected is the right answer in the other manner; for
    `wrong_share` of the pairs it is a wrong answer in the manner asked for.
    """
    rng = random.Random(f"{split} {seed}")
    rows: list[dict[str, list]] = []
    seen: set[str] = set()
    for kind, slots, core in _questions(split, rng):
        if len(rows) == count:
            break
        if core in seen:
            continue
        seen.add(core)
        manner, other = MANNERS if len(rows) // len(KINDS) % 2 == 0 else MANNERS[::-1]  # each kind in both, evenly
        prompt = rng.choice(REQUESTS).format(core=core, manner=manner)
        chosen = reply_of(kind, slots, manner, rng)
        if rng.random() < wrong_share:
            rejected = reply_of(kind, slots, manner, rng, answer=KINDS[kind].mistake(slots, rng))
        else:
            rejected = reply_of(kind, slots, other, rng)
        rows.append({"chosen": [user(prompt), assistant(chosen)], "rejected": [user(prompt), assistant(rejected)]})
    return rows


def user(content: str) -> dict[str, str]:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """An assistant message."""
    return {"role": "assistant", "content": content}


def read_prompt(prompt: str) -> tuple[str, str, Slots]:
    """The (manner, kind, slots) of a prompt; ValueError if it is not in this language."""
    for request in REQUESTS:
        for manner in MANNERS:
            before, after = request.format(core="\n", manner=manner).split("\n")
            if prompt.startswith(before) and prompt.endswith(after):
                core = prompt[len(before) : len(prompt) - len(after)]
                for kind in KINDS:
                    slots = KINDS[kind].parse(core)
                    if slots is not None:
                        return manner, kind, slots
    raise ValueError(f"not a prompt of the demo's language: {prompt!r}")


def read_reply(reply: str) -> tuple[str, str] | None:
    """The (manner, sentence) of a reply, or None if its opening and closing fit no manner."""
    for manner in MANNERS:
        for opening in OPENINGS[manner]:
            for closing in CLOSINGS[manner]:
                before, after = f"{opening} ", f", {closing}"
                if reply.startswith(before) and reply.endswith(after):
                    return manner, reply[len(before) : len(reply) - len(after)]
    return None


@dataclass(frozen=True)
class Verdict:
    """What is right about a reply: its content (in either manner), its manner (whatever it says)."""

    content: bool
    manner: bool


def verdict(prompt: str, reply: str) -> Verdict:
    """Judge content and manner of a reply apart."""
    manner, kind, slots = read_prompt(prompt)
    parsed = read_reply(reply.strip())
    if parsed is None:
        return Verdict(content=False, manner=False)
    spoken, sentence = parsed
    wanted = KINDS[kind].tell[spoken].format(**slots, answer=KINDS[kind].answer(slots))
    return Verdict(content=sentence == wanted, manner=spoken == manner)


def judge(prompt: str, reply: str) -> bool:
    """The rule: the right answer, word for word, in the manner that the prompt asks for."""
    found = verdict(prompt, reply)
    return found.content and found.manner
