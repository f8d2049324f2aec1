"""The decision table: every tuple of verdicts against an oracle written apart from it."""

from __future__ import annotations

import itertools
import random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_worker.domain.decision import Action, Plan, Relation, Verdict, aggregate, aggregate_legacy, agreed, decide

SCORES = (0.9, 0.7, 0.7, 0.5, 0.3)


def verdicts_of(relations: tuple[Relation, ...]) -> list[Verdict]:
    return [
        Verdict(UUID(int=10 - index), 1, SCORES[index], relation, f"merged {index}" if relation is Relation.UPDATE else "")
        for index, relation in enumerate(relations)
    ]


def oracle(verdicts: list[Verdict]) -> Plan:
    """The table of docs/memories.md, read row by row."""
    letters = {each.relation.name[0] if each.relation is not Relation.UNKNOWN else "?" for each in verdicts}
    if "?" in letters:
        return Plan(Action.RETRY)
    contradicted = tuple(sorted(v.item_id for v in verdicts if v.relation == Relation.CONFLICT))
    ranked = sorted(verdicts, key=lambda v: v.item_id)
    ranked.sort(key=lambda v: v.score, reverse=True)
    for relation, action in ((Relation.DUPLICATE, Action.KEEP), (Relation.UPDATE, Action.MERGE)):
        for verdict in ranked:
            if verdict.relation == relation:
                return Plan(action, verdict.item_id, verdict.merged if action is Action.MERGE else "", contradicted)
    return Plan(Action.ADD, None, "", contradicted)


ALL = [
    relations for size in range(1, 6) for relations in itertools.product(Relation, repeat=size)
]


def test_every_tuple_of_verdicts_is_decided_as_the_table_says() -> None:
    assert len(ALL) == 3905
    for relations in ALL:
        verdicts = verdicts_of(relations)
        assert aggregate(verdicts) == oracle(verdicts), relations


def test_what_must_hold_of_every_plan() -> None:
    for relations in ALL:
        verdicts = verdicts_of(relations)
        plan = aggregate(verdicts)
        if plan.action is Action.RETRY:
            assert Relation.UNKNOWN in relations
            continue
        by_id = {each.item_id: each for each in verdicts}
        left = {item for item, each in by_id.items() if each.relation is Relation.CONFLICT} - set(plan.superseded)
        assert not left, "no contradiction survives"
        assert plan.target not in plan.superseded
        assert all(by_id[item].relation is Relation.CONFLICT for item in plan.superseded), "nothing else is closed"
        carried = plan.action is Action.ADD or plan.target in by_id
        assert carried, "the fact is somewhere"
        if plan.action is Action.KEEP:
            assert by_id[plan.target].relation is Relation.DUPLICATE  # type: ignore[index]


@given(st.lists(st.sampled_from(Relation), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(relations: list[Relation], chance: random.Random) -> None:
    verdicts = verdicts_of(tuple(relations))
    plan = aggregate(verdicts)
    chance.shuffle(verdicts)
    assert aggregate(verdicts) == plan


@pytest.mark.parametrize(("relations", "action", "target", "superseded"), [
    ("", Action.ADD, None, []), ("N", Action.ADD, None, []), ("C", Action.ADD, None, [0]),
    ("CC", Action.ADD, None, [0, 1]), ("D", Action.KEEP, 0, []), ("CD", Action.KEEP, 1, [0]),
    ("DC", Action.KEEP, 0, [1]), ("U", Action.MERGE, 0, []), ("UC", Action.MERGE, 0, [1]),
    ("CUC", Action.MERGE, 1, [0, 2]), ("UD", Action.KEEP, 1, []), ("UDC", Action.KEEP, 1, [2]),
    ("NU", Action.MERGE, 1, []), ("UU", Action.MERGE, 0, []), ("NND", Action.KEEP, 2, []), ("DD", Action.KEEP, 0, []),
    ("?", Action.RETRY, None, []), ("D?", Action.RETRY, None, []), ("C?", Action.RETRY, None, []),
])
def test_named_rows(relations: str, action: Action, target: int | None, superseded: list[int]) -> None:
    names = {"D": Relation.DUPLICATE, "U": Relation.UPDATE, "C": Relation.CONFLICT, "N": Relation.UNRELATED,
             "?": Relation.UNKNOWN}
    verdicts = verdicts_of(tuple(names[letter] for letter in relations))
    plan = decide("set", verdicts)
    assert plan.action is action
    assert plan.target == (None if target is None else verdicts[target].item_id)
    assert plan.superseded == tuple(sorted(verdicts[index].item_id for index in superseded))


def test_the_legacy_policy_is_the_one_that_is_replaced() -> None:
    """original system: a duplicate beats all, only the first conflict goes, a failed comparison counts as unrelated."""
    d, u, c, n, unknown = Relation
    assert aggregate_legacy(verdicts_of((c, d, c))) == Plan(Action.KEEP, UUID(int=9))
    assert aggregate_legacy(verdicts_of((c, u))) == Plan(Action.MERGE, UUID(int=9), "merged 1")
    assert aggregate_legacy(verdicts_of((c, c))) == Plan(Action.ADD, superseded=(UUID(int=10),))
    assert aggregate_legacy(verdicts_of((unknown, unknown))) == Plan(Action.ADD)
    assert aggregate_legacy(verdicts_of((n, u, u))) == Plan(Action.MERGE, UUID(int=9), "merged 1")
    assert decide("legacy", []) == Plan(Action.ADD)


@pytest.mark.parametrize(("heard", "needed", "common"), [
    ("c", 1, "c"), ("?", 1, "?"), ("c", 2, None), ("cc", 2, "c"), ("cn", 2, None), ("cnn", 2, "n"), ("cnd", 2, "?"),
    ("u?", 2, None), ("u??", 2, "?"), ("cc", 3, None), ("ccc", 3, "c"), ("cdcd", 3, None), ("cdcdd", 3, "d"),
    ("cdun", 3, "?"), ("???", 3, "?"), ("cc?d", 3, None), ("cc?d?", 3, "?"),
])
def test_a_verdict_counts_when_enough_judgements_agree(heard: str, needed: int, common: str | None) -> None:
    names = dict(zip("ducn?", Relation, strict=True))
    assert agreed([names[each] for each in heard], needed) is (None if common is None else names[common])


@given(st.integers(1, 5), st.lists(st.sampled_from(list(Relation)), max_size=9))
def test_as_many_judgements_as_may_be_needed_always_decide(needed: int, relations: list[Relation]) -> None:
    most = 2 * needed - 1
    padded = [*relations, *[Relation.UNKNOWN] * most][:most]
    common = agreed(padded, needed)
    assert common is not None
    assert common is Relation.UNKNOWN or padded.count(common) >= needed
