"""Vectors as text, and what is near to one: PostgreSQL's own answer, and a vector database's, joined with live rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memory_worker.domain.item import Item, ItemStatus, MemoryType
from memory_worker.storage.item_rows import ITEM_FIELDS, item_from_row
from memory_worker.usecases.memory_ports import Looking, Vector

FIELDS = ", ".join(f"i.{name}" for name in ITEM_FIELDS)
LIVE = f"i.status = {ItemStatus.ACTIVE:d} AND (i.expires_at IS NULL OR i.expires_at > now())"
# The highest sensitivity that a user's switches allow, in SQL.
ALLOWED = """
coalesce((SELECT CASE WHEN sensitive_enabled THEN 2 ELSE 0 END FROM user_settings WHERE user_id = %(user_id)s), 0)
""".strip()
_OF_USER = f"""
FROM embedding e WHERE e.user_id = %(user_id)s AND e.embedder = %(embedder)s AND e.is_active
    AND e.type = ANY(%(types)s) AND e.sensitivity <= coalesce(%(most_sensitive)s::smallint, {ALLOWED})
    AND (e.expires_at IS NULL OR e.expires_at > now()) AND vector_dims(e.vector) = %(dimensions)s
"""


def _nearest_of(which: str) -> str:
    """Items are looked up for what was found alone, and count only as they are now."""
    return f"""
SELECT {FIELDS}, near.distance FROM (
    SELECT e.item_id, e.vector <=> %(vector)s::vector AS distance {_OF_USER} {which}
    ORDER BY distance, e.item_id LIMIT %(most)s
) near CROSS JOIN LATERAL (
    SELECT * FROM item i WHERE i.user_id = %(user_id)s AND i.item_id = near.item_id AND {LIVE} OFFSET 0
) i ORDER BY near.distance, i.item_id
"""


# Exact nearest neighbours among the user's own: sets are small, and an approximate index over all users would have to
# be filtered afterwards.
SCAN = _nearest_of("")
PROPOSED = _nearest_of("AND e.item_id = ANY(%(near)s)")
ANY_SENSITIVITY = 2


def text_of(vector: Vector) -> str:
    return f"[{','.join(map(repr, vector))}]"


def arguments_of(
    user_id: str, looking: Looking, *, types: Sequence[MemoryType], most: int, most_sensitive: int | None
) -> dict[str, Any]:
    """Of SCAN and PROPOSED. most_sensitive None = what the user's switches allow."""
    return {
        "user_id": user_id, "embedder": looking.embedder, "vector": text_of(looking.vector), "most": most,
        "dimensions": len(looking.vector), "types": [int(each) for each in types], "most_sensitive": most_sensitive,
        "near": list(looking.near or ()),
    }


def scored(rows: Sequence[dict[str, Any]], floor: float) -> tuple[tuple[Item, float], ...]:
    """Rows of SCAN or PROPOSED with their similarity."""
    found = ((item_from_row(row), 1.0 - float(row["distance"])) for row in rows)
    return tuple((item, score) for item, score in found if score >= floor)
