"""kill -9 of each service at each point with something to lose."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from servicekit.core.faults import FaultPoint
from tests.support.load import Load, assert_exactly_once
from tests.support.mesh import Mesh
from tests.support.upstream import Upstream

KILL_LLM = [
    FaultPoint.BEFORE_HOLD, FaultPoint.AFTER_HOLD, FaultPoint.MID_STREAM, FaultPoint.BEFORE_SETTLE,
    FaultPoint.AFTER_SETTLE, FaultPoint.BEFORE_PUBLISH, FaultPoint.AFTER_PUBLISH,
]

PUBLISHING = {FaultPoint.BEFORE_PUBLISH, FaultPoint.AFTER_PUBLISH}


def prepared(new_mesh: Callable[..., Mesh], upstream: Upstream, prefix: str) -> tuple[Mesh, Load]:
    mesh = new_mesh()
    mesh.start()
    mesh.register("pro", upstream.base_url, "ok,words=10,pause=0.01")
    load = Load(mesh, prefix)
    load.give_credit()
    return mesh, load


@pytest.mark.parametrize("point", KILL_LLM)
def test_llm_service_is_killed(new_mesh: Callable[..., Mesh], upstream: Upstream, point: FaultPoint) -> None:
    mesh, load = prepared(new_mesh, upstream, f"llm-{point}")
    load.run(10)
    mesh.llm.kill()
    mesh.llm.start(LLM_FAULT=f"{point}:{1 if point in PUBLISHING else 12}")
    mesh.wait_until_serving()
    load.run(60)
    assert mesh.llm.wait() == -9, f"the fault point was not reached: {load.outcomes}"
    mesh.llm.start()
    mesh.wait_until_serving()
    load.run(10)
    result = assert_exactly_once(load, upstream)
    assert result.charged >= 15
    assert load.outcomes["ok"] >= 15


@pytest.mark.parametrize("point", [
    FaultPoint.APPLY_LOADED, FaultPoint.APPLY_WRITTEN, FaultPoint.BEFORE_APPLY_COMMIT, FaultPoint.AFTER_APPLY_COMMIT,
])
def test_tokenstore_is_killed(new_mesh: Callable[..., Mesh], upstream: Upstream, point: FaultPoint) -> None:
    mesh, load = prepared(new_mesh, upstream, f"tokenstore-{point}")
    load.run(10)
    mesh.tokenstore.kill()
    mesh.tokenstore.start(TOKENSTORE_FAULT=f"{point}:15")
    mesh.wait_until_serving()
    load.run(60)
    assert mesh.tokenstore.wait() == -9, "the fault point was not reached"
    mesh.tokenstore.start()
    mesh.wait_until_serving()
    load.run(10)
    assert_exactly_once(load, upstream)
    assert load.outcomes["ok"] >= 15


def test_a_long_stream_whose_process_dies_is_charged_by_its_checkpoint(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    from creditmesh.llm.v1 import call_pb2, llm_service_pb2

    from tests.support.mesh import stream_request

    mesh, load = prepared(new_mesh, upstream, "checkpoint")
    mesh.register("long", upstream.base_url, "ok,words=500,pause=0.02")
    user = load.user(0)
    stream = mesh.calls.Stream(stream_request(user, "checkpoint-long", model="long", request_id="c1"), timeout=30)
    for _ in range(80):
        next(stream)
    mesh.llm.kill()
    mesh.llm.start()
    mesh.wait_until_serving()
    mesh.wait_for_rest()
    call = mesh.calls.GetCall(llm_service_pb2.GetCallRequest(user_id=user, request_id="c1"), timeout=10).call
    assert (call.state, call.swept) == (call_pb2.CALL_STATE_SETTLED, True)
    assert 10 <= call.usage.output_tokens <= 120
    (entry,) = [entry for entry in mesh.transactions(user) if entry.call_id]
    assert entry.amount_micros == -call.charge.credit_micros < 0
    assert mesh.findings() == []


def test_sigterm_lets_running_calls_end_and_settles_them(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh, load = prepared(new_mesh, upstream, "drain")
    thread = load.run_in_background(200)
    while load.outcomes["ok"] < 20:
        thread.join(0.05)
    assert mesh.llm.stop() == 0
    thread.join(30)
    mesh.llm.start()
    mesh.wait_until_serving()
    result = assert_exactly_once(load, upstream)
    assert result.unknown == 0
    assert result.charged == load.outcomes["ok"]
