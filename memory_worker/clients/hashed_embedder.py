"""Vectors without a model: words and their pieces hashed into a space, so that texts that share words are near.

It knows no meaning: "likes tea" and "is fond of tea" are near by "tea" alone. It costs nothing, needs no network, and
gives the same vector for the same text for ever.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from memory_worker.domain.item import normalised
from memory_worker.usecases.memory_ports import Embedded, Floors, Vector

DIMENSIONS = 256
PIECE = 3
WORD_WEIGHT = 1.0
PIECE_WEIGHT = 0.35
COMMON = frozenset({
    "a", "an", "the", "is", "are", "was", "were", "be", "to", "of", "and", "or", "in", "on", "at", "for", "with",
    "that", "this", "it", "user", "users", "he", "she", "they", "his", "her", "their",
})
"""Words that nearly every memory has; they weigh a tenth."""


class HashedEmbedder:
    """Implements Embedder."""

    name = f"hashed/1:{DIMENSIONS}"
    charges = False
    floors = Floors(recall=0.1, retrieve=0.15)

    async def embed(
        self, user_id: str, texts: Sequence[str], *, request_id: str, skip_charge: bool = False
    ) -> Embedded:
        return Embedded([vector_of(text) for text in texts])


def vector_of(text: str) -> Vector:
    """Of length 1; of a text without a word, the first axis."""
    vector = [0.0] * DIMENSIONS
    for word in normalised(text).split():
        letters = "".join(letter for letter in word if letter.isalnum())
        if not letters:
            continue
        weight = 0.1 if letters in COMMON else 1.0
        _add(vector, f"w:{letters}", WORD_WEIGHT * weight)
        framed = f"^{letters}$"
        for begin in range(max(1, len(framed) - PIECE + 1)):
            _add(vector, f"p:{framed[begin:begin + PIECE]}", PIECE_WEIGHT * weight)
    length = math.sqrt(sum(value * value for value in vector))
    if length == 0:
        return (1.0, *([0.0] * (DIMENSIONS - 1)))
    return tuple(round(value / length, 6) for value in vector)


def _add(vector: list[float], feature: str, weight: float) -> None:
    digest = hashlib.blake2b(feature.encode(), digest_size=5).digest()
    vector[int.from_bytes(digest[:4], "big") % DIMENSIONS] += weight if digest[4] & 1 else -weight
