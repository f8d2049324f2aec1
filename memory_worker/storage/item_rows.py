"""Items and decisions <-> rows and snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from memory_worker.domain.decision import Action, Relation, Verdict
from memory_worker.domain.item import Fact, Item, ItemStatus, MemoryType
from memory_worker.usecases.memory_ports import Decision

ITEM_FIELDS = (
    "user_id", "item_id", "type", "title", "content", "confidence", "importance", "sensitivity", "is_explicit",
    "status", "version", "valid_from", "valid_to", "expires_at", "created_at", "updated_at", "superseded_by",
    "conversation_id", "message_id", "job_id", "confirmations",
)
_TIMES = {"valid_from", "valid_to", "expires_at", "created_at", "updated_at"}
_IDS = {"item_id", "superseded_by", "job_id"}


def item_to_row(item: Item) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(item, name) for name in ITEM_FIELDS}
    return row | {"type": int(item.type), "status": int(item.status), "digest": item.digest}


def item_from_row(row: Mapping[str, Any]) -> Item:
    values = {name: row[name] for name in ITEM_FIELDS}
    return Item(**{**values, "type": MemoryType(row["type"]), "status": ItemStatus(row["status"])})


def snapshot_of(item: Item) -> dict[str, Any]:
    """As JSON."""
    row = item_to_row(item)
    del row["digest"]
    return {
        name: value.isoformat() if isinstance(value, datetime) else str(value) if isinstance(value, UUID) else value
        for name, value in row.items()
    }


def item_from_snapshot(snapshot: Mapping[str, Any]) -> Item:
    row = dict(snapshot)
    for name, value in snapshot.items():
        if value is not None and name in _TIMES:
            row[name] = datetime.fromisoformat(value)
        elif value is not None and name in _IDS:
            row[name] = UUID(value)
    return item_from_row(row)


def fact_to_json(fact: Fact) -> dict[str, Any]:
    return {
        "type": int(fact.type), "title": fact.title, "content": fact.content, "confidence": fact.confidence,
        "importance": fact.importance, "sensitivity": fact.sensitivity, "is_explicit": fact.is_explicit,
        "valid_until": fact.valid_until and fact.valid_until.isoformat(),
    }


def fact_from_json(value: Mapping[str, Any]) -> Fact:
    until = value.get("valid_until")
    return Fact(**{
        **value, "type": MemoryType(value["type"]), "valid_until": datetime.fromisoformat(until) if until else None
    })


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "item_id": str(verdict.item_id), "version": verdict.version, "score": verdict.score,
        "relation": int(verdict.relation), "merged": verdict.merged, "reason": verdict.reason,
        "content": verdict.content,
    }


def decision_from_row(row: Mapping[str, Any]) -> Decision:
    return Decision(
        decision_id=row["decision_id"], job_id=row["job_id"], number=row["number"], fact=fact_from_json(row["fact"]),
        action=Action(row["action"]), reason=row["reason"],
        verdicts=tuple(
            Verdict(**{**each, "item_id": UUID(each["item_id"]), "relation": Relation(each["relation"])})
            for each in row["verdicts"]
        ),
        items=tuple(row["items"]), policy=row["policy"], recall=row["recall"], prompts=row["prompts"],
        decided_at=row["decided_at"],
    )
