"""What to do about a fact, from how the candidates stand to it. Pure, and the order of candidates does not matter;
docs/memories.md has the table.

The model names relations and nothing else: which item is meant, and what follows, is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

POLICY_VERSIONS = {"set": "set/1", "legacy": "legacy/1"}


class Relation(IntEnum):
    """How a candidate stands to the fact; numbers as on the wire."""

    DUPLICATE = 1
    UPDATE = 2
    CONFLICT = 3
    UNRELATED = 4
    UNKNOWN = 5


class Action(IntEnum):
    """What is done; numbers as on the wire. RETRY is none: nothing is decided, and the comparer is asked again."""

    RETRY = 0
    ADD = 1
    KEEP = 2
    MERGE = 3
    DROP = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """An item that a fact is compared with, of the fact's type, and how similar it is (0..1)."""

    item_id: UUID
    version: int
    content: str
    score: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One candidate and what the comparer said of it. `merged` is the whole text of an UPDATE."""

    item_id: UUID
    version: int
    score: float
    relation: Relation
    merged: str = ""
    reason: str = ""
    content: str = ""


CONSEQUENTIAL = frozenset({Relation.DUPLICATE, Relation.UPDATE, Relation.CONFLICT})
"""Relations by which something is closed, rewritten, or not written: worth being asked for again, because a judge that
errs once in twenty errs three times alike once in thousands."""


def agreed(relations: Sequence[Relation], needed: int) -> Relation | None:
    """What `needed` of at most 2 * needed - 1 judgements say; None = more are needed; UNKNOWN = so many can no longer
    agree."""
    left = 2 * needed - 1 - len(relations)
    counts = {each: relations.count(each) for each in Relation if each is not Relation.UNKNOWN}
    for relation, count in counts.items():
        if count >= needed:
            return relation
    return None if max(counts.values()) + left >= needed else Relation.UNKNOWN


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do: `target` carries the fact (None = a new item does), all of `superseded` are closed in its favour."""

    action: Action
    target: UUID | None = None
    merged: str = ""
    superseded: tuple[UUID, ...] = ()


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    """The most similar; among equals the one with the lower id, so that their order does not matter."""
    return min(verdicts, key=lambda each: (-each.score, each.item_id))


def aggregate(verdicts: Sequence[Verdict]) -> Plan:
    """Set-valued: the duplicate is kept, every conflict is superseded, an update is merged; an unknown verdict decides
    nothing. A fact is never lost: it is in the item that was kept, in the merged text, or in a new item."""
    by = {relation: [each for each in verdicts if each.relation is relation] for relation in Relation}
    if by[Relation.UNKNOWN]:
        return Plan(Action.RETRY)
    conflicts = tuple(sorted(each.item_id for each in by[Relation.CONFLICT]))
    if by[Relation.DUPLICATE]:
        return Plan(Action.KEEP, _best(by[Relation.DUPLICATE]).item_id, superseded=conflicts)
    if by[Relation.UPDATE]:
        best = _best(by[Relation.UPDATE])
        return Plan(Action.MERGE, best.item_id, best.merged, conflicts)
    return Plan(Action.ADD, superseded=conflicts)


def aggregate_legacy(verdicts: Sequence[Verdict]) -> Plan:
    """The rules of the system that this one replaces, for comparison and migration: an unknown verdict counts as
    unrelated, a duplicate hides everything, an update hides conflicts, and only the first conflict is deleted.
    `verdicts` in the order of recall; of updates, the first with the highest score."""
    if any(each.relation is Relation.DUPLICATE for each in verdicts):
        return Plan(Action.KEEP, next(each.item_id for each in verdicts if each.relation is Relation.DUPLICATE))
    updates = [each for each in verdicts if each.relation is Relation.UPDATE]
    if updates:
        best = max(updates, key=lambda each: each.score)
        return Plan(Action.MERGE, best.item_id, best.merged)
    conflicts = [each.item_id for each in verdicts if each.relation is Relation.CONFLICT]
    return Plan(Action.ADD, superseded=tuple(conflicts[:1]))


def decide(policy: str, verdicts: Sequence[Verdict]) -> Plan:
    """`policy`: set or legacy."""
    return aggregate_legacy(verdicts) if policy == "legacy" else aggregate(verdicts)
