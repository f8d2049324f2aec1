"""Memories by hand, and why they are what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from memory_worker.domain.decision import Action, Relation
from memory_worker.domain.detectors import check
from memory_worker.domain.errors import ContentRefused, DecisionNotFound, ItemNotFound, JobNotFound, JobNotRetryable
from memory_worker.domain.item import (
    MOST_CONTENT,
    MOST_TITLE,
    Item,
    ItemStatus,
    MemoryType,
    expiry_of,
    one_line,
    title_of,
)
from memory_worker.domain.job import Job
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.memory_ports import Decision, DecisionStore, ItemStore, Vectors
from memory_worker.usecases.ports import JobQueue, ModelCallFailed, Policy
from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable, InvalidField
from servicekit.core.ids import IdSource

CHANGEABLE = frozenset({"type", "title", "content", "confidence", "importance", "sensitivity", "expires_at"})
DEFAULT_CONFIDENCE, DEFAULT_IMPORTANCE = 0.95, 0.90
"""Of what a user writes down themselves."""
WORDS = {
    Relation.DUPLICATE: "says the same", Relation.UPDATE: "is refined by it", Relation.CONFLICT: "contradicts it",
    Relation.UNRELATED: "is about something else", Relation.UNKNOWN: "was not judged",
}


class ItemKeeper:
    """Writes memories by hand, and explains them."""

    def __init__(
        self, items: ItemStore, decisions: DecisionStore, jobs: JobQueue, embedders: Embedders, *, policy: Policy,
        clock: Clock, ids: IdSource,
    ) -> None:
        self._items = items
        self._decisions = decisions
        self._jobs = jobs
        self._embedders = embedders
        self._policy = policy
        self._clock = clock
        self._ids = ids

    async def create(
        self, user_id: str, kind: MemoryType, content: str, *, title: str = "", confidence: float = 0.0,
        importance: float = 0.0, sensitivity: int = 0, actor: str, idempotency_key: str = "",
    ) -> Item:
        """Numbers of 0 mean the defaults. Raises ContentRefused."""
        text, personal = self._checked(content, "item.content")
        now = self._clock.now()
        item = Item(
            user_id=user_id, item_id=self._ids.new_id(), type=kind, title=title_of(self._checked_title(title), text),
            content=text, confidence=confidence or DEFAULT_CONFIDENCE, importance=importance or DEFAULT_IMPORTANCE,
            sensitivity=max(sensitivity, int(personal)), is_explicit=True, status=ItemStatus.ACTIVE, version=1,
            valid_from=now, valid_to=None, expires_at=expiry_of(kind, now), created_at=now, updated_at=now,
        )
        vectors = await self._vectors(user_id, text)
        return await self._items.create(item, vectors, actor=actor, idempotency_key=idempotency_key)

    async def update(
        self, user_id: str, item_id: UUID, changes: Mapping[str, Any], *, version: int | None, actor: str
    ) -> Item:
        changes = dict(changes)
        vectors: Vectors = {}
        if "content" in changes:
            changes["content"], personal = self._checked(changes["content"], "item.content")
            if personal:
                current = await self.get(user_id, item_id)
                changes["sensitivity"] = max(1, changes.get("sensitivity", current.sensitivity))
            vectors = await self._vectors(user_id, changes["content"])
            changes.setdefault("title", "")
        if "title" in changes:
            text = changes.get("content") or (await self.get(user_id, item_id)).content
            changes["title"] = title_of(self._checked_title(changes["title"]), text)
        return await self._items.change(
            user_id, item_id, changes, vectors, actor=actor, operation="updated", version=version
        )

    async def delete(self, user_id: str, item_id: UUID, *, actor: str) -> Item:
        return await self._items.change(
            user_id, item_id, {"status": ItemStatus.DELETED}, {}, actor=actor, operation="deleted", version=None
        )

    async def get(self, user_id: str, item_id: UUID) -> Item:
        found = await self._items.item(user_id, item_id)
        if found is None:
            raise ItemNotFound("there is no such memory")
        return found

    async def explain(self, user_id: str, *, decision_id: UUID | None, item_id: UUID | None) -> tuple[Decision, str]:
        decision = None
        if decision_id is not None:
            decision = await self._decisions.decision(user_id, decision_id)
        elif item_id is not None:
            decision = await self._decisions.decision_about(user_id, item_id)
        if decision is None:
            raise DecisionNotFound("there is no such decision; what was written by hand has none")
        return decision, explanation_of(decision)

    async def job(self, job_id: UUID, user_id: str) -> Job:
        found = await self._jobs.get(job_id, user_id)
        if found is None:
            raise JobNotFound("there is no such job")
        return found

    async def retry(self, job_id: UUID) -> Job:
        await self.job(job_id, "")
        job = await self._jobs.retry(job_id)
        if job is None:
            raise JobNotRetryable("the job is done, or is being worked on")
        return job

    def _checked(self, content: str, field: str) -> tuple[str, bool]:
        checked = check(one_line(content, MOST_CONTENT), self._policy.detectors)
        if checked.refused is not None:
            raise ContentRefused("this holds a secret, which is not kept", kind=str(checked.refused))
        if not checked.text:
            raise InvalidField.of(field, "must not be empty")
        return checked.text, checked.personal

    def _checked_title(self, title: str) -> str:
        checked = check(one_line(title, MOST_TITLE), self._policy.detectors)
        if checked.refused is not None:
            raise ContentRefused("the title holds a secret, which is not kept", kind=str(checked.refused))
        return checked.text

    async def _vectors(self, user_id: str, text: str) -> Vectors:
        try:
            return await self._embedders.vectors(user_id, text, lambda _: f"memory:item:{self._ids.new_id()}")
        except ModelCallFailed as failure:
            raise DependencyUnavailable(f"the embedder ({failure.reason})") from failure


def explanation_of(decision: Decision) -> str:
    """A decision in words."""
    fact = decision.fact
    lines = [f"The user was understood to say ({fact.type.name.lower()}): {fact.content or '(not kept)'}"]
    if decision.action is Action.DROP:
        lines.append(f"It was not remembered: {decision.reason}.")
        return "\n".join(lines)
    if decision.reason == "EXACT":
        lines.append("The same words were known already: that memory was confirmed.")
        return "\n".join(lines)
    if not decision.verdicts:
        lines.append("Nothing similar was known: it was added.")
        return "\n".join(lines)
    lines.append(f"It was compared with {len(decision.verdicts)} known, found by {decision.recall}:")
    for each in decision.verdicts:
        why = f" ({each.reason})" if each.reason else ""
        lines.append(f"- {each.content} [similarity {each.score:.2f}] {WORDS[each.relation]}{why}")
    carrier, closed = decision.items[:1], decision.items[1:]
    done = {
        Action.ADD: "It was added", Action.KEEP: "What says the same was kept and confirmed",
        Action.MERGE: "It was merged into the one that it refines",
    }[decision.action]
    lines.append(f"{done} as {carrier[0] if carrier else '?'} by the rules {decision.policy}.")
    if closed:
        lines.append(f"Superseded, because both could not be so: {', '.join(map(str, closed))}.")
    return "\n".join(lines)

