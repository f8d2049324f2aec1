"""What the tests of our gRPC server share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.grpc_served import Served


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A server on a port of its own."""
    made = Served()
    await made.server.start()
    yield made
    made.handlers.gate.set()
    await made.server.stop(0)
