"""Channels to other services: TLS, the service token on every call, reconnects that do not wait for minutes.

Between services all calls are unary and go over a channel of ours; the command line, which also reads streams, uses
gRPC's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio

from servicekit.rpc.grpc_client import UnaryChannel, client_tls

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


def open_channel(target: str, *, ca_file: Path | None = None) -> grpc.aio.Channel:
    """For the command line; TLS when a CA is given."""
    if ca_file is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(ca_file.read_bytes()), options=OPTIONS)


def open_unary_channel(
    target: str, *, ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
) -> UnaryChannel:
    """Between services; TLS when a CA is given, mTLS when a certificate is given too."""
    return UnaryChannel(target, tls=None if ca_file is None else client_tls(ca_file, cert_file, key_file))


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
