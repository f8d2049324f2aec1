"""Retries, fallback, circuit breakers, rates and limits as state machines, with time and chance as arguments."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.domain.breaker import Breaker, BreakerPolicy, BreakerState
from llm_service.domain.deployment import BUILT_IN, Deployment
from llm_service.domain.rate_limit import Gcra, Limits, LimitState
from llm_service.domain.routing import (
    MOST_PAUSE_SECONDS,
    MOST_WAIT_SECONDS,
    Ask,
    FailureKind,
    Pause,
    Plan,
    Stop,
)
from llm_service.domain.upstream_address import Reach, is_allowed, problem_of_url
from llm_service.domain.usage_merge import UsageArrival, merge_usage
from metering.usage import Usage


def model(name: str, **fields: object) -> Deployment:
    return replace(BUILT_IN, model_id=name, **fields)  # type: ignore[arg-type]


def always(_deployment: Deployment) -> bool:
    return True


KINDS = st.sampled_from(list(FailureKind))


@settings(max_examples=500)
@given(
    tiers=st.lists(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1000, 2000])), min_size=1, max_size=3), min_size=1, max_size=3),
    failures=st.lists(st.tuples(KINDS, st.none() | st.floats(0, 8), st.floats(0, 1), st.floats(0, 0.5)), min_size=40, max_size=40),
    most=st.integers(1, 12), deadline=st.none() | st.floats(0.0, 20.0), closed=st.sets(st.integers(0, 8)),
)
def test_a_plan_ends_and_keeps_every_promise(
    tiers: list[list[tuple[int, int]]], failures: list[tuple[FailureKind, float | None, float, float]], most: int,
    deadline: float | None, closed: set[int],
) -> None:
    number = iter(range(100))
    models = [[model(str(next(number)), max_retries=retries, context_window=window) for retries, window in tier] for tier in tiers]
    jitters = iter([jitter for _, _, jitter, _ in failures])
    drawn: list[float] = []

    def jitter() -> float:
        drawn.append(next(jitters))
        return drawn[-1]

    plan = Plan(models, most, jitter)
    may_try = lambda each: int(each.model_id) not in closed  # noqa: E731
    now, asked, not_before = 0.0, [], {}  # type: ignore[var-annotated]
    out: set[str] = set()
    ended = False
    for kind, retry_after, _, took in failures:
        step = plan.next(now, deadline=deadline, may_try=may_try)
        pauses = 0
        while isinstance(step, Pause):
            assert now < step.until <= now + MOST_WAIT_SECONDS
            assert deadline is None or step.until < deadline, "nothing is waited for that the deadline would cut"
            now = step.until
            step = plan.next(now, deadline=deadline, may_try=may_try)
            pauses += 1
            assert pauses < 20
        if isinstance(step, Stop):
            ended = True
            break
        chosen = step.deployment
        assert may_try(chosen)
        assert deadline is None or now < deadline
        assert chosen.model_id not in out
        assert now >= not_before.get(chosen.model_id, 0.0), "never before it may be asked again"
        assert step.is_retry == (chosen.model_id in asked)
        assert step.is_fallback == (chosen is not models[0][0])
        for tier in models:  # nobody of an earlier priority could have been asked at once
            if chosen in tier:
                break
            assert not [
                each for each in tier
                if may_try(each) and each.model_id not in out and not_before.get(each.model_id, 0.0) <= now
                and asked.count(each.model_id) <= each.max_retries
            ]
        asked.append(chosen.model_id)
        now += took
        plan.failed(chosen, kind, now, retry_after_seconds=retry_after)
        if kind is FailureKind.REJECTED:
            out |= {each.model_id for tier in models for each in tier}
        elif kind is FailureKind.TOO_LONG:
            out |= {each.model_id for tier in models for each in tier if 0 < each.context_window <= chosen.context_window} | {chosen.model_id}
        elif kind in (FailureKind.SLOW, FailureKind.MISCONFIGURED):
            out.add(chosen.model_id)
        else:
            longest = min(MOST_PAUSE_SECONDS, 0.1 * 2 ** (asked.count(chosen.model_id) - 1))
            not_before[chosen.model_id] = now + max(retry_after or 0.0, longest * drawn[-1])
    assert ended or len(asked) == len(failures)
    assert len(asked) <= most
    for tier in models:
        for each in tier:
            assert asked.count(each.model_id) <= each.max_retries + 1


def test_another_of_the_same_priority_is_asked_before_the_same_again() -> None:
    a, b, spare = model("a"), model("b"), model("c")
    plan = Plan([[a, b], [spare]], 10, lambda: 1.0)
    assert plan.next(0.0, deadline=None, may_try=always) == Ask(a, is_retry=False, is_fallback=False)
    plan.failed(a, FailureKind.UNAVAILABLE, 0.0)
    assert plan.next(0.0, deadline=None, may_try=always) == Ask(b, is_retry=False, is_fallback=True)
    plan.failed(b, FailureKind.UNAVAILABLE, 0.0)
    assert plan.next(0.0, deadline=None, may_try=always) == Pause(0.1)
    assert plan.next(0.1, deadline=None, may_try=always) == Ask(a, is_retry=True, is_fallback=False)


def test_a_long_rest_is_left_for_the_fallback_and_a_longer_one_for_nobody() -> None:
    a, spare = model("a"), model("spare")
    plan = Plan([[a], [spare]], 10, lambda: 0.0)
    plan.next(0.0, deadline=None, may_try=always)
    plan.failed(a, FailureKind.LIMITED, 0.0, retry_after_seconds=2.0)
    assert plan.next(0.0, deadline=None, may_try=always) == Ask(spare, is_retry=False, is_fallback=True)
    plan.failed(spare, FailureKind.LIMITED, 0.0, retry_after_seconds=60.0)
    assert plan.next(0.0, deadline=None, may_try=always) == Pause(2.0)
    assert plan.next(0.0, deadline=1.0, may_try=always) == Stop(2.0)
    alone = Plan([[spare]], 10, lambda: 0.0)
    alone.next(0.0, deadline=None, may_try=always)
    alone.failed(spare, FailureKind.LIMITED, 0.0, retry_after_seconds=60.0)
    assert alone.next(0.0, deadline=None, may_try=always) == Stop(60.0)


def test_a_model_that_is_busy_here_is_queued_for_only_when_no_other_is_free() -> None:
    a, spare = model("a"), model("spare")
    plan = Plan([[a], [spare]], 10, lambda: 0.0)
    plan.next(0.0, deadline=None, may_try=always)
    plan.busy(a, 0.05)
    step = plan.next(0.0, deadline=None, may_try=always)
    assert isinstance(step, Ask)
    assert step.deployment is spare
    plan.busy(spare, 0.05)
    assert plan.next(0.0, deadline=None, may_try=always) == Pause(0.05)
    assert plan.asked == 0
    assert plan.ask(a) == Ask(a, is_retry=False, is_fallback=False)


def test_jitter_grows_and_is_bounded() -> None:
    a = model("a", max_retries=10)
    plan = Plan([[a]], 20, lambda: 1.0)
    pauses, now = [], 0.0
    for _ in range(8):
        plan.next(now, deadline=None, may_try=always)
        plan.failed(a, FailureKind.UNAVAILABLE, now)
        step = plan.next(now, deadline=None, may_try=always)
        assert isinstance(step, Pause)
        pauses.append(round(step.until - now, 3))
        now = step.until
    assert pauses[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert max(pauses) == MOST_PAUSE_SECONDS


@settings(max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from([True, False, None])), max_size=80))
def test_a_breaker_lets_one_probe_through_and_closes_after_a_success(events: list[tuple[float, bool | None]]) -> None:
    breaker, now = Breaker(), 0.0
    for pause, failed in events:
        now += pause
        state = breaker.state(now)
        assert breaker.may_try(now) == (state is not BreakerState.OPEN)
        if state is BreakerState.OPEN:
            assert breaker.open_until - now <= breaker.policy.most_rest_seconds
            continue
        probe = breaker.begin(now)
        assert probe == (state is BreakerState.HALF_OPEN)
        if probe:
            assert not breaker.may_try(now), "one at a time"
        breaker.end(now, failed=failed, was_probe=probe)
        if failed is False:
            assert breaker.state(now) is BreakerState.CLOSED
        if probe and failed:
            assert breaker.state(now) is BreakerState.OPEN
        if failed is None:
            assert breaker.state(now) is state


def test_a_breaker_opens_on_failures_in_a_row_or_on_their_share_and_rests_longer_each_time() -> None:
    breaker = Breaker(BreakerPolicy(most_failures=3, rest_seconds=2.0, most_rest_seconds=7.0))
    for _ in range(3):
        assert breaker.may_try(0.0)
        breaker.end(0.0, failed=True, was_probe=breaker.begin(0.0))
    rests, now = [], 0.0
    for _ in range(4):
        assert breaker.state(now) is BreakerState.OPEN
        rests.append(breaker.open_until - now)
        now = breaker.open_until
        breaker.end(now, failed=True, was_probe=breaker.begin(now))
    assert rests == [2.0, 4.0, 7.0, 7.0]
    shared = Breaker()
    for number in range(24):
        shared.end(number * 0.1, failed=number % 2 == 0, was_probe=False)
    assert shared.state(2.4) is BreakerState.OPEN


@settings(max_examples=300)
@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 700)), max_size=60))
def test_gcra_never_lets_more_through_than_a_minutes_worth_and_what_time_earned(
    per_minute: int, asked: list[tuple[float, int]]
) -> None:
    rate, now, taken = Gcra(per_minute), 0.0, []  # type: ignore[var-annotated]
    for pause, cost in asked:
        now += pause
        wait = rate.wait_seconds(cost, now)
        if wait == 0.0:
            rate.take(cost, now)
            taken.append((now, cost))
        else:
            assert rate.wait_seconds(cost, now + wait + 1e-6) == pytest.approx(0.0, abs=1e-3), "the wait it names is enough"
    for index, (begin, _) in enumerate(taken):
        for until, last in taken[index:]:
            inside = sum(cost for at, cost in taken if begin <= at <= until)
            # One cost may be larger than a whole minute's; the others together keep to the rate.
            assert inside - last <= per_minute * (1 + (until - begin) / 60) + 1e-6


def test_what_was_not_used_is_given_back() -> None:
    rate = Gcra(600)
    rate.take(600, 0.0)
    assert rate.wait_seconds(1, 0.0) > 0
    rate.give_back(500)
    assert rate.wait_seconds(500, 0.0) == 0.0


def test_limits_are_taken_all_or_nothing() -> None:
    state = LimitState(Limits(max_concurrency=2, rpm=3, tpm=100))
    assert state.try_take(90, 0.0) == 0.0
    assert state.try_take(90, 0.0) > 0, "no tokens left"
    assert state.requests is not None
    assert state.requests.wait_seconds(2, 0.0) == 0.0, "and no request taken for it"
    assert state.try_take(5, 0.0) == 0.0
    assert state.try_take(1, 0.0) == 0.05, "two are running"
    state.leave(80)
    assert state.try_take(80, 0.0) == 0.0
    state.leave(0)
    assert state.try_take(1, 0.0) > 1.0, "three in this minute"


@pytest.mark.parametrize(("address", "lowest"), [
    ("8.8.8.8", Reach.PUBLIC), ("2606:4700::1111", Reach.PUBLIC), ("127.0.0.1", Reach.LOOPBACK), ("::1", Reach.LOOPBACK),
    ("10.1.2.3", Reach.PRIVATE), ("192.168.1.1", Reach.PRIVATE), ("172.16.0.1", Reach.PRIVATE), ("fd00::1", Reach.PRIVATE),
    ("100.64.0.1", Reach.PRIVATE), ("::ffff:10.0.0.1", Reach.PRIVATE), ("::ffff:127.0.0.1", Reach.LOOPBACK),
    ("169.254.169.254", None), ("fe80::1", None), ("0.0.0.0", None), ("224.0.0.1", None), ("::", None),
    ("::ffff:169.254.169.254", None), ("2002:a9fe:a9fe::", None),
])
def test_addresses_that_may_be_asked(address: str, lowest: Reach | None) -> None:
    order = [Reach.PUBLIC, Reach.LOOPBACK, Reach.PRIVATE]
    for reach in order:
        expected = lowest is not None and order.index(reach) >= order.index(lowest)
        assert is_allowed(ipaddress.ip_address(address), reach) == expected, reach


@pytest.mark.parametrize(("url", "reach", "is_fine"), [
    ("https://api.example.org/v1", Reach.PUBLIC, True), ("http://127.0.0.1:3030/v1", Reach.LOOPBACK, True),
    ("http://127.0.0.1:3030/v1", Reach.PUBLIC, False), ("http://localhost/v1", Reach.PUBLIC, False),
    ("http://[::1]:80/v1", Reach.LOOPBACK, True), ("http://169.254.169.254/latest", Reach.PRIVATE, False),
    ("ftp://example.org", Reach.PRIVATE, False), ("file:///etc/passwd", Reach.PRIVATE, False),
    ("http://user@example.org/v1", Reach.PRIVATE, False), ("http://example.org/v1?x=1", Reach.PRIVATE, False),
    ("http://10.0.0.1/v1", Reach.LOOPBACK, False), ("http://10.0.0.1/v1", Reach.PRIVATE, True),
])
def test_base_urls_are_checked(url: str, reach: Reach, is_fine: bool) -> None:
    assert (problem_of_url(url, reach) == "") == is_fine


def test_usage_is_merged_as_it_arrives() -> None:
    one, two = Usage(10, output_tokens=5), Usage(10, output_tokens=3)
    assert merge_usage(UsageArrival.CUMULATIVE, one, two) == two
    assert merge_usage(UsageArrival.FINAL, one, two) == two
    assert merge_usage(UsageArrival.DELTA, one, two) == Usage(20, output_tokens=8)
    assert merge_usage(UsageArrival.DELTA, None, two) == two
