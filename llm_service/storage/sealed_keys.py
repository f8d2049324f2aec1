"""Keys of model servers at rest: AES-256-GCM, bound to their model, under a key that the database never sees."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from llm_service.domain.errors import SecretKeyMissing

KEY_BYTES = 32
KEY_ID_BYTES = 4
NONCE_BYTES = 12


def parse_secret_key(text: str) -> bytes:
    """Base64 of 32 bytes. Raises ValueError."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise ValueError("must be the base64 of 32 bytes") from None
    if len(key) != KEY_BYTES:
        raise ValueError("must be the base64 of 32 bytes")
    return key


class KeySealer:
    """Seals and opens. What is sealed begins with an id of the key it is sealed under, for rotation.

    Without a secret key, models without a key still work; those with one can be neither kept nor opened.
    """

    def __init__(self, secret_key: bytes | None) -> None:
        self._cipher = AESGCM(secret_key) if secret_key else None
        self._key_id = hashlib.sha256(secret_key).digest()[:KEY_ID_BYTES] if secret_key else b""

    def seal(self, api_key: str, *, model_id: str) -> bytes | None:
        """Raises SecretKeyMissing."""
        if not api_key:
            return None
        if self._cipher is None:
            raise SecretKeyMissing("LLM_SECRET_KEY is not set, so that keys of model servers can not be kept")
        nonce = os.urandom(NONCE_BYTES)
        return self._key_id + nonce + self._cipher.encrypt(nonce, api_key.encode(), model_id.encode())

    def open(self, sealed: bytes | None, *, model_id: str) -> str:
        """Raises SecretKeyMissing when it was sealed under another key, or damaged."""
        if sealed is None:
            return ""
        key_id, nonce, box = (
            sealed[:KEY_ID_BYTES], sealed[KEY_ID_BYTES:KEY_ID_BYTES + NONCE_BYTES], sealed[KEY_ID_BYTES + NONCE_BYTES:]
        )
        if self._cipher is None or key_id != self._key_id:
            raise SecretKeyMissing(f"the key of model {model_id} is sealed under another secret key")
        try:
            return self._cipher.decrypt(nonce, box, model_id.encode()).decode()
        except InvalidTag:
            raise SecretKeyMissing(f"the sealed key of model {model_id} is damaged") from None
