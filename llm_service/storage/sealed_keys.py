"""What is kept sealed: keys of model servers and answers, by AES-256-GCM, each bound to what it belongs to, under keys
that the database never sees."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from llm_service.domain.errors import SecretKeyMissing

KEY_BYTES = 32
KEY_ID_BYTES = 4
NONCE_BYTES = 12


def parse_secret_keys(text: str) -> list[bytes]:
    """Base64 of 32 bytes each, parted by commas or white space; the first seals. Raises ValueError."""
    keys = []
    for word in re.split(r"[\s,]+", text.strip()):
        try:
            key = base64.b64decode(word, validate=True)
        except binascii.Error:
            raise ValueError("must be the base64 of 32 bytes") from None
        if len(key) != KEY_BYTES:
            raise ValueError("must be the base64 of 32 bytes")
        keys.append(key)
    return keys


class KeySealer:
    """Seals under the first key, opens under any. What is sealed begins with an id of its key, for rotation.

    Without a secret key, models without a key still work; those with one can be neither kept nor opened.
    """

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        self._ciphers = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: AESGCM(key) for key in secret_keys}
        self._newest = next(iter(self._ciphers), b"")

    @property
    def can_seal(self) -> bool:
        return bool(self._ciphers)

    def seal(self, api_key: str, *, model_id: str) -> bytes | None:
        """Raises SecretKeyMissing."""
        if not api_key:
            return None
        return self.seal_bytes(api_key.encode(), bound_to=model_id)

    def open(self, sealed: bytes | None, *, model_id: str) -> str:
        """Raises SecretKeyMissing when it was sealed under another key, or damaged."""
        return "" if sealed is None else self.open_bytes(sealed, bound_to=model_id).decode()

    def is_newest(self, sealed: bytes) -> bool:
        return sealed[:KEY_ID_BYTES] == self._newest

    def seal_bytes(self, data: bytes, *, bound_to: str) -> bytes:
        """Raises SecretKeyMissing."""
        if not self._ciphers:
            raise SecretKeyMissing("LLM_SECRET_KEY is not set, so that nothing can be kept sealed")
        nonce = os.urandom(NONCE_BYTES)
        return self._newest + nonce + self._ciphers[self._newest].encrypt(nonce, data, bound_to.encode())

    def open_bytes(self, sealed: bytes, *, bound_to: str) -> bytes:
        """Raises SecretKeyMissing when it was sealed under another key, or damaged."""
        key_id, nonce, box = (
            sealed[:KEY_ID_BYTES], sealed[KEY_ID_BYTES:KEY_ID_BYTES + NONCE_BYTES], sealed[KEY_ID_BYTES + NONCE_BYTES:]
        )
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SecretKeyMissing(f"what belongs to {bound_to} is sealed under another secret key")
        try:
            return cipher.decrypt(nonce, box, bound_to.encode())
        except InvalidTag:
            raise SecretKeyMissing(f"what is sealed for {bound_to} is damaged") from None
