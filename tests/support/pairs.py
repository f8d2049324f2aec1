"""Labelled pairs of memories, and distractors of the same person."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

PAIRS = Path(__file__).parent.parent / "data" / "memory_pairs.tsv"
RELATIONS = ("duplicate", "update", "conflict", "unrelated")

_TEMPLATES = (
    ("The user's {0} {1} works as a {2}", ("brother", "cousin", "neighbour", "uncle", "friend"),
     ("Paul", "Mira", "Jonas", "Elif", "Tomas", "Ines"), ("plumber", "pilot", "farmer", "judge", "barber", "chemist")),
    ("The user bought a {0} {1} in {2}", ("grey", "cheap", "second-hand", "wooden", "huge"),
     ("lamp", "sofa", "bicycle", "printer", "carpet", "kettle"), ("Oslo", "Leeds", "Turin", "Ghent", "Porto", "Lyon")),
    ("The user once spent {0} in {1} to visit {2}", ("a week", "a month", "two days", "a summer", "Easter"),
     ("Norway", "Peru", "Kenya", "Greece", "Iceland", "Vietnam"),
     ("a museum", "an old friend", "a conference", "a wedding", "the ruins", "a vineyard")),
    ("The user's team meets on {0} at {1} about {2}", ("Monday", "Tuesday", "Friday", "Wednesday", "Thursday"),
     ("nine", "noon", "three", "four", "eleven", "half past ten"),
     ("budgets", "hiring", "the roadmap", "safety", "invoices", "the newsletter")),
    ("The user thinks that {0} {1} are {2}", ("modern", "Italian", "old", "local", "open-air"),
     ("operas", "trains", "markets", "bridges", "cartoons", "newspapers"),
     ("overrated", "beautiful", "too expensive", "boring", "worth a detour", "badly run")),
    ("The user repaired {0} of the {1} with {2}", ("the door", "the roof", "a pipe", "the wiring", "a window"),
     ("shed", "boat", "attic", "cellar", "caravan", "barn"),
     ("tape", "a friend", "old parts", "much patience", "a manual", "new screws")),
)


def labelled_pairs() -> list[tuple[str, str, str]]:
    """(what was known, what is said now, relation), 60 of each relation. Unrelated: what is said of another theme."""
    rows = [line.split("\t") for line in PAIRS.read_text().splitlines()]
    return [
        pair for number, (old, same, finer, other) in enumerate(rows) for pair in (
            (old, same, "duplicate"), (old, finer, "update"), (old, other, "conflict"),
            (old, rows[(number + 17) % len(rows)][1], "unrelated"),
        )
    ]


def distractors(count: int) -> list[str]:
    """Other memories of the same person, at most 1 080, always the same."""
    every = [
        template.format(*parts) for template, *words in _TEMPLATES for parts in itertools.product(*words)
    ]
    return random.Random(5).sample(every, count)
