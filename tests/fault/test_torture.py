"""A short torture run; `make torture` runs it long."""

from __future__ import annotations

import random
from collections.abc import Callable

from deploy.local.postgres import Postgres
from tests.fault.torture import torture
from tests.support.mesh import Mesh
from tests.support.upstream import Upstream


def test_random_kills_lose_nothing_and_double_nothing(
    new_mesh: Callable[..., Mesh], upstream: Upstream, postgres: Postgres
) -> None:
    mesh = new_mesh()
    mesh.start()
    result = torture(mesh, upstream, postgres=postgres, calls=400, seed=random.randrange(10**6), kills=4)
    assert (result.lost, result.doubled, result.charged_without_reaching) == ([], [], [])
    assert result.charged > 100
