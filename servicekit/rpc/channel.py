"""Channels to other services: TLS, the service token on every call, reconnects that do not wait for minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio

OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(
    target: str, *, ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
) -> grpc.aio.Channel:
    """A channel to `target`; TLS when a CA is given, mTLS when a certificate is given too."""
    if ca_file is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        ca_file.read_bytes(),
        key_file.read_bytes() if key_file else None,
        cert_file.read_bytes() if cert_file else None,
    )
    return grpc.aio.secure_channel(target, credentials, options=OPTIONS)


class TokenMetadata:
    """`authorization: Bearer <token>` from a file that is read again when it changes; nothing without a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp = 0
        self._metadata: tuple[tuple[str, str], ...] = ()

    def __call__(self) -> Sequence[tuple[str, str]]:
        if self._path is not None:
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._metadata = (("authorization", f"Bearer {self._path.read_text().strip()}"),)
                self._stamp = stamp
        return self._metadata
