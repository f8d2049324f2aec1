"""Memories, decisions and jobs as they travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from creditmesh.memory.v1 import memory_pb2, memory_service_pb2

from memory_worker.domain.decision import Verdict
from memory_worker.domain.item import Fact, Item, MemoryType
from memory_worker.domain.job import Job
from memory_worker.domain.ranking import Ranked
from memory_worker.usecases.manage_items import CHANGEABLE
from memory_worker.usecases.memory_ports import AuditEntry, Decision, UserSettings
from memory_worker.usecases.replay_jobs import Replayed
from servicekit.core.errors import InvalidField
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_from_proto, timestamp_to_proto


def item_to_proto(item: Item) -> memory_pb2.MemoryItem:
    return memory_pb2.MemoryItem(
        item_id=str(item.item_id), user_id=item.user_id, type=memory_pb2.MemoryType.ValueType(item.type),
        title=item.title, content=item.content, confidence=item.confidence, importance=item.importance,
        sensitivity=item.sensitivity, is_explicit=item.is_explicit,
        status=memory_pb2.ItemStatus.ValueType(item.status), version=item.version,
        valid_from=timestamp_to_proto(item.valid_from), valid_to=optional_timestamp_to_proto(item.valid_to),
        expires_at=optional_timestamp_to_proto(item.expires_at), created_at=timestamp_to_proto(item.created_at),
        updated_at=timestamp_to_proto(item.updated_at), superseded_by=str(item.superseded_by or ""),
        conversation_id=item.conversation_id, message_id=item.message_id, job_id=str(item.job_id or ""),
        confirmations=item.confirmations,
    )


def changes_from_proto(item: memory_pb2.MemoryItem, paths: Sequence[str]) -> dict[str, Any]:
    """Raises InvalidField."""
    changes: dict[str, Any] = {}
    for path in paths:
        if path not in CHANGEABLE:
            raise InvalidField.of("update_mask", f"{path} can not be changed")
        changes[path] = getattr(item, path)
    if not changes:
        raise InvalidField.of("update_mask", "must name what to change")
    if "type" in changes:
        if not changes["type"]:
            raise InvalidField.of("item.type", "must be given")
        changes["type"] = MemoryType(changes["type"])
    if "expires_at" in changes:
        given = item.HasField("expires_at")
        changes["expires_at"] = timestamp_from_proto(item.expires_at, field="item.expires_at") if given else None
    return changes


def _fact_to_proto(fact: Fact, user_id: str) -> memory_pb2.MemoryItem:
    return memory_pb2.MemoryItem(
        user_id=user_id, type=memory_pb2.MemoryType.ValueType(fact.type), title=fact.title, content=fact.content,
        confidence=fact.confidence, importance=fact.importance, sensitivity=fact.sensitivity,
        is_explicit=fact.is_explicit,
    )


def _candidate_to_proto(verdict: Verdict) -> memory_pb2.Candidate:
    return memory_pb2.Candidate(
        item_id=str(verdict.item_id), version=verdict.version, content=verdict.content, score=verdict.score,
        relation=memory_pb2.Relation.ValueType(verdict.relation), reason=verdict.reason,
    )


def decision_to_proto(decision: Decision, user_id: str) -> memory_pb2.Decision:
    return memory_pb2.Decision(
        decision_id=str(decision.decision_id), job_id=str(decision.job_id),
        fact=_fact_to_proto(decision.fact, user_id), action=memory_pb2.Action.ValueType(decision.action),
        reason=decision.reason, candidates=map(_candidate_to_proto, decision.verdicts),
        item_ids=map(str, decision.items), policy=decision.policy, recall=decision.recall, prompts=decision.prompts,
        decided_at=timestamp_to_proto(decision.decided_at),
    )


def job_to_proto(job: Job, decisions: Sequence[Decision] = ()) -> memory_pb2.Job:
    return memory_pb2.Job(
        job_id=str(job.job_id), user_id=job.user_id, conversation_id=job.conversation_id, message_id=job.message_id,
        state=memory_pb2.JobState.ValueType(job.state), tries=job.tries,
        next_try_at=optional_timestamp_to_proto(job.next_try_at), reason=job.reason, calls=job.calls,
        tokens=job.tokens, credit_micros=job.credit_micros,
        decisions=[decision_to_proto(each, job.user_id) for each in decisions],
        created_at=timestamp_to_proto(job.created_at), ended_at=optional_timestamp_to_proto(job.ended_at),
    )


def retrieved_to_proto(ranked: Ranked, *, explain: bool) -> memory_service_pb2.RetrievedItem:
    return memory_service_pb2.RetrievedItem(
        item=item_to_proto(ranked.item), score=ranked.score, pinned=ranked.pinned,
        parts=ranked.parts if explain else {},
    )


def replayed_to_proto(replayed: Replayed) -> memory_service_pb2.ReplayedDecision:
    return memory_service_pb2.ReplayedDecision(
        decision_id=str(replayed.decision.decision_id) if replayed.decision else "",
        action=memory_pb2.Action.ValueType(replayed.decision.action if replayed.decision else 0),
        replayed_action=memory_pb2.Action.ValueType(replayed.plan.action), same=replayed.same,
        superseded=map(str, replayed.plan.superseded), content=replayed.fact.content, found=replayed.found,
        candidates=map(_candidate_to_proto, replayed.verdicts),
    )


def audit_to_proto(entry: AuditEntry) -> memory_pb2.AuditEntry:
    return memory_pb2.AuditEntry(
        item_id=str(entry.item.item_id), version=entry.item.version, operation=entry.operation, actor=entry.actor,
        decision_id=str(entry.decision_id or ""), item=item_to_proto(entry.item), at=timestamp_to_proto(entry.at),
    )


def settings_to_proto(settings: UserSettings) -> memory_pb2.MemorySettings:
    return memory_pb2.MemorySettings(
        user_id=settings.user_id, memory_enabled=settings.memory_enabled, implicit_enabled=settings.implicit_enabled,
        sensitive_enabled=settings.sensitive_enabled,
    )


def settings_from_proto(settings: memory_pb2.MemorySettings) -> UserSettings:
    return UserSettings(
        settings.user_id, settings.memory_enabled, settings.implicit_enabled, settings.sensitive_enabled
    )
