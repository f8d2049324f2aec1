"""Questions about a fact, and when enough judges agree. Whoever asks says how: through the journal, or not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from memory_worker.domain.decision import CONSEQUENTIAL, Candidate, Relation, Verdict, agreed
from memory_worker.domain.item import Fact
from memory_worker.domain.job import Job
from memory_worker.usecases.extraction import (
    COMPARE_ALIAS,
    COMPARE_INSTRUCTIONS,
    COMPARE_SCENE,
    COMPARE_SCHEMA,
    COMPARE_VERSION,
    EXTRACT_ALIAS,
    EXTRACT_INSTRUCTIONS,
    EXTRACT_SCENE,
    EXTRACT_SCHEMA,
    EXTRACT_VERSION,
    comparison_data,
    extraction_data,
    facts_in,
    verdicts_in,
)
from memory_worker.usecases.memory_ports import UserSettings
from memory_worker.usecases.ports import ModelCallFailed, Policy

MOST_JUDGEMENTS = 3
"""How often a comparer is asked that leaves a verdict out; then the job is dead, and nothing was decided."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked; `parts` are all that its data is made of, and give it its identity."""

    stage: str
    scene: str
    alias: str
    instructions: str
    data: str
    schema: str
    parts: tuple[object, ...]


Ask = Callable[[Question], Awaitable[str]]
"""Answers the text of a whole answer. Raises ModelCallFailed."""


async def facts_of(
    ask: Ask, job: Job, *, settings: UserSettings, policy: Policy, shown: Sequence[str]
) -> list[tuple[Fact, str]]:
    """What the turn says that is worth remembering, each with why it is dropped, "" = it is not. Raises
    ModelCallFailed."""
    answer = await ask(Question(
        "extract", EXTRACT_SCENE, EXTRACT_ALIAS, EXTRACT_INSTRUCTIONS, extraction_data(job), EXTRACT_SCHEMA,
        (EXTRACT_VERSION, EXTRACT_ALIAS),
    ))
    try:
        return facts_in(answer, settings=settings, policy=policy, shown=shown, said_at=job.occurred_at)
    except ValueError as error:
        raise ModelCallFailed("PERMANENT", f"EXTRACTION_UNREADABLE: {error}") from None


async def verdicts_of(ask: Ask, fact: Fact, candidates: Sequence[Candidate], policy: Policy) -> list[Verdict]:
    """How each candidate stands to the fact: one question for all of them, or one for each. Raises ModelCallFailed."""
    groups = [[each] for each in candidates] if policy.pairwise else [list(candidates)]
    verdicts: list[Verdict] = []
    for group in filter(None, groups):
        judged: list[Verdict] = []
        for again in range(MOST_JUDGEMENTS):
            judged = await _judged(ask, fact, group, policy, again)
            if all(each.relation is not Relation.UNKNOWN for each in judged):
                break
        verdicts += [
            await _agreed(ask, fact, candidate, verdict, policy)
            for candidate, verdict in zip(group, judged, strict=True)
        ]
    return verdicts


async def _agreed(ask: Ask, fact: Fact, candidate: Candidate, verdict: Verdict, policy: Policy) -> Verdict:
    """A verdict that has consequences is asked for again, of this candidate alone, until enough judgements agree. Every
    other question tells the two in the other order: judges lean to what they read first or last."""
    if verdict.relation not in CONSEQUENTIAL:
        return verdict
    heard = [verdict]
    while (common := agreed([each.relation for each in heard], policy.agreeing)) is None:
        number = len(heard)
        heard += await _judged(ask, fact, [candidate], policy, "confirm", number, turned=number % 2 == 1)
    same = [each for each in heard if each.relation is common]
    return same[0] if same else replace(verdict, relation=Relation.UNKNOWN, merged="")


async def _judged(
    ask: Ask, fact: Fact, candidates: Sequence[Candidate], policy: Policy, *again: object, turned: bool = False
) -> list[Verdict]:
    answer = await ask(Question(
        "compare", COMPARE_SCENE, COMPARE_ALIAS, COMPARE_INSTRUCTIONS,
        comparison_data(fact, candidates, turned=turned), COMPARE_SCHEMA,
        (fact.digest, [(str(each.item_id), each.version) for each in candidates], COMPARE_VERSION, COMPARE_ALIAS,
         *again),
    ))
    return verdicts_in(answer, candidates, policy)
