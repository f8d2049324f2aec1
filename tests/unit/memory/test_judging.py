"""Questions about a fact, on a comparer of which each answer is written down beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from uuid import UUID

import pytest

from memory_worker.domain.decision import Candidate, Relation
from memory_worker.domain.item import Fact, MemoryType
from memory_worker.usecases.judging import Question, verdicts_of
from memory_worker.usecases.ports import Policy

FACT = Fact(
    type=MemoryType.FACT, title="t", content="The user lives in Porto", confidence=0.9, importance=0.5, sensitivity=0,
    is_explicit=True, valid_until=None,
)
NEAR = [Candidate(UUID(int=number), 1, f"known {number}", 0.9 - number / 10) for number in range(3)]


class Comparer:
    """Answers by `script`: one relation for each item of the question; what is missing is "" there."""

    def __init__(self, *script: str) -> None:
        self._script = list(script)
        self.asked: list[Question] = []

    async def __call__(self, question: Question) -> str:
        self.asked.append(question)
        relations = self._script.pop(0).split()
        return json.dumps({"verdicts": [
            {"index": index, "reason": "", "relation": relation, "merged": "both" if relation == "update" else ""}
            for index, relation in enumerate(relations) if relation != "-"
        ]})

    @property
    def left(self) -> int:
        return len(self._script)


async def judged(comparer: Comparer, candidates: Sequence[Candidate], policy: Policy) -> list[Relation]:
    verdicts = await verdicts_of(comparer, FACT, candidates, policy)
    assert not comparer.left
    assert len({repr(each.parts) for each in comparer.asked}) == len(comparer.asked), "each question is a call of its own"
    return [each.relation for each in verdicts]


async def test_one_question_for_all_candidates_and_no_second_without_consequences() -> None:
    comparer = Comparer("unrelated unrelated unrelated")
    assert await judged(comparer, NEAR, Policy()) == [Relation.UNRELATED] * 3
    assert await verdicts_of(comparer, FACT, [], Policy()) == []


async def test_one_question_for_each_when_the_policy_says_so() -> None:
    comparer = Comparer("unrelated", "unrelated", "unrelated")
    assert await judged(comparer, NEAR, Policy(pairwise=True)) == [Relation.UNRELATED] * 3


async def test_what_has_consequences_is_asked_until_enough_agree_each_time_in_the_other_order() -> None:
    comparer = Comparer("unrelated conflict unrelated", "unrelated", "conflict", "conflict")
    assert await judged(comparer, NEAR, Policy()) == [Relation.UNRELATED, Relation.CONFLICT, Relation.UNRELATED]
    orders = [list(json.loads(each.data)) for each in comparer.asked]
    assert orders == [["new", "known"], ["known", "new"], ["new", "known"], ["known", "new"]]
    assert [len(json.loads(each.data)["known"]) for each in comparer.asked] == [3, 1, 1, 1]


@pytest.mark.parametrize(("agreeing", "script", "relation"), [
    (1, ["conflict"], Relation.CONFLICT),
    (2, ["duplicate", "unrelated", "unrelated"], Relation.UNRELATED),
    (2, ["update", "-", "update"], Relation.UPDATE),
    (2, ["conflict", "duplicate", "unrelated"], Relation.UNKNOWN),
    (3, ["conflict", "duplicate", "unrelated", "update"], Relation.UNKNOWN),
    (3, ["conflict", "unrelated", "unrelated", "unrelated"], Relation.UNRELATED),
])
async def test_as_many_judgements_as_the_policy_wants(agreeing: int, script: list[str], relation: Relation) -> None:
    assert await judged(Comparer(*script), NEAR[:1], Policy(agreeing=agreeing)) == [relation]


async def test_a_verdict_that_is_left_out_is_asked_for_three_times_and_is_then_unknown() -> None:
    comparer = Comparer("unrelated -", "unrelated -", "unrelated -")
    assert await judged(comparer, NEAR[:2], Policy()) == [Relation.UNRELATED, Relation.UNKNOWN]
    comparer = Comparer("unrelated -", "unrelated unrelated")
    assert await judged(comparer, NEAR[:2], Policy()) == [Relation.UNRELATED, Relation.UNRELATED]
