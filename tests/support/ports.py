"""Free ports, below those that the system gives to outgoing connections, so that none is taken in between."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

FIRST, LAST = 15_000, 32_000
WORKERS = 8
"""So many processes of one test run find ports of their own."""
SHARE = (LAST - FIRST) // WORKERS
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
_offsets = itertools.count(random.randrange(SHARE // 2) * 2, 2)


def free_port() -> int:
    """A port that nobody listens on, whose neighbour is free too."""
    while True:
        port = FIRST + _worker * SHARE + next(_offsets) % (SHARE - 1)
        with contextlib.closing(socket.socket()) as first, contextlib.closing(socket.socket()) as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
