"""What would be decided by another policy, or by what models say now; on fakes that can not be written to."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest

from memory_worker.domain.decision import Action, Relation, Verdict
from memory_worker.domain.errors import JobNotFound
from memory_worker.domain.item import Fact, MemoryType
from memory_worker.domain.job import Job, JobState, Said, TurnText
from memory_worker.usecases.extraction import PROMPTS
from memory_worker.usecases.memory_ports import Decision, UserSettings
from memory_worker.usecases.ports import ModelAnswer, ModelCallFailed, ModelQuestion, Policy, Turn
from memory_worker.usecases.replay_jobs import JobReplayer
from servicekit.core.errors import DependencyUnavailable, InvalidField

NOW = datetime(2026, 11, 21, tzinfo=UTC)
JOB = Job("u", UUID(int=1), "c", "m", JobState.DONE, 1, NOW, NOW)
OLD, OTHER = UUID(int=7), UUID(int=8)


def fact(content: str) -> Fact:
    return Fact(
        type=MemoryType.FACT, title="t", content=content, confidence=0.9, importance=0.5, sensitivity=0,
        is_explicit=True, valid_until=None,
    )


def verdict(item_id: UUID, relation: Relation) -> Verdict:
    return Verdict(item_id, 1, 0.8, relation, content=f"known {item_id.int}")


DECISION = Decision(
    UUID(int=2), JOB.job_id, 0, fact("The user lives in Porto"), Action.ADD, "COMPARED",
    (verdict(OLD, Relation.CONFLICT), verdict(OTHER, Relation.CONFLICT)), (UUID(int=9), OLD, OTHER), "set/1", "index",
    "extract/1 compare/1", NOW,
)


class Books:
    """Jobs, items and decisions that can be read, and nothing else."""

    def __init__(self, *decisions: Decision) -> None:
        self._decisions = list(decisions)

    async def get(self, job_id: UUID, user_id: str) -> Job | None:
        return JOB if job_id == JOB.job_id else None

    async def decisions_of(self, user_id: str, job_id: UUID) -> list[Decision]:
        return self._decisions

    async def settings(self, user_id: str) -> UserSettings:
        return UserSettings(user_id)

    async def contents_of(self, user_id: str, item_ids: Any) -> list[str]:
        return []


class Models:
    """Judges all candidates alike, and finds these facts. The first `gone` answers are gone."""

    def __init__(self, relation: str = "unrelated", *, facts: tuple[str, ...] = (), gone: int = 0) -> None:
        self._relation, self._facts, self._gone = relation, facts, gone
        self.asked: list[ModelQuestion] = []

    async def ask(self, question: ModelQuestion) -> ModelAnswer:
        self.asked.append(question)
        if len(self.asked) <= self._gone:
            raise ModelCallFailed("GONE", "REQUEST_FINISHED")
        if question.scene == "memory.extract":
            document: dict[str, Any] = {"facts": [{"type": "fact", "content": each} for each in self._facts]}
        else:
            document = {"verdicts": [
                {"index": each["index"], "relation": self._relation, "reason": "now", "merged": ""}
                for each in json.loads(question.data)["known"]
            ]}
        return ModelAnswer(json.dumps(document), 10, 3, "call")

    async def cost(self, user_id: str, request_id: str) -> ModelAnswer | None:
        raise AssertionError("nobody asks for it")


def replayer(models: Models, *decisions: Decision) -> JobReplayer:
    books = cast("Any", Books(*decisions))
    return JobReplayer(books, books, books, models, policy=Policy(), opened=lambda job: job)


async def test_another_policy_upon_what_was_seen_asks_nobody() -> None:
    models = Models()
    replay = await replayer(models, DECISION).replay(JOB.job_id, policy="legacy")
    [each] = replay.decisions
    assert (each.plan.superseded, each.same) == ((OLD,), False)
    assert (models.asked, replay.prompts, replay.calls) == ([], "", 0)
    [each] = (await replayer(models, DECISION).replay(JOB.job_id)).decisions
    assert each.same


async def test_judged_anew_by_the_prompts_in_use_now() -> None:
    models = Models("unrelated")
    replay = await replayer(models, DECISION).replay(JOB.job_id, judge_again=True, billed_to="ops")
    [each] = replay.decisions
    assert (each.plan.action, each.plan.superseded, each.same) == (Action.ADD, (), False)
    assert [(one.relation, one.content) for one in each.verdicts] == [
        (Relation.UNRELATED, "known 7"), (Relation.UNRELATED, "known 8")
    ]
    assert (replay.prompts, replay.calls, replay.tokens, replay.credit_micros) == (PROMPTS, 1, 10, 3)
    assert {each.user_id for each in models.asked} == {"ops"}
    again = Models("unrelated")
    await replayer(again, DECISION).replay(JOB.job_id, judge_again=True, billed_to="ops")
    assert [each.request_id for each in again.asked] == [each.request_id for each in models.asked], "charged once"
    [each] = (await replayer(Models("conflict"), DECISION).replay(JOB.job_id, judge_again=True)).decisions
    assert each.same


async def test_a_turn_is_understood_anew() -> None:
    turn = Turn("u", "c", "m", NOW, TurnText((Said(3, "..."),)))
    dropped = replace(DECISION, number=1, fact=fact("The user is shy"), action=Action.DROP, reason="LOW_CONFIDENCE")
    models = Models(facts=("The user lives in Porto!", "The user has a cat"))
    replay = await replayer(models, DECISION, dropped).replay(JOB.job_id, turn=turn)
    told = [
        (each.fact.content, each.decision is not None, each.found, each.plan.action, each.same)
        for each in replay.decisions
    ]
    assert told == [
        ("The user lives in Porto", True, True, Action.ADD, True),
        ("The user is shy", True, False, Action.DROP, True),
        ("The user has a cat", False, True, Action.RETRY, False),
    ]
    assert [each.scene for each in models.asked] == ["memory.extract"]
    [each] = (await replayer(Models(), DECISION).replay(JOB.job_id, turn=turn)).decisions
    assert (each.found, each.plan.action, each.same) == (False, Action.DROP, False)


async def test_an_answer_that_is_gone_is_asked_for_under_another_name() -> None:
    models = Models(gone=2)
    replay = await replayer(models, DECISION).replay(JOB.job_id, judge_again=True)
    assert replay.calls == 1
    assert len({each.request_id for each in models.asked}) == 3


async def test_what_can_not_be_replayed_is_refused() -> None:
    with pytest.raises(JobNotFound):
        await replayer(Models()).replay(UUID(int=99))
    with pytest.raises(InvalidField, match="the turn of the job"):
        await replayer(Models()).replay(JOB.job_id, turn=Turn("u", "c", "other", NOW, TurnText(())))
    with pytest.raises(DependencyUnavailable, match="NO_WHOLE_ANSWER"):
        await replayer(Models(gone=1000), DECISION).replay(JOB.job_id, judge_again=True)
