"""Attempts: asking model servers until one begins to answer; after that, only that one.

Which one is asked next is decided by domain/routing.py; limits, circuit breakers, timeouts and hedging are applied
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from llm_service.domain.call import AttemptKind, End, Operation
from llm_service.domain.chat import Prompt
from llm_service.domain.deployment import Deployment, Provider
from llm_service.domain.errors import RateLimited
from llm_service.domain.quirks import UsageArrival, effective
from llm_service.domain.routing import Ask, FailureKind, Pause, Plan, Stop
from llm_service.domain.usage_merge import merge_usage
from llm_service.usecases.admission import Admission
from llm_service.usecases.call_events import CallRequest
from llm_service.usecases.call_meters import CallMeters
from llm_service.usecases.call_spans import end_attempt_span, start_attempt_span
from llm_service.usecases.model_health import ModelHealth
from llm_service.usecases.ports import ModelProvider, Place, Question, UpstreamChunk, UpstreamFailure
from llm_service.usecases.running_calls import RunningAttempt, RunningCall, tokens_of
from metering.usage import UsageSource
from servicekit.core.clock import Clock
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

DEADLINE_MARGIN_SECONDS = 0.2
"""A call stops this long before its client's deadline, but not before nine tenths of its time, so that the client still
hears what it was charged."""
HEDGE_LOST = "HEDGE_LOST"
_next: Any = anext


class CallInterrupted(Exception):
    """Something else than the model ended the call."""

    def __init__(self, end: End, failure: UpstreamFailure | None = None) -> None:
        super().__init__(end.name)
        self.end = end
        self.failure = failure


@dataclass(slots=True)
class _Racer:
    """An attempt whose first token is waited for beside another one's."""

    attempt: RunningAttempt
    chunks: AsyncIterator[UpstreamChunk]
    place: Place | None
    is_probe: bool
    task: asyncio.Task[list[UpstreamChunk]]


class Attempts:
    """Runs the attempts of calls."""

    def __init__(
        self, providers: Mapping[Provider, ModelProvider], *, health: ModelHealth, admission: Admission,
        meters: CallMeters, clock: Clock, most_attempts: int,
    ) -> None:
        self._providers = providers
        self._health = health
        self._admission = admission
        self._meters = meters
        self._clock = clock
        self._most_attempts = most_attempts
        self._random = random.Random()  # noqa: S311 - spreads retries, guards nothing

    async def chunks(
        self, call: RunningCall, request: CallRequest, prompt: Prompt, *, input_bound: int, whole: bool,
        repair: bool = False, may_begin_again: bool = False,
    ) -> AsyncGenerator[UpstreamChunk]:
        """The answer's chunks, of whichever model gives it. `may_begin_again`: nothing reaches the client before the
        end, so that another model may be asked after the first token too.

        Raises UpstreamFailure when nobody answers or the one that began failed, CallInterrupted, RateLimited.
        """
        plan = Plan(call.tiers, self._most_attempts, self._random.random)
        for deployment, until in self._health.resting(call.tiers):
            plan.rest(deployment, until)
        failure: UpstreamFailure | None = None
        busy: dict[str, tuple[Deployment, float]] = {}
        while True:
            now = self._clock.monotonic()
            step = plan.next(now, deadline=call.deadline_seconds, may_try=self._health.may_try)
            if isinstance(step, Stop):
                raise failure or self._nobody(call, step, busy)
            if isinstance(step, Pause) and not busy:
                await self._sleep(call, step.until - now)
                continue
            if isinstance(step, Pause):
                deployment, _ = min(busy.values(), key=lambda each: each[1])
                place: Place | None = await self._queue(call, deployment, input_bound)
                busy.clear()
                step = plan.ask(deployment)
            else:
                entered = await self._try_enter(call, step.deployment, input_bound)
                if isinstance(entered, float):
                    plan.busy(step.deployment, now + entered)
                    busy[step.deployment.model_id] = (step.deployment, entered)
                    continue
                place = entered
            bound = call.bound_of_next(input_bound)
            if bound < 1 and not request.inputs:
                self._leave(call, place, None)
                raise failure or UpstreamFailure("UPSTREAM_UNAVAILABLE", "the hold pays for no further attempt")
            question = _question(request, prompt, step.deployment, bound, whole=whole)
            kind = AttemptKind.REPAIR if repair else _kind_of(step)
            attempt = self._begin(call, step.deployment, kind, question)
            try:
                if step.deployment.hedge_after is not None:
                    reading = self._race(call, attempt, place, plan, question, input_bound)
                else:
                    is_probe = self._health.begin(step.deployment)
                    chunks = self._providers[step.deployment.provider].ask(
                        step.deployment, question, on_sent=attempt.mark_sent
                    )
                    reading = self._read(call, attempt, chunks, place, is_probe=is_probe, whole=whole)
                async with aclosing(reading):
                    async for chunk in reading:
                        yield chunk
                return
            except UpstreamFailure as error:
                failure = error
                served = call.attempts[-1]
                if served.first_token_at is not None and not may_begin_again:
                    raise
                if served.first_token_at is not None:
                    call.first_token_at = call.first_token_seconds = None
                plan.failed(
                    served.deployment, error.kind, self._clock.monotonic(),
                    retry_after_seconds=error.retry_after_seconds,
                )

    # One attempt

    def _begin(
        self, call: RunningCall, deployment: Deployment, kind: AttemptKind, question: Question
    ) -> RunningAttempt:
        attempt = RunningAttempt(
            number=len(call.attempts) + 1, kind=kind, deployment=deployment, bound=question.max_output_tokens,
            input_tokens=call.input_tokens[tokens_of(deployment)], started_at=self._clock.now(),
            started_seconds=self._clock.monotonic(),
        )
        call.attempts.append(attempt)
        return attempt

    async def _read(
        self, call: RunningCall, attempt: RunningAttempt, chunks: AsyncIterator[UpstreamChunk], place: Place | None,
        *, is_probe: bool, whole: bool, first: list[UpstreamChunk] | None = None,
    ) -> AsyncGenerator[UpstreamChunk]:
        """Reads an attempt to its end and books what became of it."""
        # Each batch of inputs tells its own usage.
        is_embedding = call.record.operation is Operation.EMBED
        arrival = UsageArrival.DELTA if is_embedding else effective(attempt.deployment.quirks).arrival
        outcome: UpstreamFailure | None = None
        told = False
        span = start_attempt_span(call, attempt)
        try:
            for chunk in first or ():
                self._take(call, attempt, chunk, arrival)
                yield chunk
            while True:
                call.watch_until(self._overdue_at(call, attempt, whole=whole))
                call.is_waiting = True
                try:
                    came: UpstreamChunk | None = await _next(chunks, None)
                except asyncio.CancelledError:
                    if not call.was_interrupted():
                        raise
                    raise self._interruption(call, attempt) from None
                finally:
                    call.is_waiting = False
                if came is None:
                    break
                self._take(call, attempt, came, arrival)
                yield came
                if call.is_cancelled:
                    raise CallInterrupted(End.CLIENT_GONE)
            told = True
        except UpstreamFailure as failure:
            outcome, told = failure, True
            raise
        except CallInterrupted as interruption:
            outcome = interruption.failure
            raise
        finally:
            call.stop_watch()
            await _close(chunks)
            attempt.end(self._clock.now(), outcome)
            self._health.end(
                attempt.deployment, outcome.kind if outcome else None, was_probe=is_probe, tells_nothing=not told,
                retry_after_seconds=outcome.retry_after_seconds if outcome else None,
            )
            self._leave(call, place, attempt)
            self._meters.attempt_ended(call, attempt, seconds=self._clock.monotonic() - attempt.started_seconds)
            end_attempt_span(span, attempt)
            if outcome is not None:
                log.warning(
                    "upstream_failed", call_id=str(call.call_id), model_id=attempt.deployment.model_id,
                    attempt=attempt.number, reason=outcome.reason, http_status=outcome.http_status,
                    detail=outcome.detail,
                )

    def _take(
        self, call: RunningCall, attempt: RunningAttempt, chunk: UpstreamChunk, arrival: UsageArrival
    ) -> None:
        for usage in chunk.usages:
            attempt.usage = merge_usage(arrival, attempt.usage, usage)
        if chunk.upstream_model:
            attempt.upstream_model = chunk.upstream_model
        if chunk.finish_reason is not None:
            attempt.finish_reason = chunk.finish_reason
            attempt.upstream_finish_reason = chunk.upstream_finish_reason
            attempt.is_unknown_finish = chunk.is_unknown_finish
        if chunk.vectors:
            attempt.vectors += chunk.vectors
        if chunk.malformed:
            self._meters.malformed(call, chunk.malformed)
        if attempt.first_token_at is None and (chunk.deltas or chunk.vectors):
            attempt.first_token_seconds = self._clock.monotonic()
            attempt.first_token_at = self._clock.now()
            if call.first_token_at is None:
                call.first_token_seconds, call.first_token_at = attempt.first_token_seconds, attempt.first_token_at

    def _overdue_at(self, call: RunningCall, attempt: RunningAttempt, *, whole: bool) -> float:
        """When the next token is overdue, on the loop's clock."""
        timeouts = attempt.deployment.timeouts
        now = self._clock.monotonic()
        left = timeouts.total - (now - attempt.started_seconds)
        if not whole:
            left = min(left, timeouts.idle if attempt.first_token_at is not None else timeouts.first_token)
        if (until := until_deadline(call)) is not None:
            left = min(left, until - now)
        return asyncio.get_running_loop().time() + max(0.0, left)

    def _interruption(self, call: RunningCall, attempt: RunningAttempt) -> Exception:
        """Why the wait for the model was broken off."""
        if call.is_cancelled:
            return CallInterrupted(End.CLIENT_GONE)
        call.is_overdue = False
        if deadline_passed(call, self._clock):
            return CallInterrupted(End.DEADLINE)
        begun = attempt.first_token_at is not None
        if self._clock.monotonic() - attempt.started_seconds >= attempt.deployment.timeouts.total:
            failure = UpstreamFailure("UPSTREAM_UNAVAILABLE", "the total timeout passed", kind=FailureKind.SLOW)
            return CallInterrupted(End.MODEL_TIMEOUT, failure) if begun else failure
        what = "idle" if begun else "first token"
        return UpstreamFailure("UPSTREAM_UNAVAILABLE", f"the {what} timeout passed", kind=FailureKind.SLOW)

    # Two at once

    async def _race(
        self, call: RunningCall, attempt: RunningAttempt, place: Place | None, plan: Plan, question: Question,
        input_bound: int,
    ) -> AsyncGenerator[UpstreamChunk]:
        """As _read, but when no token came for `hedge_after` another model is asked too; the first to begin answers."""
        racers = [self._start(attempt, question, place)]
        hedge_at: float | None = attempt.started_seconds + (attempt.deployment.hedge_after or 0.0)
        try:
            while True:
                winner = await self._first_to_begin(call, racers, hedge_at)
                if winner is None and hedge_at is not None:
                    hedge_at = None
                    if (second := await self._hedge(call, attempt, plan, question, input_bound)) is not None:
                        racers.append(second)
                    continue
                assert winner is not None
                racers.remove(winner)
                failure = winner.task.exception()
                if isinstance(failure, UpstreamFailure) and racers:
                    self._lose(call, winner, failure)
                    plan.failed(
                        winner.attempt.deployment, failure.kind, self._clock.monotonic(),
                        retry_after_seconds=failure.retry_after_seconds,
                    )
                    hedge_at = None
                    continue
                break
            for loser in racers:
                await self._stop(call, loser)
            racers.clear()
            call.attempts.remove(winner.attempt)
            call.attempts.append(winner.attempt)
            if failure is not None:
                self._lose(call, winner, failure)
                raise failure
            reading = self._read(
                call, winner.attempt, winner.chunks, winner.place, is_probe=winner.is_probe, whole=question.whole,
                first=winner.task.result(),
            )
            async with aclosing(reading):
                async for chunk in reading:
                    yield chunk
        except UpstreamFailure as overdue:
            for racer in racers:
                await self._stop(call, racer, overdue)
            racers.clear()
            raise
        finally:
            for racer in racers:
                await self._stop(call, racer)

    def _start(self, attempt: RunningAttempt, question: Question, place: Place | None) -> _Racer:
        is_probe = self._health.begin(attempt.deployment)
        chunks = self._providers[attempt.deployment.provider].ask(
            attempt.deployment, question, on_sent=attempt.mark_sent
        )
        task = asyncio.create_task(_until_it_begins(chunks), name="first-token")
        return _Racer(attempt, chunks, place, is_probe, task)

    async def _hedge(
        self, call: RunningCall, attempt: RunningAttempt, plan: Plan, question: Question, input_bound: int
    ) -> _Racer | None:
        beside = plan.another(attempt.deployment, self._clock.monotonic(), self._health.may_try)
        if beside is None or call.bound_of_next(input_bound) < 1:
            return None
        place = await self._try_enter(call, beside, input_bound)
        if isinstance(place, float):
            return None
        asked = replace(question, max_output_tokens=min(question.max_output_tokens, beside.max_output_tokens))
        second = self._begin(call, beside, AttemptKind.HEDGE, asked)
        return self._start(second, asked, place)

    async def _first_to_begin(
        self, call: RunningCall, racers: list[_Racer], hedge_at: float | None
    ) -> _Racer | None:
        """None when it is time to hedge."""
        now = self._clock.monotonic()
        loop_now = asyncio.get_running_loop().time()
        overdue = max(self._overdue_at(call, racer.attempt, whole=False) for racer in racers) - loop_now
        seconds = overdue if hedge_at is None else min(overdue, max(0.0, hedge_at - now))
        call.is_waiting = True
        try:
            done, _ = await asyncio.wait(
                [racer.task for racer in racers], timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:
            if not call.was_interrupted():
                raise
            raise CallInterrupted(End.CLIENT_GONE) from None
        finally:
            call.is_waiting = False
        for racer in racers:
            if racer.task in done:
                return racer
        if hedge_at is not None and seconds < overdue:
            return None
        if deadline_passed(call, self._clock):
            raise CallInterrupted(End.DEADLINE)
        raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the first token timeout passed", kind=FailureKind.SLOW)

    async def _stop(self, call: RunningCall, racer: _Racer, failure: UpstreamFailure | None = None) -> None:
        """A racer that another one was faster than, that was too slow, or that nobody waits for any more."""
        racer.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, UpstreamFailure):
            await racer.task
        await _close(racer.chunks)
        self._lose(call, racer, failure)

    def _lose(self, call: RunningCall, racer: _Racer, failure: BaseException | None) -> None:
        attempt = racer.attempt
        known = failure if isinstance(failure, UpstreamFailure) else None
        if known is None and attempt.deployment.bills_failed_attempts and attempt.reached_model:
            attempt.usage = attempt.usage or replace(
                call.checkpoint().usage, input_tokens=attempt.input_tokens, output_tokens=0,
                source=UsageSource.ESTIMATED,
            )
            attempt.charged_usage = attempt.usage
        attempt.end(self._clock.now(), known)
        attempt.error_reason = attempt.error_reason or HEDGE_LOST
        self._health.end(
            attempt.deployment, known.kind if known else None, was_probe=racer.is_probe, tells_nothing=known is None
        )
        self._leave(call, racer.place, attempt)
        self._meters.attempt_ended(call, attempt, seconds=self._clock.monotonic() - attempt.started_seconds)

    # Limits and pauses

    async def _try_enter(self, call: RunningCall, deployment: Deployment, input_bound: int) -> Place | float | None:
        if not deployment.limits:
            return None
        entered = await self._admission.try_enter(
            _subject(deployment), deployment.limits, tokens=_tokens(call, input_bound)
        )
        if isinstance(entered, Place):
            call.places.append(entered)
        return entered

    async def _queue(self, call: RunningCall, deployment: Deployment, input_bound: int) -> Place:
        began = self._clock.monotonic()
        call.is_waiting = True
        try:
            place = await self._admission.enter(
                _subject(deployment), deployment.limits, tokens=_tokens(call, input_bound),
                deadline=until_deadline(call), what=f"every model of alias {call.record.model!r}",
            )
        except asyncio.CancelledError:
            if not call.was_interrupted():
                raise
            raise CallInterrupted(End.CLIENT_GONE) from None
        finally:
            call.is_waiting = False
            call.queued_seconds += self._clock.monotonic() - began
        call.places.append(place)
        return place

    def _leave(self, call: RunningCall, place: Place | None, attempt: RunningAttempt | None) -> None:
        if place is None:
            return
        used = 0
        if attempt is not None and attempt.usage is not None:
            used = attempt.usage.input_tokens + attempt.usage.output_tokens
        elif attempt is not None and attempt.reached_model:
            used = attempt.input_tokens + attempt.counted_output_tokens
        call.places.remove(place)
        self._admission.leave(place, used_tokens=used)

    async def _sleep(self, call: RunningCall, seconds: float) -> None:
        call.is_waiting = True
        try:
            await asyncio.sleep(max(0.0, seconds))
        except asyncio.CancelledError:
            if not call.was_interrupted():
                raise
            raise CallInterrupted(End.CLIENT_GONE) from None
        finally:
            call.is_waiting = False

    def _nobody(
        self, call: RunningCall, stop: Stop, busy: Mapping[str, tuple[Deployment, float]]
    ) -> Exception:
        if deadline_passed(call, self._clock):
            return CallInterrupted(End.DEADLINE)
        if busy:
            wait = min(each for _, each in busy.values())
            return RateLimited(
                f"a limit of every model of alias {call.record.model!r} is reached", retry_after_seconds=wait
            )
        return UpstreamFailure(
            "UPSTREAM_UNAVAILABLE", "no model server may be asked now",
            retry_after_seconds=stop.retry_after_seconds or self._health.retry_after(call.tiers),
        )


def until_deadline(call: RunningCall) -> float | None:
    """When the call must stop so that its client still hears of it; None without a deadline."""
    deadline = call.deadline_seconds
    return None if deadline is None else deadline - _margin(call, deadline)


def deadline_passed(call: RunningCall, clock: Clock) -> bool:
    deadline = call.deadline_seconds
    return deadline is not None and clock.monotonic() >= deadline - 2 * _margin(call, deadline)


def _margin(call: RunningCall, deadline: float) -> float:
    return min(DEADLINE_MARGIN_SECONDS, (deadline - call.started_seconds) / 10)


def _question(
    request: CallRequest, prompt: Prompt, deployment: Deployment, bound: int, *, whole: bool
) -> Question:
    return Question(
        prompt=prompt, max_output_tokens=min(bound, deployment.max_output_tokens), whole=whole,
        inputs=request.inputs, dimensions=request.dimensions,
    )


def _kind_of(step: Ask) -> AttemptKind:
    if step.is_retry:
        return AttemptKind.RETRY
    return AttemptKind.FALLBACK if step.is_fallback else AttemptKind.FIRST


def _subject(deployment: Deployment) -> str:
    return f"model:{deployment.model_id}"


def _tokens(call: RunningCall, input_bound: int) -> int:
    return input_bound + call.record.max_output_tokens


async def _until_it_begins(chunks: AsyncIterator[UpstreamChunk]) -> list[UpstreamChunk]:
    """The chunks up to the first with content."""
    begun: list[UpstreamChunk] = []
    async for chunk in chunks:
        begun.append(chunk)
        if chunk.deltas or chunk.vectors or chunk.finish_reason is not None:
            break
    return begun


async def _close(chunks: AsyncIterator[UpstreamChunk]) -> None:
    await chunks.aclose()  # type: ignore[attr-defined]  # providers are generators
