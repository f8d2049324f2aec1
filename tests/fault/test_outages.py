"""Dependencies that go away under load and come back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import grpc
import pytest

from deploy.local.postgres import Postgres
from tests.support.errors import refused
from tests.support.load import Load, assert_exactly_once, wait_until
from tests.support.mesh import Mesh, generate_request, stream_request
from tests.support.upstream import Upstream


def prepared(new_mesh: Callable[..., Mesh], upstream: Upstream, prefix: str, **settings: str) -> tuple[Mesh, Load]:
    mesh = new_mesh(**settings)
    mesh.start()
    mesh.register("pro", upstream.base_url, "ok,words=10,pause=0.01")
    load = Load(mesh, prefix)
    load.give_credit()
    return mesh, load


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_postgresql_goes_away_under_load_and_comes_back(
    new_mesh: Callable[..., Mesh], upstream: Upstream, postgres: Postgres, how: str
) -> None:
    mesh, load = prepared(new_mesh, upstream, f"pg-{how}")
    load.run(20)
    thread = load.run_in_background(300)
    wait_until(lambda: load.outcomes["ok"] >= 60)
    getattr(postgres, how)()
    time.sleep(1.5)
    postgres.start()
    thread.join(60)
    mesh.wait_until_serving()
    load.run(20)
    result = assert_exactly_once(load, upstream)
    assert result.charged >= 100


def test_tokenstore_down_refuses_new_calls_and_charges_of_running_ones_wait(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh, load = prepared(new_mesh, upstream, "tokenstore-down")
    mesh.register("slow", upstream.base_url, "ok,words=60,pause=0.02")
    user = load.user(0)
    streams = [
        mesh.calls.Stream(stream_request(user, f"tokenstore-down-s{number}", model="slow", request_id=f"s{number}"))
        for number in range(5)
    ]
    for stream in streams:
        next(stream)
    mesh.tokenstore.kill()
    for _ in range(3):
        asked_at = time.monotonic()
        with refused(grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE"):
            mesh.calls.Generate(generate_request(user, "not now"), timeout=20)
        assert time.monotonic() - asked_at < 6
    ends = [list(stream)[-1].finished for stream in streams]
    assert all(end.charge.credit_micros > 0 for end in ends)
    assert mesh.outbox_size() == 5
    mesh.tokenstore.start()
    mesh.wait_until_serving()
    mesh.wait_for_rest()
    charged = {entry.call_id: -entry.amount_micros for entry in mesh.transactions(user) if entry.call_id}
    assert sorted(charged.values()) == sorted(end.charge.credit_micros for end in ends)
    assert mesh.findings() == []
    assert upstream.reached["not now"] == 0


def test_a_service_waits_for_its_database(new_mesh: Callable[..., Mesh], postgres: Postgres) -> None:
    mesh = new_mesh()
    postgres.stop()
    mesh.tokenstore.start()
    wait_until(lambda: "waiting_for_database" in mesh.tokenstore.text())
    assert mesh.tokenstore.is_alive()
    postgres.start()
    mesh.llm.start()
    mesh.wait_until_serving()
    mesh.credit("late", 1)
    assert mesh.balance("late").balance_micros == 1


def test_several_replicas_share_the_outbox_and_the_sweep(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    """Two processes of each service on one port; one llm process is killed, the other takes over its lanes."""
    mesh, load = prepared(new_mesh, upstream, "replicas", LLM_WORKERS="2", TOKENSTORE_WORKERS="2")
    wait_until(lambda: mesh.llm.text().count('"models":1') == 2, what="the model in both processes")
    load.run(60)
    assert_exactly_once(load, upstream)
    owners = "SELECT count(*) FROM llm.outbox_lane WHERE owner <> '' GROUP BY owner"
    wait_until(lambda: mesh.rows(mesh.llm_url, owners) == [(32,), (32,)], what="an even share of the lanes")
    (victim, *_), *_ = mesh.rows(mesh.llm_url, "SELECT owner FROM llm.outbox_lane WHERE owner <> '' ORDER BY 1")
    os.kill(int(victim.split(":")[1]), signal.SIGKILL)
    load.run(60)
    assert_exactly_once(load, upstream)
    deadlocks = mesh.rows(
        mesh.tokenstore_url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert deadlocks == [(0,)]
