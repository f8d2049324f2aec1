"""The main job: a streamed answer, paid for exactly once, and every way in which it can end."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import grpc
import pytest
from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import call_pb2, chat_pb2, llm_service_pb2
from creditmesh.tokenstore.v1 import ledger_service_pb2

from tests.support.errors import details_of, reason_of, refused
from tests.support.mesh import Mesh, generate_request, stream_request
from tests.support.upstream import Upstream

CREDIT = 100_000_000
INPUT_PICO = 320_000_000
OUTPUT_PICO = 1_600_000_000
Code = grpc.StatusCode


@pytest.fixture(scope="module", autouse=True)
def models(mesh: Mesh, upstream: Upstream) -> None:
    behaviours = {
        "pro": "ok", "nousage": "ok,nousage", "tool": "tool", "filter": "filter", "length": "length",
        "http500": "http-500", "http429": "http-429", "http400": "http-400", "http401": "http-401",
        "toolong": "http-400,code=context_length_exceeded", "close": "close-after-3", "error": "error-after-3",
        "malformed": "malformed-after-3", "malformed0": "malformed-after-0", "close0": "close-after-0",
        "empty": "empty", "ignoremax": "ignore-max,words=300", "slow": "ok,words=400,pause=0.02",
        "notjson": "not-json", "slowwhole": "ok,pause=5", "cached": "ok,cached=5", "over": "ok,out=900",
    }
    for alias, behaviour in behaviours.items():
        mesh.register(alias, upstream.base_url, behaviour, max_output_tokens=4096)
    for alias, behaviour, timeouts in (
        ("silent", "silent", {"first_token": {"nanos": 300_000_000}}),
        ("idle", "silent-after-3", {"idle": {"nanos": 300_000_000}}),
        ("total", "ok,words=400,pause=0.02", {"total": {"nanos": 500_000_000}}),
    ):
        mesh.register(alias, upstream.base_url, behaviour, timeouts=timeouts)
    mesh.register("down", "http://127.0.0.1:9/v1", "ok")


@pytest.fixture
def user(mesh: Mesh, request: pytest.FixtureRequest) -> str:
    name = f"user-{abs(hash(request.node.nodeid)) % 10**12}"
    mesh.credit(name, CREDIT)
    return name


def run(mesh: Mesh, user: str, **fields: Any) -> tuple[Any, str, Any]:
    """Started, the whole text, finished."""
    events = list(mesh.calls.Stream(stream_request(user, **fields), timeout=20))
    assert events[0].HasField("started")
    assert events[-1].HasField("finished")
    text = "".join(event.delta.text for event in events if event.HasField("delta"))
    return events[0].started, text, events[-1].finished


def settled(mesh: Mesh, user: str, *, entries: int) -> list[Any]:
    """The user's charges, once everything has come to rest."""
    mesh.wait_for_rest()
    found = [entry for entry in mesh.transactions(user) if entry.call_id]
    assert len(found) == entries
    assert mesh.findings(user) == []
    assert mesh.balance(user).held_micros == 0
    return found


def price(input_tokens: int, output_tokens: int) -> int:
    return -(-(input_tokens * INPUT_PICO + output_tokens * OUTPUT_PICO) // 1_000_000)


def test_a_streamed_answer_is_held_for_delivered_and_charged_once(mesh: Mesh, user: str) -> None:
    started, text, finished = run(mesh, user, max_output_tokens=64)
    assert text == " word" * 8
    assert started.max_output_tokens == 64
    assert started.hold_micros >= finished.charge.credit_micros
    assert finished.finish_reason == chat_pb2.FINISH_REASON_STOP
    assert (finished.usage.input_tokens, finished.usage.output_tokens) == (11, 8)
    assert finished.usage.source == billing_pb2.USAGE_SOURCE_PROVIDER_REPORTED
    assert finished.charge.credit_micros == price(11, 8)
    (entry,) = settled(mesh, user, entries=1)
    assert (entry.event_id, entry.call_id) == (started.call_id, started.call_id)
    assert entry.amount_micros == -finished.charge.credit_micros
    assert mesh.balance(user).balance_micros == CREDIT - finished.charge.credit_micros
    explained = mesh.ledger.ExplainCharge(
        ledger_service_pb2.ExplainChargeRequest(user_id=user, event_id=started.call_id), timeout=10
    )
    assert explained.agrees
    assert explained.recomputed_micros == finished.charge.credit_micros
    assert [(line.component, line.tokens) for line in explained.lines] == [("input", 11), ("output", 8)]


def test_a_whole_answer_is_charged_the_same(mesh: Mesh, user: str) -> None:
    answer = mesh.calls.Generate(generate_request(user, max_output_tokens=64), timeout=20)
    assert answer.outputs[0].message.content[0].text == " word" * 8
    assert answer.upstream_model == "upstream-1"
    assert answer.charge.credit_micros == price(11, 8)
    (entry,) = settled(mesh, user, entries=1)
    assert entry.amount_micros == -price(11, 8)


def test_cached_tokens_are_charged_at_their_own_rate(mesh: Mesh, user: str) -> None:
    answer = mesh.calls.Generate(generate_request(user, model="cached"), timeout=20)
    assert answer.usage.cached_input_tokens == 5
    assert answer.charge.credit_micros == -(-(6 * INPUT_PICO + 5 * 80_000_000 + 8 * OUTPUT_PICO) // 10**6)


def test_the_upstream_is_asked_for_usage_and_bounded_by_the_grant(
    mesh: Mesh, user: str, upstream: Upstream
) -> None:
    run(mesh, user, text="look at me", max_output_tokens=33, temperature=0.0, stop=["END"], seed=7)
    asked = next(each for each in upstream.requests if each["messages"][-1]["content"] == "look at me")
    assert asked["max_tokens"] == 33
    assert asked["stream_options"] == {"include_usage": True}
    assert (asked["temperature"], asked["stop"], asked["seed"]) == (0.0, ["END"], 7)


def test_usage_is_counted_when_the_upstream_tells_none(mesh: Mesh, user: str) -> None:
    _, text, finished = run(mesh, user, model="nousage")
    assert finished.usage.source == billing_pb2.USAGE_SOURCE_ESTIMATED
    assert finished.usage.output_tokens == 8
    assert text == " word" * 8
    settled(mesh, user, entries=1)


@pytest.mark.parametrize(("model", "reason"), [
    ("tool", chat_pb2.FINISH_REASON_TOOL_CALLS), ("filter", chat_pb2.FINISH_REASON_CONTENT_FILTER),
    ("length", chat_pb2.FINISH_REASON_LENGTH), ("empty", chat_pb2.FINISH_REASON_STOP),
])
def test_every_end_has_its_reason_and_one_charge(mesh: Mesh, user: str, model: str, reason: int) -> None:
    _, _, finished = run(mesh, user, model=model)
    assert finished.finish_reason == reason
    settled(mesh, user, entries=1)


def test_tool_calls_arrive_in_pieces(mesh: Mesh, user: str) -> None:
    events = list(mesh.calls.Stream(stream_request(user, model="tool"), timeout=20))
    pieces = [event.delta.tool_call_delta for event in events if event.HasField("delta")]
    assert (pieces[0].id, pieces[0].name) == ("t1", "look")
    assert "".join(piece.arguments for piece in pieces) == '{"at":"sky"}'
    whole = mesh.calls.Generate(generate_request(user, model="tool"), timeout=20)
    (call,) = whole.outputs[0].message.tool_calls
    assert (call.id, call.name, call.arguments) == ("t1", "look", '{"at":"sky"}')


@pytest.mark.parametrize(("model", "code", "reason"), [
    ("http500", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"), ("http429", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    ("http401", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    ("http400", Code.FAILED_PRECONDITION, "UPSTREAM_REJECTED"),
    ("toolong", Code.INVALID_ARGUMENT, "CONTEXT_TOO_LONG"), ("down", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    ("silent", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"), ("malformed0", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    ("close0", Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
])
def test_a_failure_before_the_first_token_is_an_error_and_costs_nothing(
    mesh: Mesh, user: str, model: str, code: grpc.StatusCode, reason: str
) -> None:
    with refused(code, reason) as caught:
        run(mesh, user, model=model, request_id="r1", text="my secret")
    assert "secret" not in caught.value.details()
    call = mesh.calls.GetCall(llm_service_pb2.GetCallRequest(user_id=user, request_id="r1"), timeout=10).call
    assert (call.state, call.error_reason) == (call_pb2.CALL_STATE_FAILED, reason)
    assert settled(mesh, user, entries=0) == []
    assert mesh.balance(user).balance_micros == CREDIT
    assert "my secret" not in mesh.llm.text()


def test_a_rate_limited_upstream_says_when_to_come_back(mesh: Mesh, user: str) -> None:
    from google.rpc import error_details_pb2

    with refused(Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE") as caught:
        mesh.calls.Generate(generate_request(user, model="http429"), timeout=20)
    (retry,) = details_of(caught.value, error_details_pb2.RetryInfo)
    assert 0 < retry.retry_delay.seconds <= 7, "as the model server said, less what has passed"


def test_a_whole_answer_that_is_no_json_is_an_upstream_failure(mesh: Mesh, user: str) -> None:
    with refused(Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"):
        mesh.calls.Generate(generate_request(user, model="notjson"), timeout=20)
    settled(mesh, user, entries=0)


@pytest.mark.parametrize("model", ["close", "error", "malformed", "idle"])
def test_a_failure_after_the_first_token_is_a_finish_reason_and_charges_what_was_delivered(
    mesh: Mesh, user: str, model: str
) -> None:
    _, text, finished = run(mesh, user, model=model)
    assert text == " word" * 3
    assert finished.finish_reason == chat_pb2.FINISH_REASON_UPSTREAM_ERROR
    assert finished.usage.output_tokens == 3
    assert finished.usage.source == billing_pb2.USAGE_SOURCE_ESTIMATED
    (entry,) = settled(mesh, user, entries=1)
    assert entry.amount_micros == -finished.charge.credit_micros < 0


def test_the_models_total_timeout_ends_the_stream(mesh: Mesh, user: str) -> None:
    _, text, finished = run(mesh, user, model="total")
    assert finished.finish_reason == chat_pb2.FINISH_REASON_DEADLINE
    assert 0 < text.count("word") < 400
    assert finished.usage.output_tokens == text.count("word")
    settled(mesh, user, entries=1)


def test_the_clients_deadline_ends_the_stream_and_is_still_told_the_charge(mesh: Mesh, user: str) -> None:
    events = list(mesh.calls.Stream(stream_request(user, model="slow"), timeout=2.0))
    finished = events[-1].finished
    assert finished.finish_reason == chat_pb2.FINISH_REASON_DEADLINE
    assert finished.charge.credit_micros > 0
    settled(mesh, user, entries=1)


def test_a_deadline_before_the_first_token_charges_the_input(mesh: Mesh, user: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        mesh.calls.Generate(generate_request(user, "some words of input", model="slowwhole"), timeout=0.5)
    error: Any = caught.value
    assert error.code() is Code.DEADLINE_EXCEEDED
    (entry,) = settled(mesh, user, entries=1)
    assert entry.usage.input_tokens > 5
    assert entry.usage.output_tokens == 0


def test_a_client_that_leaves_stops_the_upstream_and_pays_for_what_it_got(
    mesh: Mesh, user: str, upstream: Upstream
) -> None:
    stream = mesh.calls.Stream(stream_request(user, model="slow"), timeout=20)
    next(stream)
    for _ in range(5):
        next(stream)
    stream.cancel()
    left_at = time.monotonic()
    while upstream.open_streams:
        assert time.monotonic() - left_at < 1.0, "the upstream still streams a second after the client left"
        time.sleep(0.01)
    (entry,) = settled(mesh, user, entries=1)
    assert 5 <= entry.usage.output_tokens < 100
    (call,) = mesh.calls.ListCalls(llm_service_pb2.ListCallsRequest(user_id=user), timeout=10).calls
    assert call.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
    assert call.charge.credit_micros == -entry.amount_micros


def test_a_client_that_leaves_before_the_first_token_pays_for_the_input(mesh: Mesh, user: str) -> None:
    stream = mesh.calls.Stream(stream_request(user, model="silent", text="a few words of input"), timeout=20)
    next(stream)
    time.sleep(0.1)
    stream.cancel()
    (entry,) = settled(mesh, user, entries=1)
    assert entry.usage.output_tokens == 0
    assert entry.usage.input_tokens > 5


def test_a_client_that_leaves_before_the_model_is_reached_pays_nothing(mesh: Mesh, user: str) -> None:
    with contextlib.closing(socket.socket()) as deaf:
        # A full backlog: connections are neither taken nor refused.
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(deaf.getsockname())
        mesh.register("deaf", f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", "ok")
        with pytest.raises(grpc.RpcError) as caught:
            mesh.calls.Generate(generate_request(user, model="deaf", request_id="r"), timeout=0.5)
        for each in waiting:
            each.close()
    error: Any = caught.value
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert settled(mesh, user, entries=0) == []
    call = mesh.calls.GetCall(llm_service_pb2.GetCallRequest(user_id=user, request_id="r"), timeout=10).call
    assert (call.state, call.error_reason) == (call_pb2.CALL_STATE_FAILED, "DEADLINE_EXCEEDED")


def test_cancel_call_ends_a_running_stream_with_its_charge(mesh: Mesh, user: str) -> None:
    stream = mesh.calls.Stream(stream_request(user, model="slow"), timeout=20)
    call_id = next(stream).started.call_id
    next(stream)
    mesh.calls.CancelCall(llm_service_pb2.CancelCallRequest(call_id=call_id, user_id=user), timeout=10)
    finished = list(stream)[-1].finished
    assert finished.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
    assert finished.charge.credit_micros > 0
    settled(mesh, user, entries=1)
    with refused(Code.FAILED_PRECONDITION, "CALL_NOT_RUNNING"):
        mesh.calls.CancelCall(llm_service_pb2.CancelCallRequest(call_id=call_id), timeout=10)


def test_another_users_call_is_not_found(mesh: Mesh, user: str) -> None:
    started, _, _ = run(mesh, user)
    for call in (
        lambda: mesh.calls.GetCall(
            llm_service_pb2.GetCallRequest(call_id=started.call_id, user_id="somebody"), timeout=10
        ),
        lambda: mesh.calls.CancelCall(
            llm_service_pb2.CancelCallRequest(call_id=started.call_id, user_id="somebody"), timeout=10
        ),
    ):
        with refused(Code.NOT_FOUND, "CALL_NOT_FOUND"):
            call()


def test_an_upstream_that_ignores_the_bound_is_cut_and_never_charged_above_the_hold(mesh: Mesh, user: str) -> None:
    started, _text, finished = run(mesh, user, model="ignoremax", max_output_tokens=100)
    assert finished.finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert finished.usage.output_tokens <= 100
    assert finished.charge.credit_micros <= started.hold_micros
    settled(mesh, user, entries=1)


def test_credit_for_less_clips_the_answer_and_says_so(mesh: Mesh, user: str) -> None:
    poor = f"{user}-poor"
    mesh.credit(poor, 50_000)
    started, text, finished = run(mesh, poor, model="ignoremax", max_output_tokens=200)
    assert started.max_output_tokens < 200
    assert started.hold_micros <= 50_000
    assert finished.finish_reason == chat_pb2.FINISH_REASON_CREDIT_EXHAUSTED
    assert finished.usage.output_tokens == started.max_output_tokens
    assert text.count("word") == started.max_output_tokens
    settled(mesh, poor, entries=1)
    assert mesh.balance(poor).balance_micros >= 0


def test_no_credit_is_refused_with_what_was_needed(mesh: Mesh) -> None:
    from google.rpc import error_details_pb2

    with refused(Code.RESOURCE_EXHAUSTED, "INSUFFICIENT_CREDIT") as caught:
        run(mesh, "nobody-has-credit")
    (info,) = details_of(caught.value, error_details_pb2.ErrorInfo)
    assert int(info.metadata["needed_micros"]) > 0
    assert info.metadata["available_micros"] == "0"
    (quota,) = details_of(caught.value, error_details_pb2.QuotaFailure)
    assert quota.violations[0].subject == "user:nobody-has-credit"
    assert mesh.rows(mesh.tokenstore_url, "SELECT 1 FROM tokenstore.account WHERE user_id = 'nobody-has-credit'") == []


def test_more_than_the_hold_is_booked_in_full_and_flagged(mesh: Mesh, user: str) -> None:
    from creditmesh.tokenstore.v1 import transaction_pb2

    started, _, finished = run(mesh, user, model="over", max_output_tokens=64)
    assert finished.usage.output_tokens == 900
    assert finished.charge.credit_micros > started.hold_micros
    (entry,) = settled(mesh, user, entries=1)
    assert entry.amount_micros == -finished.charge.credit_micros
    assert list(entry.flags) == [transaction_pb2.TRANSACTION_FLAG_OVERRUN]


def test_a_skipped_charge_is_booked_as_zero_with_its_usage(mesh: Mesh) -> None:
    from creditmesh.tokenstore.v1 import transaction_pb2

    _, _, finished = run(mesh, "free-rider", billing={"skip_charge": True})
    assert finished.charge.status == billing_pb2.CHARGE_STATUS_SKIPPED
    (entry,) = settled(mesh, "free-rider", entries=1)
    assert (entry.amount_micros, entry.status) == (0, transaction_pb2.TRANSACTION_STATUS_SKIPPED)
    assert entry.usage.output_tokens == 8


class TestRepeats:
    """The same request_id: never a second charge."""

    def test_a_finished_request_is_told_again(self, mesh: Mesh, user: str, upstream: Upstream) -> None:
        first = mesh.calls.Generate(generate_request(user, "say it once", request_id="r"), timeout=20)
        again = mesh.calls.Generate(generate_request(user, "say it once", request_id="r"), timeout=20)
        assert again.replayed
        assert not first.replayed
        again.replayed = False
        first.ClearField("timing")
        assert again == first
        started, text, finished = run(mesh, user, text="say it once", request_id="r")
        assert started.replayed
        assert text == " word" * 8
        assert finished.charge == first.charge
        assert upstream.reached["say it once"] == 1
        settled(mesh, user, entries=1)

    def test_other_content_is_a_conflict(self, mesh: Mesh, user: str) -> None:
        run(mesh, user, text="one", request_id="r")
        with refused(Code.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
            run(mesh, user, text="two", request_id="r")

    def test_a_running_request_is_in_flight(self, mesh: Mesh, user: str) -> None:
        stream = mesh.calls.Stream(stream_request(user, model="slow", request_id="r"), timeout=20)
        next(stream)
        with refused(Code.ABORTED, "REQUEST_IN_FLIGHT"):
            mesh.calls.Stream(stream_request(user, model="slow", request_id="r"), timeout=20).next()
        stream.cancel()
        settled(mesh, user, entries=1)

    def test_a_request_that_failed_uncharged_may_be_tried_again(self, mesh: Mesh, user: str) -> None:
        for _ in range(2):
            with refused(Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"):
                run(mesh, user, model="http500", request_id="r")
        settled(mesh, user, entries=0)

    def test_a_finished_request_whose_answer_is_gone_says_so(self, mesh: Mesh, user: str) -> None:
        first = mesh.calls.Generate(generate_request(user, request_id="r"), timeout=20)
        mesh.execute(mesh.llm_url, "DELETE FROM llm.call_answer WHERE call_id = %s", (first.call_id,))
        with refused(Code.ALREADY_EXISTS, "REQUEST_FINISHED"):
            run(mesh, user, request_id="r")

    def test_many_at_once_reach_the_model_once(self, mesh: Mesh, user: str, upstream: Upstream) -> None:
        futures = [
            mesh.calls.Generate.future(generate_request(user, "all at once", request_id="r"), timeout=20)
            for _ in range(20)
        ]
        outcomes = [future.exception() for future in futures]
        assert sum(outcome is None for outcome in outcomes) >= 1
        assert {reason_of(outcome) for outcome in outcomes if outcome is not None} <= {"REQUEST_IN_FLIGHT"}
        assert upstream.reached["all at once"] == 1
        settled(mesh, user, entries=1)
