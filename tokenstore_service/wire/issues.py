"""Issues as they travel, and as they are made of what could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import orjson
from creditmesh.events.v1 import usage_recorded_pb2
from creditmesh.tokenstore.v1 import charge_service_pb2

from servicekit.kafka.events import header_of
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_to_proto
from tokenstore_service.domain.commands import IssueKind
from tokenstore_service.usecases.ports import IssueState, StoredIssue
from tokenstore_service.usecases.resolve_issues import ACTIONS
from tokenstore_service.wire.usage_events import USAGE_TYPE

MOST_DETAIL = 500


def issue_to_proto(issue: StoredIssue) -> charge_service_pb2.ChargeIssue:
    actions = ACTIONS[issue.kind] if issue.state is IssueState.OPEN else ()
    return charge_service_pb2.ChargeIssue(
        issue_id=issue.issue_id, user_id=issue.user_id, event_id=issue.event_id,
        kind=charge_service_pb2.ChargeIssueKind.ValueType(issue.kind), detail=issue.detail, seq=issue.seq,
        original=issue.original, content_type=issue.content_type, origin=issue.origin,
        state=charge_service_pb2.ChargeIssueState.ValueType(issue.state),
        noticed_at=timestamp_to_proto(issue.noticed_at), resolved_at=optional_timestamp_to_proto(issue.resolved_at),
        resolved_by=issue.resolved_by, note=issue.note,
        actions=[charge_service_pb2.ChargeIssueAction.ValueType(action) for action in actions],
    )


def _key(text: str) -> str:
    """As much of a foreign name as fits a key of the books."""
    return text[:128] if text.isprintable() else ""


def rejected_usage(usage: usage_recorded_pb2.UsageRecorded, reason: str, *, now: datetime) -> StoredIssue:
    return StoredIssue(
        issue_id=0, user_id=_key(usage.user_id), event_id=_key(usage.event_id), kind=IssueKind.UNDECODABLE,
        detail=reason[:MOST_DETAIL], seq=0, original=usage.SerializeToString(deterministic=True),
        content_type=USAGE_TYPE, origin="", state=IssueState.OPEN, noticed_at=now,
    )


def undecodable_record(
    *, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None,
    headers: Sequence[tuple[str, bytes]], reason: str, now: datetime,
) -> StoredIssue:
    """Of a Kafka record; the bytes as they came, everything else in the origin."""
    origin = orjson.dumps({
        "topic": topic, "partition": partition, "offset": offset, "key": (key or b"").decode(errors="replace"),
        "headers": [[name, value.decode(errors="replace")] for name, value in headers],
    }).decode()
    content_type = header_of(headers, "content-type") or b"application/octet-stream"
    return StoredIssue(
        issue_id=0, user_id=_key((key or b"").decode(errors="replace"))[:64],
        event_id=_key((header_of(headers, "ce_id") or b"").decode(errors="replace")), kind=IssueKind.UNDECODABLE,
        detail=reason[:MOST_DETAIL].replace("\x00", ""), seq=0, original=value or b"",
        content_type=f"{content_type.decode(errors='replace')[:64]}; topic={topic}",
        origin=origin.replace("\\u0000", ""), state=IssueState.OPEN, noticed_at=now,
    )
