"""A process that was taken for dead wakes up with the truth: the books get the difference, once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import call_pb2, llm_service_pb2
from creditmesh.tokenstore.v1 import ledger_service_pb2, transaction_pb2

from tests.support.load import wait_until
from tests.support.mesh import Mesh, stream_request
from tests.support.ports import free_port
from tests.support.upstream import Upstream


def test_a_stalled_process_corrects_what_the_sweeper_estimated(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh = new_mesh(LLM_CALL_LEASE_SECONDS="2", LLM_HOLD_TTL_SECONDS="60")
    mesh.start()
    mesh.credit("alice", 10**9)
    mesh.register("pro", upstream.base_url, "ok,words=40,pause=0.05", timeouts={"idle": {"seconds": 60}})
    sweeper = type(mesh.llm)("llm", {**mesh.llm.environ, "LLM_LISTEN": f"127.0.0.1:{free_port()}"}, mesh.llm.log)
    sweeper.start()
    events: list[Any] = []
    try:
        stream = mesh.calls.Stream(stream_request("alice"), timeout=60)
        reader = threading.Thread(target=lambda: events.extend(stream))
        reader.start()
        wait_until(lambda: len(events) > 15, what="some words")
        time.sleep(0.7)  # a heartbeat writes what was counted
        mesh.llm.signal(signal.SIGSTOP)
        call_id = events[0].started.call_id
        swept = "SELECT swept FROM llm.call WHERE call_id = %s AND state = 2"
        wait_until(lambda: mesh.rows(mesh.llm_url, swept, (call_id,)) == [(True,)], what="the sweeper")
        wait_until(lambda: len(mesh.transactions("alice")) == 2, what="its charge")
        mesh.llm.signal(signal.SIGCONT)
        reader.join(30)
    finally:
        mesh.llm.signal(signal.SIGCONT)
        sweeper.stop()
    finished = events[-1].finished
    assert finished.usage.source == billing_pb2.USAGE_SOURCE_CORRECTED
    assert (finished.usage.input_tokens, finished.usage.output_tokens) == (11, 40)
    wait_until(lambda: len(mesh.transactions("alice")) == 3, what="the correction")
    mesh.wait_for_rest()
    correction, estimate, _ = mesh.transactions("alice")
    assert list(correction.flags) == [transaction_pb2.TRANSACTION_FLAG_CORRECTED]
    assert 0 < estimate.usage.output_tokens < 40
    assert -(correction.amount_micros + estimate.amount_micros) == finished.charge.credit_micros
    explained = mesh.ledger.ExplainCharge(
        ledger_service_pb2.ExplainChargeRequest(user_id="alice", event_id=correction.event_id), timeout=10
    )
    assert explained.agrees
    total = mesh.ledger.GetConsumption(ledger_service_pb2.GetConsumptionRequest(user_id="alice"), timeout=10).total
    assert (total.calls, total.output_tokens, total.credit_micros) == (1, 40, finished.charge.credit_micros)
    assert mesh.findings() == []
    call = mesh.calls.GetCall(llm_service_pb2.GetCallRequest(call_id=call_id), timeout=10).call
    assert (call.state, call.usage.output_tokens, call.charge.credit_micros) == (
        call_pb2.CALL_STATE_SETTLED, 40, finished.charge.credit_micros
    )
