"""Who calls and what they may: service tokens as `authorization: Bearer <token>`.

The tokens file is JSON and holds no token, only hashes; it is read again when it changes:

    {"tokens": [
        {"name": "chat-backend", "sha256": "<hex>", "scopes": ["llm.call"], "expires_at": "2027-01-01T00:00:00Z"}
    ]}
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from servicekit.core.clock import Clock
from servicekit.core.errors import PermissionDenied, Unauthenticated
from servicekit.telemetry.logs import EventLogger

SCOPES = frozenset({
    "llm.call", "models.admin", "billing.skip", "balance.read", "ledger.read", "holds.write", "charges.write",
    "ledger.adjust", "prices.admin", "orders.write", "orders.admin", "memory.read", "memory.write", "memory.admin",
})
OPEN = None
"""Scope of an RPC that anybody may call."""
ANY_TOKEN = ""
"""Scope of an RPC that needs a valid token and no more."""

RELOAD_SECONDS = 1.0

log = EventLogger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that proved who it is."""

    name: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        if scope and scope not in self.scopes:
            raise PermissionDenied(f"the token of {self.name} lacks the scope {scope}", scope=scope)


class Authenticator(Protocol):
    """Tells who sends a request by its authorization header. Raises Unauthenticated."""

    def authenticate(self, authorization: str | None) -> Principal: ...


class NoAuthentication:
    """Everybody on this machine may do everything; refused by the settings unless the listener is loopback."""

    _anybody = Principal("anybody", SCOPES)

    def authenticate(self, authorization: str | None) -> Principal:
        return self._anybody


@dataclass(frozen=True, slots=True)
class ServiceToken:
    """What the tokens file says of one token."""

    name: str
    digest: bytes
    scopes: frozenset[str]
    expires_at: datetime | None


def parse_tokens(text: str) -> list[ServiceToken]:
    """The tokens file. Raises ValueError with what is wrong; never lets a damaged file mean "no authentication"."""
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("tokens"), list):
        raise ValueError('must be {"tokens": [...]}')
    tokens = []
    for number, entry in enumerate(document["tokens"]):
        try:
            digest = bytes.fromhex(entry["sha256"])
            scopes = frozenset(entry["scopes"])
            expires_at = datetime.fromisoformat(entry["expires_at"]) if entry.get("expires_at") else None
            token = ServiceToken(str(entry["name"]), digest, scopes, expires_at)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"token {number}: needs name, sha256 and scopes ({error})") from None
        if len(digest) != hashlib.sha256().digest_size:
            raise ValueError(f"token {number}: sha256 must be 64 hexadecimal digits")
        if unknown := scopes - SCOPES:
            raise ValueError(f"token {number}: unknown scopes {sorted(unknown)}")
        if expires_at is not None and expires_at.tzinfo is None:
            raise ValueError(f"token {number}: expires_at needs a time zone")
        tokens.append(token)
    return tokens


class TokenFile:
    """Authenticates against a tokens file. A damaged new version is refused loudly and the last good one stays."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._checked_at = clock.monotonic()
        self._stamp = self._read_stamp()
        self._tokens = parse_tokens(path.read_text())

    def _read_stamp(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _reload_if_changed(self) -> None:
        now = self._clock.monotonic()
        if now - self._checked_at < RELOAD_SECONDS:
            return
        self._checked_at = now
        try:
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._tokens = parse_tokens(self._path.read_text())
                self._stamp = stamp
                log.info("tokens_reloaded", tokens=len(self._tokens))
        except (OSError, ValueError) as error:
            log.error("tokens_file_refused", reason=str(error))

    def authenticate(self, authorization: str | None) -> Principal:
        self._reload_if_changed()
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("send a service token as 'authorization: Bearer <token>'")
        digest = hashlib.sha256(token.encode()).digest()
        found: ServiceToken | None = None
        for candidate in self._tokens:
            if hmac.compare_digest(candidate.digest, digest):
                found = candidate
        if found is None:
            raise Unauthenticated("the service token is not known")
        if found.expires_at is not None and found.expires_at <= self._clock.now():
            raise Unauthenticated("the service token has expired")
        return Principal(found.name, found.scopes)


def unknown_scopes(scopes: Iterable[str | None]) -> set[str]:
    """Scopes of a table that do not exist."""
    return {scope for scope in scopes if scope} - SCOPES


def authenticator_of(auth: str, tokens_file: Path | None, *, clock: Clock) -> Authenticator:
    """By the settings. Raises ValueError for a damaged tokens file, and when tokens are asked for without a file."""
    if auth == "none":
        return NoAuthentication()
    if tokens_file is None:
        raise ValueError("a tokens file is needed")
    return TokenFile(tokens_file, clock=clock)
