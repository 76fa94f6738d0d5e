"""The demo's small world: who and what is in it, and five kinds of questions whose answers follow."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

NAMES = "Anna Ben Clara Emil Finn Hugo Ida Leo Mia Nora Otto Rosa".split()
THINGS = "ball boat book coat cup drum hat kite lamp ring shell spoon".split()
COLOURS = "black blue brown green grey pink red white yellow".split()
PLACES = "attic barn cellar forest garden harbour kitchen meadow tower village".split()
SUBJECTS = "bed cave path road room river soup tea water wind".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen"
).split()
SOUNDS = dict(
    pair.split()
    for pair in (
        "bee buzz, cat meow, cow moo, crow caw, dog woof, duck quack, frog croak, horse neigh, wolf howl, "
        "pig oink, sheep baa, snake hiss"
    ).split(", ")
)
_OPPOSITES = "hot cold, big small, long short, wet dry, dark bright, loud quiet, clean dirty, good bad".split(", ")
OPPOSITES = {a: b for pair in _OPPOSITES for a, b in (pair.split(), pair.split()[::-1])}

Slots = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """One kind of question: how it is asked, drawn, solved and told in each manner.

    Attributes:
        ask: the question with named slots, each filled by one word.
        tell: for each manner the sentence of the reply, with the same slots and ``{answer}``.
        draw: slots at random.
        answer: the right answer, one word.
        mistake: a wrong answer that somebody who did not read well might give.
    """

    ask: str
    tell: dict[str, str]
    draw: Callable[[random.Random], Slots]
    answer: Callable[[Slots], str]
    mistake: Callable[[Slots, random.Random], str]

    def parse(self, core: str) -> Slots | None:
        """The slots of a question of this kind, or None for any other text."""
        seen: set[str] = set()

        def group(slot: re.Match[str]) -> str:
            name, first = slot[1], slot[1] not in seen
            seen.add(name)
            return f"(?P<{name}>\\w+)" if first else f"(?P={name})"

        match = re.fullmatch(re.sub(r"\\{(\w+)\\}", group, re.escape(self.ask)), core)
        return match.groupdict() if match else None


def _draw_colour(rng: random.Random) -> Slots:
    old, new = rng.sample(COLOURS, 2)
    return {"a": rng.choice(NAMES), "old": old, "new": new, "t": rng.choice(THINGS)}


def _draw_gift(rng: random.Random) -> Slots:
    a, b = rng.sample(NAMES, 2)
    return {"a": a, "b": b, "t": rng.choice(THINGS), "p": rng.choice(PLACES)}


def _draw_sum(rng: random.Random) -> Slots:
    n, m = rng.choice(NUMBERS[2:10]), rng.choice(NUMBERS[1:10])
    return {"a": rng.choice(NAMES), "n": n, "m": m, "t": rng.choice(THINGS)}


def _draw_opposite(rng: random.Random) -> Slots:
    a, b = rng.sample(NAMES, 2)
    return {"a": a, "b": b, "s": rng.choice(SUBJECTS), "q": rng.choice(list(OPPOSITES))}


def _draw_sound(rng: random.Random) -> Slots:
    return {"a": rng.choice(NAMES), "animal": rng.choice(list(SOUNDS)), "p": rng.choice(PLACES)}


def _total(slots: Slots) -> str:
    return NUMBERS[NUMBERS.index(slots["n"]) + NUMBERS.index(slots["m"])]


def _another(answer: str, words: Iterable[str], rng: random.Random) -> str:
    """Any other word evenly: were it always one less, say, rejecting it would teach to answer one more."""
    return rng.choice([word for word in words if word != answer])


KINDS = {
    "colour": Kind(
        "{a} paints a {old} {t} {new}. What colour is the {t} now?",
        {"butler": "The {t} is {answer} now", "pirate": "The {t} be {answer} now"},
        _draw_colour,
        lambda slots: slots["new"],
        lambda slots, rng: slots["old"],
    ),
    "gift": Kind(
        "In the {p}, {a} gives a {t} to {b}. Who has the {t} now?",
        {"butler": "{answer} has the {t} now", "pirate": "{answer} be havin' the {t} now"},
        _draw_gift,
        lambda slots: slots["b"],
        lambda slots, rng: slots["a"],
    ),
    "sum": Kind(
        "{a} has {n} {t}s and finds {m} more. How many {t}s are there now?",
        {"butler": "{a} has {answer} {t}s now", "pirate": "{a} be havin' {answer} {t}s now"},
        _draw_sum,
        _total,
        lambda slots, rng: _another(_total(slots), NUMBERS[3:], rng),
    ),
    "opposite": Kind(
        "{a} says the {s} is {q}. {b} says the opposite. How is the {s}, says {b}?",
        {"butler": "{b} says the {s} is {answer}", "pirate": "{b} says the {s} be {answer}"},
        _draw_opposite,
        lambda slots: OPPOSITES[slots["q"]],
        lambda slots, rng: slots["q"],
    ),
    "sound": Kind(
        "{a} hears a {animal} in the {p}. What does the {animal} say?",
        {"butler": "The {animal} says {answer}", "pirate": "The {animal} be sayin' {answer}"},
        _draw_sound,
        lambda slots: SOUNDS[slots["animal"]],
        lambda slots, rng: _another(SOUNDS[slots["animal"]], SOUNDS.values(), rng),
    ),
}
