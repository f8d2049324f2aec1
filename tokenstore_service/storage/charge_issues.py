"""Issues in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from servicekit.db.database import Database
from tokenstore_service.domain.commands import IssueKind
from tokenstore_service.usecases.ports import IssueState, StoredIssue

COLUMNS = (
    "issue_id, user_id, event_id, kind, detail, seq, original, content_type, origin, state, noticed_at, resolved_at,"
    " resolved_by, note"
)
# The same message from the same place is one issue, however often it is delivered.
ADD = """
INSERT INTO charge_issue (user_id, event_id, kind, detail, original, noticed_at, seq, state, content_type, origin,
    fingerprint, resolved_by, note)
VALUES (%(user_id)s, %(event_id)s, %(kind)s, %(detail)s, %(original)s, now(), %(seq)s, 1, %(content_type)s, %(origin)s,
    md5(%(original)s || convert_to(%(origin)s, 'UTF8')), '', '')
ON CONFLICT (user_id, event_id, kind, fingerprint) DO NOTHING
"""
ISSUE = f"SELECT {COLUMNS} FROM charge_issue WHERE issue_id = %s"
ISSUES = f"""
SELECT {COLUMNS} FROM charge_issue
WHERE state = %(state)s AND (%(user_id)s = '' OR user_id = %(user_id)s)
    AND (%(kind)s::text IS NULL OR kind = %(kind)s) AND (%(before)s::bigint IS NULL OR issue_id < %(before)s)
ORDER BY issue_id DESC LIMIT %(limit)s
"""
CLOSE = f"""
UPDATE charge_issue SET state = %(state)s, resolved_at = now(), resolved_by = %(actor)s, note = %(note)s
WHERE issue_id = %(issue_id)s AND state = 1 RETURNING {COLUMNS}
"""


def _issue_from_row(row: tuple[Any, ...]) -> StoredIssue:
    values = [*row[:3], IssueKind[row[3]], *row[4:9], IssueState(row[9]), *row[10:]]
    return StoredIssue(*values)


class PostgresIssues:
    """Implements Issues."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, issues: Sequence[StoredIssue]) -> None:
        async with self._database.transaction() as connection:
            for issue in issues:
                await connection.execute(ADD, {
                    "user_id": issue.user_id, "event_id": issue.event_id, "kind": issue.kind.name,
                    "detail": issue.detail, "original": issue.original, "seq": issue.seq,
                    "content_type": issue.content_type, "origin": issue.origin,
                })

    async def issue(self, issue_id: int) -> StoredIssue | None:
        async with self._database.connection() as connection:
            row = await (await connection.execute(ISSUE, (issue_id,))).fetchone()
        return _issue_from_row(row) if row else None

    async def issues(
        self, *, user_id: str, kind: IssueKind | None, state: IssueState, before: int | None, limit: int
    ) -> list[StoredIssue]:
        async with self._database.connection() as connection:
            cursor = await connection.execute(ISSUES, {
                "user_id": user_id, "kind": None if kind is None else kind.name, "state": int(state), "before": before,
                "limit": limit,
            })
            return [_issue_from_row(row) for row in await cursor.fetchall()]

    async def close(self, issue_id: int, state: IssueState, *, actor: str, note: str) -> StoredIssue | None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(
                CLOSE, {"issue_id": issue_id, "state": int(state), "actor": actor, "note": note}
            )
            row = await cursor.fetchone()
        return _issue_from_row(row) if row else None
