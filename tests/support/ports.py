"""Free ports."""

from __future__ import annotations

import contextlib
import socket


def free_port() -> int:
    """A port that nobody listens on, whose neighbour is free too."""
    while True:
        with contextlib.closing(socket.socket()) as first, contextlib.closing(socket.socket()) as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
