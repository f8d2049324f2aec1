"""What llm_service keeps sealed: keys of model servers, answers, and conversations where that is switched on."""

from __future__ import annotations

from collections.abc import Sequence

from llm_service.domain.errors import SecretKeyMissing
from servicekit.sealing import KeyUnknown, SealBroken, Sealer


class KeySealer:
    """Without a secret key, models without a key still work; those with one can be neither kept nor opened."""

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        self._sealer = Sealer(secret_keys)
        self.can_seal = self._sealer.can_seal
        self.is_newest = self._sealer.is_newest

    def seal(self, api_key: str, *, model_id: str) -> bytes | None:
        """Raises SecretKeyMissing."""
        if not api_key:
            return None
        return self.seal_bytes(api_key.encode(), bound_to=model_id)

    def open(self, sealed: bytes | None, *, model_id: str) -> str:
        """Raises SecretKeyMissing when it was sealed under another key, or damaged."""
        return "" if sealed is None else self.open_bytes(sealed, bound_to=model_id).decode()

    def seal_bytes(self, data: bytes, *, bound_to: str) -> bytes:
        """Raises SecretKeyMissing."""
        try:
            return self._sealer.seal(data, bound_to=bound_to)
        except KeyUnknown:
            raise SecretKeyMissing("LLM_SECRET_KEY is not set, so that nothing can be kept sealed") from None

    def open_bytes(self, sealed: bytes, *, bound_to: str) -> bytes:
        """Raises SecretKeyMissing when it was sealed under another key, or damaged."""
        try:
            return self._sealer.open(sealed, bound_to=bound_to)
        except (KeyUnknown, SealBroken) as error:
            raise SecretKeyMissing(str(error)) from None
