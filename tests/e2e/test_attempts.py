"""More than one model behind an alias: retries, fallback, breakers, limits, hedging; and who pays for what."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import call_pb2, chat_pb2, llm_service_pb2, user_policy_service_pb2
from creditmesh.tokenstore.v1 import pricing_service_pb2
from google.rpc import error_details_pb2

from tests.support.errors import details_of, facts_of, refused
from tests.support.mesh import Mesh, generate_request, stream_request
from tests.support.upstream import Upstream

Code = grpc.StatusCode
CREDIT = 1_000_000_000
K = call_pb2


@pytest.fixture
def user(mesh: Mesh, request: pytest.FixtureRequest) -> str:
    name = f"user-{abs(hash(request.node.nodeid)) % 10**12}"
    mesh.credit(name, CREDIT)
    return name


@pytest.fixture
def alias(request: pytest.FixtureRequest) -> str:
    return f"m{abs(hash(request.node.nodeid)) % 10**10}"


def call_of(mesh: Mesh, call_id: str) -> Any:
    return mesh.calls.GetCall(llm_service_pb2.GetCallRequest(call_id=call_id), timeout=10).call


def stream(mesh: Mesh, user: str, **fields: Any) -> tuple[str, str, Any]:
    events = list(mesh.calls.Stream(stream_request(user, **fields), timeout=20))
    text = "".join(event.delta.text for event in events if event.HasField("delta"))
    return events[0].started.call_id, text, events[-1].finished


def charges(mesh: Mesh, user: str, *, entries: int) -> list[Any]:
    mesh.wait_for_rest()
    found = [entry for entry in mesh.transactions(user) if entry.call_id]
    assert len(found) == entries
    assert mesh.findings(user) == []
    assert mesh.balance(user).held_micros == 0
    return found


@pytest.mark.parametrize("behaviour", ["fails-times-2", "limits-times-1"])
def test_a_failure_before_the_first_token_is_tried_again(
    mesh: Mesh, user: str, alias: str, upstream: Upstream, behaviour: str
) -> None:
    mesh.register(alias, upstream.base_url, behaviour)
    text = f"try {behaviour}"
    began = time.monotonic()
    call_id, said, finished = stream(mesh, user, text=text, model=alias)
    assert said == " word" * 8
    assert not finished.fallback
    tries = int(behaviour[-1]) + 1
    assert finished.attempts == upstream.reached[text] == tries
    call = call_of(mesh, call_id)
    assert [attempt.kind for attempt in call.attempts] == [K.ATTEMPT_KIND_FIRST] + [K.ATTEMPT_KIND_RETRY] * (tries - 1)
    assert [attempt.error_reason for attempt in call.attempts] == ["UPSTREAM_UNAVAILABLE"] * (tries - 1) + [""]
    assert [attempt.charged for attempt in call.attempts] == [False] * (tries - 1) + [True]
    assert call.attempts[-1].usage.output_tokens == 8
    if behaviour.startswith("limits"):
        assert time.monotonic() - began >= 0.2, "Retry-After is honoured"
    charges(mesh, user, entries=1)


def test_another_model_answers_when_one_is_gone_and_nobody_notices(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    mesh.register(alias, "http://127.0.0.1:9/v1", "ok", priority=0)
    mesh.register(alias, upstream.base_url, "http-401", priority=1)
    mesh.register(alias, upstream.base_url, "ok", priority=2, max_retries=0)
    answer = mesh.calls.Generate(generate_request(user, model=alias), timeout=20)
    assert answer.outputs[0].message.content[0].text == " word" * 8
    assert answer.fallback
    call = call_of(mesh, answer.call_id)
    assert call.attempts[-1].kind == K.ATTEMPT_KIND_FALLBACK
    assert [attempt.http_status for attempt in call.attempts if attempt.http_status] == [401]
    charges(mesh, user, entries=1)


def test_the_model_that_answers_sets_the_price_and_the_hold_reaches_for_the_dearest(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    for provider, markup in (("cheap", 0), ("dear", 90_000)):
        mesh.prices.CreatePriceRule(pricing_service_pb2.CreatePriceRuleRequest(price_rule={
            "scene": "*", "model": alias, "provider": f"{provider}-{alias}", "currency": "CNY",
            "input_price_micros_per_mtok": 3_200_000, "output_price_micros_per_mtok": 16_000_000,
            "credits_per_currency_unit": 100, "markup_bps": markup, "status": pricing_service_pb2.PRICE_RULE_STATUS_ACTIVE,
        }, idempotency_key=f"{provider}-{alias}"), timeout=10)
    mesh.register(alias, upstream.base_url, "http-503", price_provider=f"cheap-{alias}", max_retries=0)
    mesh.register(alias, upstream.base_url, "ok", price_provider=f"dear-{alias}", priority=1)
    call_id, _, finished = stream(mesh, user, model=alias, max_output_tokens=64)
    call = call_of(mesh, call_id)
    plain = 11 * 320_000_000 + 8 * 1_600_000_000
    assert finished.charge.credit_micros == -(-plain * 10 // 10**6)
    assert call.hold_micros > 64 * 1_600 * 10
    (entry,) = charges(mesh, user, entries=1)
    assert entry.provider == f"dear-{alias}"
    assert entry.quote.price_rule_id == finished.charge.price_rule_id
    assert not entry.flags


def test_after_the_first_token_there_is_no_second_attempt(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "error-after-3")
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    _, text, finished = stream(mesh, user, model=alias)
    assert text == " word" * 3
    assert (finished.finish_reason, finished.attempts) == (chat_pb2.FINISH_REASON_UPSTREAM_ERROR, 1)
    charges(mesh, user, entries=1)


def test_what_the_caller_did_wrong_is_not_tried_elsewhere(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "http-400")
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    with refused(Code.FAILED_PRECONDITION, "UPSTREAM_REJECTED") as caught:
        mesh.calls.Generate(generate_request(user, model=alias), timeout=20)
    assert facts_of(caught.value)["attempts"] == "1"
    charges(mesh, user, entries=0)


def test_a_prompt_too_long_for_one_goes_to_one_with_a_wider_window(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    narrow = {"context_window": 1000, "max_output_tokens": 500}
    mesh.register(alias, upstream.base_url, "http-400,code=context_length_exceeded", **narrow)
    mesh.register(alias, upstream.base_url, "ok", priority=1, **narrow)
    mesh.register(alias, upstream.base_url, "ok,words=5", priority=2, context_window=100_000)
    _, text, finished = stream(mesh, user, model=alias, max_output_tokens=100)
    assert text == " word" * 5
    assert finished.attempts == 2
    long = "word " * 2000
    _, text, finished = stream(mesh, user, text=long, model=alias, max_output_tokens=100)
    assert finished.attempts == 1, "the narrow ones are not even asked"


def test_a_model_that_keeps_failing_is_left_alone_and_tried_again_by_one(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    model_id = mesh.register(alias, upstream.base_url, "http-500", max_retries=0)
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    for _ in range(6):
        stream(mesh, user, text="breaker", model=alias)
    before = upstream.reached["breaker"]
    _, _, finished = stream(mesh, user, text="breaker", model=alias)
    assert finished.attempts == 1, "the open breaker costs no attempt"
    assert finished.fallback
    assert upstream.reached["breaker"] == before + 1
    mesh.models.UpdateModel(_update(model_id, upstream_model="ok"), timeout=10)
    _, _, finished = stream(mesh, user, text="breaker", model=alias)
    assert not finished.fallback, "a changed model begins anew"


def _update(model_id: str, **fields: Any) -> Any:
    from creditmesh.llm.v1 import model_service_pb2

    return model_service_pb2.UpdateModelRequest(
        model={"model_id": model_id, **fields}, update_mask={"paths": list(fields)}
    )


def test_the_slower_of_two_is_stopped_and_the_faster_answers(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "silent", hedge_after={"nanos": 100_000_000})
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    began = time.monotonic()
    call_id, text, finished = stream(mesh, user, text="hedge", model=alias)
    assert text == " word" * 8
    assert time.monotonic() - began < 3
    assert (finished.attempts, finished.fallback) == (2, True)
    call = call_of(mesh, call_id)
    kinds = {attempt.kind: attempt for attempt in call.attempts}
    assert kinds[K.ATTEMPT_KIND_FIRST].error_reason == "HEDGE_LOST"
    assert kinds[K.ATTEMPT_KIND_HEDGE].charged
    assert not kinds[K.ATTEMPT_KIND_FIRST].charged
    (entry,) = charges(mesh, user, entries=1)
    assert entry.usage.input_tokens == 11
    deadline = time.monotonic() + 2
    while upstream.open_streams:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hedge_that_is_billed_is_accounted_for(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "silent", hedge_after={"nanos": 50_000_000}, bills_failed_attempts=True)
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    call_id, _, finished = stream(mesh, user, text="some words that count", model=alias)
    call = call_of(mesh, call_id)
    loser = next(attempt for attempt in call.attempts if attempt.kind == K.ATTEMPT_KIND_FIRST)
    assert loser.charged
    assert loser.usage.output_tokens == 0
    assert finished.usage.input_tokens == 11 + loser.usage.input_tokens
    assert finished.charge.credit_micros <= call.hold_micros
    charges(mesh, user, entries=1)


@pytest.mark.parametrize("billed", [True, False])
def test_what_a_failed_attempt_used_is_charged_where_its_provider_bills_it(
    mesh: Mesh, user: str, alias: str, upstream: Upstream, billed: bool
) -> None:
    mesh.register(alias, upstream.base_url, "usage-error,prompt=7,out=3", bills_failed_attempts=billed, max_retries=0)
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    _, _, finished = stream(mesh, user, model=alias)
    extra = (7, 3) if billed else (0, 0)
    assert (finished.usage.input_tokens, finished.usage.output_tokens) == (11 + extra[0], 8 + extra[1])
    alone = f"{alias}a"
    mesh.register(alone, upstream.base_url, "usage-error,prompt=7,out=3", bills_failed_attempts=billed, max_retries=0)
    with refused(Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE") as caught:
        stream(mesh, user, model=alone)
    assert ("nothing was charged" in caught.value.details()) != billed
    found = charges(mesh, user, entries=1 + billed)
    if billed:
        assert (found[0].usage.input_tokens, found[0].usage.output_tokens) == (7, 3)


def test_the_deadline_ends_the_attempts(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "fails-times-99", max_retries=10)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        mesh.calls.Generate(generate_request(user, "no end", model=alias), timeout=0.6)
    error: Any = caught.value
    assert error.code() in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE)
    assert time.monotonic() - began < 1.5
    charges(mesh, user, entries=0)


# Limits


def run_at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    def caught(number: int) -> Any:
        try:
            return work(number)
        except grpc.RpcError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(caught, range(count)))


def test_a_models_concurrency_is_kept_and_others_wait_their_turn(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    mesh.register(alias, upstream.base_url, "ok,words=4,pause=0.05", limits={"max_concurrency": 2})
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], upstream.open_streams)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = run_at_once(8, lambda _number: stream(mesh, user, model=alias)[2])
    stop.set()
    watcher.join()
    assert [finished.finish_reason for finished in done] == [chat_pb2.FINISH_REASON_STOP] * 8
    assert most[0] == 2
    queued = [finished.timing.queue.nanos + finished.timing.queue.seconds * 10**9 for finished in done]
    assert sum(nanos > 0 for nanos in queued) >= 5
    charges(mesh, user, entries=8)


def test_a_full_model_spills_over_to_the_fallback(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "ok,words=20,pause=0.05", limits={"max_concurrency": 1})
    mesh.register(alias, upstream.base_url, "ok", priority=1)
    done = run_at_once(3, lambda _number: stream(mesh, user, model=alias)[2])
    assert sorted(finished.fallback for finished in done) == [False, True, True]


def test_requests_per_minute_are_refused_with_when_to_come_back(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    mesh.register(alias, upstream.base_url, "ok", limits={"rpm": 2})
    for _ in range(2):
        stream(mesh, user, model=alias)
    with refused(Code.RESOURCE_EXHAUSTED, "RATE_LIMITED") as caught:
        stream(mesh, user, model=alias, request_id="third")
    (retry,) = details_of(caught.value, error_details_pb2.RetryInfo)
    assert 20 <= retry.retry_delay.seconds <= 30
    call = mesh.calls.GetCall(llm_service_pb2.GetCallRequest(user_id=user, request_id="third"), timeout=10).call
    assert (call.state, call.error_reason) == (call_pb2.CALL_STATE_FAILED, "RATE_LIMITED")
    charges(mesh, user, entries=2)


def test_tokens_per_minute_count_what_was_used(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "ok", limits={"tpm": 300})
    for _ in range(4):
        # Each takes more than 200 at first, and gives back all but the 19 that it used.
        stream(mesh, user, model=alias, max_output_tokens=200)
    with refused(Code.RESOURCE_EXHAUSTED, "RATE_LIMITED"):
        stream(mesh, user, model=alias, max_output_tokens=280)


def test_a_user_has_limits_too_and_a_policy_changes_them(mesh: Mesh, user: str, upstream: Upstream, alias: str) -> None:
    mesh.register(alias, upstream.base_url, "ok")
    set_policy(mesh, user, limits={"rpm": 1})
    stream(mesh, user, model=alias)
    with refused(Code.RESOURCE_EXHAUSTED, "RATE_LIMITED"):
        stream(mesh, user, model=alias)
    set_policy(mesh, user, limits={"rpm": 0})
    stream(mesh, user, model=alias)
    charges(mesh, user, entries=2)


def set_policy(mesh: Mesh, user: str, **fields: Any) -> Any:
    request = user_policy_service_pb2.SetUserPolicyRequest(policy={"user_id": user, **fields})
    return mesh.policies.SetUserPolicy(request, timeout=10).policy


def test_policies_are_set_read_listed_and_deleted(mesh: Mesh) -> None:
    P = user_policy_service_pb2
    for name in ("policy-a", "policy-b", "policy-c"):
        assert set_policy(mesh, name, keep_no_answers=True).keep_no_answers
    assert mesh.policies.GetUserPolicy(P.GetUserPolicyRequest(user_id="policy-a"), timeout=10).policy.keep_no_answers
    found, token = [], ""
    while True:
        page = mesh.policies.ListUserPolicies(P.ListUserPoliciesRequest(page_size=2, page_token=token), timeout=10)
        found += [policy.user_id for policy in page.policies]
        token = page.next_page_token
        if not token:
            break
    assert [name for name in found if name.startswith("policy-")] == ["policy-a", "policy-b", "policy-c"]
    mesh.policies.DeleteUserPolicy(P.DeleteUserPolicyRequest(user_id="policy-a"), timeout=10)
    policy = mesh.policies.GetUserPolicy(P.GetUserPolicyRequest(user_id="policy-a"), timeout=10).policy
    assert (policy.keep_no_answers, policy.HasField("limits")) == (False, False)


# Structured output

SCHEMA = '{"type":"object","properties":{"city":{"type":"string"},"size":{"type":"integer"}},"required":["city","size"]}'
GOOD = '{"city": "Zürich", "size": 3}'


def structured(schema: str = SCHEMA) -> dict[str, Any]:
    return {"response_format": {"json_schema": {"name": "city", "schema": schema, "strict": True}}}


@pytest.mark.parametrize("native", [True, False])
def test_chatty_json_is_found_and_only_the_json_is_delivered(mesh: Mesh, user: str, alias: str, native: bool) -> None:
    mesh.register_local(
        alias, default_params={"replies": [f"Sure:\n```json\n{GOOD}\n```\nBye"]}, capabilities={"json_schema": native}
    )
    _, text, finished = stream(mesh, user, model=alias, **structured())
    assert text == GOOD
    assert finished.attempts == 1
    answer = mesh.calls.Generate(generate_request(user, model=alias, **structured()), timeout=20)
    assert answer.outputs[0].message.content[0].text == GOOD
    assert answer.usage.output_tokens > 12, "all that the model said is charged"
    charges(mesh, user, entries=2)


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_that_breaks_the_schema_is_repaired_once_and_both_are_charged(
    mesh: Mesh, user: str, alias: str, streamed: bool
) -> None:
    mesh.register_local(alias, default_params={"replies": ['{"city": 5}', GOOD]})
    if streamed:
        call_id, text, finished = stream(mesh, user, model=alias, max_output_tokens=100, **structured())
        usage, metadata = finished.usage, finished.metadata
    else:
        answer = mesh.calls.Generate(generate_request(user, model=alias, max_output_tokens=100, **structured()), timeout=20)
        call_id, text = answer.call_id, answer.outputs[0].message.content[0].text
        usage, metadata = answer.usage, answer.metadata
    assert text == GOOD
    assert metadata["schema_repaired"] == "true"
    call = call_of(mesh, call_id)
    first, repair = call.attempts
    assert (first.kind, repair.kind) == (K.ATTEMPT_KIND_FIRST, K.ATTEMPT_KIND_REPAIR)
    assert (first.charged, repair.charged) == (True, True)
    assert usage.output_tokens == first.usage.output_tokens + repair.usage.output_tokens
    assert usage.input_tokens == first.usage.input_tokens + repair.usage.input_tokens
    (entry,) = charges(mesh, user, entries=1)
    assert not entry.flags, "the hold reached for the repair too"


def test_an_answer_that_stays_wrong_is_an_error_that_is_charged_and_says_where(
    mesh: Mesh, user: str, alias: str
) -> None:
    mesh.register_local(alias, default_params={"replies": ['{"city": "secret", "size": "big"}']})
    with refused(Code.FAILED_PRECONDITION, "UPSTREAM_REJECTED") as caught:
        stream(mesh, user, model=alias, request_id="r", **structured())
    told = facts_of(caught.value)
    assert (told["schema_path"], told["schema_rule"]) == ("$.size", "type")
    assert "secret" not in str(caught.value)
    (entry,) = charges(mesh, user, entries=1)
    assert int(told["credit_micros"]) == -entry.amount_micros > 0
    call = call_of(mesh, told["call_id"])
    assert (call.state, call.error_reason, len(call.attempts)) == (call_pb2.CALL_STATE_SETTLED, "UPSTREAM_REJECTED", 2)


def test_without_credit_for_a_repair_there_is_none(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"replies": ['{"city": 5}', GOOD]})
    poor = f"{user}-poor"
    mesh.credit(poor, 60_000)
    with refused(Code.FAILED_PRECONDITION, "UPSTREAM_REJECTED") as caught:
        stream(mesh, poor, model=alias, max_output_tokens=12, **structured())
    assert len(call_of(mesh, facts_of(caught.value)["call_id"]).attempts) == 1
    assert mesh.balance(poor).balance_micros >= 0


def test_an_answer_that_is_cut_here_is_charged_by_what_came(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"words": 200, "ignore_max_tokens": True})
    _, _, finished = stream(mesh, user, model=alias, max_output_tokens=10, **structured())
    assert (finished.finish_reason, finished.usage.output_tokens) == (chat_pb2.FINISH_REASON_LENGTH, 10)
    assert finished.usage.source == billing_pb2.USAGE_SOURCE_ESTIMATED
    charges(mesh, user, entries=1)


def test_without_a_place_for_the_repair_the_first_answer_is_told_and_charged(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"replies": ['{"city": 5}', GOOD]}, limits={"rpm": 1})
    with refused(Code.FAILED_PRECONDITION, "UPSTREAM_REJECTED") as caught:
        stream(mesh, user, model=alias, **structured())
    (entry,) = charges(mesh, user, entries=1)
    assert int(facts_of(caught.value)["credit_micros"]) == -entry.amount_micros > 0


def test_a_prompt_beyond_all_measure_is_refused_alone(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "ok,gpt-4o-mini")
    pictures = [{"role": "ROLE_USER", "content": [{"image": {"url": "https://example.org/a.png"}}] * 64}] * 20
    with refused(Code.INVALID_ARGUMENT, "CONTEXT_TOO_LONG"):
        stream(mesh, user, model=alias, messages=pictures)
    charges(mesh, user, entries=0)


def test_a_cut_answer_says_so_and_is_not_repaired(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"replies": [GOOD]})
    _, _, finished = stream(mesh, user, model=alias, max_output_tokens=3, **structured())
    assert (finished.finish_reason, finished.attempts) == (chat_pb2.FINISH_REASON_LENGTH, 1)


def test_tools_may_be_asked_for_instead_of_the_json(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"tool_calls": [{"name": "look", "arguments": '{"at": "sky"}'}]})
    tools = [{"name": "look", "parameters": '{"type":"object"}'}]
    answer = mesh.calls.Generate(generate_request(user, model=alias, tools=tools, **structured()), timeout=20)
    assert answer.outputs[0].finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert answer.outputs[0].message.tool_calls[0].arguments == '{"at": "sky"}'


def test_another_model_answers_when_one_dies_in_the_middle_of_the_json(
    mesh: Mesh, user: str, alias: str, upstream: Upstream
) -> None:
    mesh.register(alias, upstream.base_url, "error-after-3", max_retries=0)
    mesh.register_local(alias, default_params={"replies": [GOOD]}, priority=1)
    _, text, finished = stream(mesh, user, model=alias, **structured())
    assert (text, finished.attempts) == (GOOD, 2)
    charges(mesh, user, entries=1)


def test_what_is_no_schema_is_refused_before_anything_else(mesh: Mesh, user: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        stream(mesh, user, **structured('{"type": "nonsense"}'))


# Embeddings, finish reasons, counting


def test_texts_are_embedded_held_for_and_charged_by_their_input(mesh: Mesh, user: str) -> None:
    mesh.register_local("embedding")
    request = llm_service_pb2.EmbedRequest(
        billing={"user_id": user, "request_id": "e"}, inputs=["green tea", "black tea", "green tea"], dimensions=64
    )
    answer = mesh.calls.Embed(request, timeout=20)
    assert [each.index for each in answer.embeddings] == [0, 1, 2]
    assert [len(each.values) for each in answer.embeddings] == [64, 64, 64]
    assert answer.embeddings[0].values == answer.embeddings[2].values != answer.embeddings[1].values
    assert (answer.usage.input_tokens > 0, answer.usage.output_tokens) == (True, 0)
    again = mesh.calls.Embed(request, timeout=20)
    assert again.replayed
    assert again.embeddings == answer.embeddings
    (entry,) = charges(mesh, user, entries=1)
    assert (entry.scene, entry.model) == ("embed", "embedding")
    assert entry.amount_micros == -answer.charge.credit_micros < 0
    assert call_of(mesh, answer.call_id).operation == call_pb2.OPERATION_EMBED


def test_a_model_that_can_not_is_not_asked(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, capabilities={"embeddings": False, "tools": False, "images": False})
    with refused(Code.FAILED_PRECONDITION, "MODEL_NOT_READY"):
        mesh.calls.Embed(llm_service_pb2.EmbedRequest(billing={"user_id": user}, model=alias, inputs=["a"]), timeout=20)
    with refused(Code.FAILED_PRECONDITION, "MODEL_NOT_READY"):
        stream(mesh, user, model=alias, tools=[{"name": "look"}])


def test_an_unknown_end_is_kept_in_the_servers_words(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"finish_reason": "moon_phase", "words": 3})
    call_id, _, finished = stream(mesh, user, model=alias)
    assert finished.finish_reason == chat_pb2.FINISH_REASON_STOP
    assert finished.metadata["upstream_finish_reason"] == "moon_phase"
    assert call_of(mesh, call_id).attempts[0].upstream_finish_reason == "moon_phase"


def test_counting_says_how_it_counted(mesh: Mesh, alias: str) -> None:
    messages = [{"role": "ROLE_USER", "content": [{"text": "hello world"}]}]
    mesh.register_local(alias, tokenizer="claude")
    mesh.register_local("pro")
    exact = mesh.calls.CountTokens(llm_service_pb2.CountTokensRequest(messages=messages), timeout=10)
    assert (exact.tokenizer, exact.input_tokens) == ("o200k_base", 9)
    told = mesh.calls.CountTokens(llm_service_pb2.CountTokensRequest(model=alias, messages=messages), timeout=10)
    assert told.tokenizer == "claude (estimated)"
    assert told.upper_bound_tokens > told.input_tokens


def test_reasoning_and_its_end_are_streamed_and_charged(mesh: Mesh, user: str, alias: str) -> None:
    mesh.register_local(alias, default_params={"reasoning": "let me think of it", "words": 3, "no_usage": True})
    events = list(mesh.calls.Stream(stream_request(user, model=alias), timeout=20))
    reasoning = "".join(event.delta.reasoning for event in events if event.HasField("delta"))
    assert reasoning == "let me think of it"
    usage = events[-1].finished.usage
    assert (usage.output_tokens, usage.source) == (8, billing_pb2.USAGE_SOURCE_ESTIMATED)
    charges(mesh, user, entries=1)


# What is kept


def test_without_a_secret_key_an_answer_is_sealed_for_its_process_alone(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh(LLM_SECRET_KEY="")
    mesh.start()
    mesh.credit("alice", CREDIT)
    first = mesh.calls.Generate(generate_request("alice", request_id="r"), timeout=20)
    assert mesh.calls.Generate(generate_request("alice", request_id="r"), timeout=20).call_id == first.call_id
    mesh.llm.stop()
    mesh.llm.start()
    mesh.wait_until_serving()
    with refused(Code.ALREADY_EXISTS, "REQUEST_FINISHED"):
        mesh.calls.Generate(generate_request("alice", request_id="r"), timeout=20)
    charges(mesh, "alice", entries=1)


def test_an_answer_is_kept_sealed_and_only_where_it_may_be(mesh: Mesh, user: str, alias: str, upstream: Upstream) -> None:
    mesh.register(alias, upstream.base_url, "ok")
    say = {"model": alias, "text": f"keep {alias}"}
    kept, _, _ = stream(mesh, user, request_id="kept", **say)
    stream(mesh, user, request_id="not-stored", store=False, **say)
    stream(mesh, user, **say)
    rows = mesh.rows(mesh.llm_url, "SELECT call_id::text, answer FROM llm.call_answer WHERE user_id = %s", (user,))
    assert [row[0] for row in rows] == [kept]
    assert b"word" not in bytes(rows[0][1])
    events = list(mesh.calls.Stream(stream_request(user, request_id="kept", **say), timeout=20))
    assert events[0].started.replayed
    with refused(Code.ALREADY_EXISTS, "REQUEST_FINISHED"):
        stream(mesh, user, request_id="not-stored", store=False, **say)
    set_policy(mesh, user, keep_no_answers=True)
    assert mesh.rows(mesh.llm_url, "SELECT 1 FROM llm.call_answer WHERE user_id = %s", (user,)) == []
    with refused(Code.ALREADY_EXISTS, "REQUEST_FINISHED"):
        stream(mesh, user, request_id="kept", **say)
    stream(mesh, user, request_id="after", **say)
    assert mesh.rows(mesh.llm_url, "SELECT 1 FROM llm.call_answer WHERE user_id = %s", (user,)) == []
    charges(mesh, user, entries=4)
