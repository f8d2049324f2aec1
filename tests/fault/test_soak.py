"""The soak, briefly: it runs ten minutes by `make soak`."""

from __future__ import annotations

from collections.abc import Callable

from tests.fault.soak import soak
from tests.support.mesh import Mesh
from tests.support.ports import free_port
from tests.support.upstream import Upstream


def test_nothing_is_left_behind_by_calls_of_every_kind(new_mesh: Callable[..., Mesh], upstream: Upstream) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    mesh = new_mesh(LLM_METRICS_LISTEN=metrics)
    mesh.start()
    told = soak(mesh, upstream, metrics, seconds=10, is_long=False)
    assert told["calls"] > 50
