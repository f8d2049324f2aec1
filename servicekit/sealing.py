"""What is kept or sent sealed: AES-256-GCM, each bound to what it belongs to, under keys that no store ever sees."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

KEY_BYTES = 32
KEY_ID_BYTES = 4
NONCE_BYTES = 12


class KeyUnknown(Exception):
    """It is sealed under a key that is not there, or there is none to seal under."""


class SealBroken(Exception):
    """It is damaged, or belongs to something else."""


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


def keys_of(text: SecretStr | None, file: Path | None) -> list[bytes]:
    """Of a setting that is given itself or as a file; none = no keys. Raises ValueError."""
    if text is not None and file is not None:
        raise ValueError("give this or the file, not both")
    if text is not None:
        return parse_secret_keys(text.get_secret_value())
    if file is not None and file.is_file():
        return parse_secret_keys(file.read_text())
    return []


class Sealer:
    """Seals under the first key, opens under any. What is sealed begins with an id of its key, for rotation."""

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        self._ciphers = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: AESGCM(key) for key in secret_keys}
        self._newest = next(iter(self._ciphers), b"")

    @property
    def can_seal(self) -> bool:
        return bool(self._ciphers)

    def is_newest(self, sealed: bytes) -> bool:
        return sealed[:KEY_ID_BYTES] == self._newest

    def seal(self, data: bytes, *, bound_to: str) -> bytes:
        """Raises KeyUnknown."""
        if not self._ciphers:
            raise KeyUnknown("there is no key to seal under")
        nonce = os.urandom(NONCE_BYTES)
        return self._newest + nonce + self._ciphers[self._newest].encrypt(nonce, data, bound_to.encode())

    def open(self, sealed: bytes, *, bound_to: str) -> bytes:
        """Raises KeyUnknown, SealBroken."""
        key_id, nonce, box = (
            sealed[:KEY_ID_BYTES], sealed[KEY_ID_BYTES:KEY_ID_BYTES + NONCE_BYTES], sealed[KEY_ID_BYTES + NONCE_BYTES:]
        )
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise KeyUnknown(f"what belongs to {bound_to} is sealed under another secret key")
        try:
            return cipher.decrypt(nonce, box, bound_to.encode())
        except (InvalidTag, ValueError):
            raise SealBroken(f"what is sealed for {bound_to} is damaged") from None
