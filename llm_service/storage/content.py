"""Content of conversations at rest: sealed where that is switched on, and readable whatever was on when it was kept."""

from __future__ import annotations

from uuid import UUID

from llm_service.storage.sealed_keys import KeySealer

PLAIN, SEALED = b"p", b"s"


class ContentBox:
    """Packs content, bound to the conversation that it belongs to."""

    def __init__(self, sealer: KeySealer, *, seals: bool) -> None:
        self._sealer = sealer
        self._seals = seals

    def pack(self, data: bytes, *, conversation_id: UUID) -> bytes:
        """Raises SecretKeyMissing."""
        if not self._seals:
            return PLAIN + data
        return SEALED + self._sealer.seal_bytes(data, bound_to=str(conversation_id))

    def unpack(self, packed: bytes, *, conversation_id: UUID) -> bytes:
        """Raises SecretKeyMissing when it was sealed under a key that is gone."""
        kind, data = packed[:1], packed[1:]
        return self._sealer.open_bytes(data, bound_to=str(conversation_id)) if kind == SEALED else data
