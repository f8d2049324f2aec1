"""The payment providers' secrets, from a file that is read again when it changes.

    {"providers": {"alipay": ["the newest secret", "the one before, while it is rotated"]}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from servicekit.core.clock import Clock
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

RELOAD_SECONDS = 1.0
LEAST_LETTERS = 16


def parse_secrets(text: str) -> dict[str, list[str]]:
    """Raises ValueError with what is wrong; never the secret itself."""
    document = json.loads(text)
    providers = document.get("providers") if isinstance(document, dict) else None
    if not isinstance(providers, dict):
        raise ValueError('must be {"providers": {...}}')
    for name, secrets in providers.items():
        if not isinstance(secrets, list) or not all(
            isinstance(secret, str) and len(secret) >= LEAST_LETTERS for secret in secrets
        ):
            raise ValueError(f"{name}: must be a list of secrets of at least {LEAST_LETTERS} letters")
    return providers


class FileSecrets:
    """Implements PaymentSecrets. A damaged new version is refused loudly and the last good one stays."""

    def __init__(self, path: Path | None, *, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._checked_at = clock.monotonic()
        self._text = path.read_text() if path else '{"providers": {}}'
        self._secrets = parse_secrets(self._text)

    def of(self, provider: str) -> Sequence[str]:
        if self._path is not None and self._clock.monotonic() - self._checked_at >= RELOAD_SECONDS:
            self._checked_at = self._clock.monotonic()
            try:
                text = self._path.read_text()
                if text != self._text:
                    self._secrets, self._text = parse_secrets(text), text
                    log.info("payment_secrets_reloaded", providers=sorted(self._secrets))
            except (OSError, ValueError) as error:
                log.error("payment_secrets_refused", reason=str(error))
        return self._secrets.get(provider, ())
