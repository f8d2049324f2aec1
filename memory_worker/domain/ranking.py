"""Which memories are worth a place in a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from memory_worker.domain.item import Item, MemoryType, normalised

WEIGHTS = {"similarity": 0.45, "importance": 0.20, "confidence": 0.15, "recency": 0.10, "explicit": 0.10}
"""Similarity leads: what does not fit the question is not worth knowing now. They add up to 1, and so does a score."""
HALF_LIFE_DAYS = 30.0
MOST_PINNED = 10
PER_TYPE = {MemoryType.PREFERENCE: 0.6, MemoryType.CONSTRAINT: 0.6, MemoryType.FACT: 0.8}
"""Share of the limit that one type may fill beside the pinned ones, so that facts do not crowd out preferences."""
BYTES_PER_TOKEN = 3
"""Fewer than any tokenizer's mean over the languages that it knows: an upper bound of tokens."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """An item, its score 0..1, and the weighted parts that it is the sum of."""

    item: Item
    score: float
    parts: dict[str, float]
    pinned: bool = False


def rank(item: Item, similarity: float, *, now: datetime) -> Ranked:
    """`similarity`: cosine, -1..1."""
    age = max(0.0, (now - item.updated_at).total_seconds() / 86_400)
    raw = {
        "similarity": max(0.0, similarity), "importance": item.importance, "confidence": item.confidence,
        "recency": math.exp2(-age / HALF_LIFE_DAYS), "explicit": float(item.is_explicit),
    }
    parts = {name: WEIGHTS[name] * value for name, value in raw.items()}
    return Ranked(item, sum(parts.values()), parts)


def tokens_of(item: Item) -> int:
    """An upper bound."""
    return 1 + len(item.content.encode()) // BYTES_PER_TOKEN


def choose(
    pinned: Sequence[Ranked], found: Sequence[Ranked], *, limit: int, token_budget: int
) -> list[Ranked]:
    """Pinned constraints first, outside the semantic limit; then by score, each wording once, no type beyond its
    share, all within `token_budget` (0 = no bound)."""
    chosen: list[Ranked] = []
    seen: set[str] = set()
    left = token_budget or 10**9
    per_type: dict[MemoryType, int] = {}
    semantic = 0
    ordered = sorted(pinned, key=_order)[:MOST_PINNED] + sorted(found, key=_order)
    for each in ordered:
        key, cost = normalised(each.item.content), tokens_of(each.item)
        if key in seen or cost > left:
            continue
        if not each.pinned:
            share = math.ceil(limit * PER_TYPE[each.item.type])
            if semantic >= limit or per_type.get(each.item.type, 0) >= share:
                continue
            semantic += 1
            per_type[each.item.type] = per_type.get(each.item.type, 0) + 1
        seen.add(key)
        left -= cost
        chosen.append(each)
    return chosen


def _order(each: Ranked) -> tuple[float, str]:
    return (-each.score, str(each.item.item_id))
