"""One call, from its hold to its settlement; see "Life of a call" in ARCHITECTURE.md.

The settlement does not depend on the client: when the client leaves, its task is cancelled, and the call is settled in
a task of its own. Nothing that a client is told about usage or charge is told before it is durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from llm_service.domain.call import CallRecord, CallState, End, judge, settle
from llm_service.domain.chat import Delta, FinishReason, Message
from llm_service.domain.deployment import DEFAULT_ALIAS, Deployment, Provider
from llm_service.domain.errors import (
    ContextTooLong,
    RequestFinished,
)
from llm_service.usecases.call_errors import refusal, upstream_error
from llm_service.usecases.call_events import (
    CallRequest,
    Finished,
    Generated,
    Replay,
    Started,
    Timing,
    deltas_of,
)
from llm_service.usecases.output_meter import OutputMeter, upper_bound_tokens
from llm_service.usecases.ports import (
    CallJournal,
    CreditLedger,
    HoldAsked,
    HoldGranted,
    HoldRefused,
    ModelDirectory,
    ModelProvider,
    Settlement,
    TokenCounter,
    UpstreamFailure,
)
from llm_service.usecases.running_calls import RunningCall, RunningCalls
from metering.usage import Usage, UsageSource
from servicekit.core.clock import Clock
from servicekit.core.errors import Cancelled, DeadlineExceeded, DomainError, Overloaded
from servicekit.core.faults import FaultPoint, Faults
from servicekit.core.ids import IdSource
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

DEADLINE_MARGIN_SECONDS = 0.05
"""A call stops this long before its client's deadline, so that the client still hears what it was charged."""


class CallRunner:
    """Runs calls. `close` waits for settlements that no client waits for."""

    def __init__(
        self, *, models: ModelDirectory, ledger: CreditLedger, journal: CallJournal,
        providers: dict[Provider, ModelProvider], tokens: TokenCounter, running: RunningCalls, clock: Clock,
        ids: IdSource, faults: Faults, most_running: int,
    ) -> None:
        self._models = models
        self._ledger = ledger
        self._journal = journal
        self._providers = providers
        self._tokens = tokens
        self._meter = OutputMeter(tokens)
        self._running = running
        self._clock = clock
        self._ids = ids
        self._faults = faults
        self._most_running = most_running
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._background: set[asyncio.Task[Any]] = set()

    async def stream(self, request: CallRequest) -> AsyncIterator[Started | Delta | Finished]:
        """Started, deltas, finished. Raises a DomainError when the call fails before its first token."""
        begun = await self._begin(request, streamed=True)
        if isinstance(begun, Replay):
            async for event in self._replay(begun):
                yield event
            return
        call = begun
        try:
            yield Started(call.record)
            end, failure = End.COMPLETED, None
            finish_reason = FinishReason.STOP
            provider = self._providers[call.deployment.provider]
            chunks = provider.stream(
                call.deployment, request.prompt, max_output_tokens=call.record.max_output_tokens,
                on_sent=call.mark_sent,
            )
            async with contextlib.aclosing(chunks):  # type: ignore[type-var]  # providers are generators
                self._begin_attempt(call)
                while True:
                    if call.is_cancelled:
                        end = End.CLIENT_GONE
                        break
                    try:
                        call.is_waiting = True
                        async with asyncio.timeout_at(self._wait_until(call, request)):
                            chunk = await anext(chunks, None)
                    except TimeoutError:
                        end, failure = self._end_of_timeout(call, request)
                        break
                    except UpstreamFailure as error:
                        end, failure = End.UPSTREAM_FAILED, error
                        break
                    except asyncio.CancelledError:
                        if not self._cancelled_by_request(call):
                            raise
                        end = End.CLIENT_GONE
                        break
                    finally:
                        call.is_waiting = False
                    if chunk is None:
                        break
                    if chunk.usage is not None:
                        call.usage = chunk.usage
                    call.upstream_model = chunk.upstream_model or call.upstream_model
                    if chunk.finish_reason is not None:
                        finish_reason = chunk.finish_reason
                    cut = False
                    if chunk.deltas and call.first_token_seconds is None:
                        self._mark_first_token(call)
                    for delta in chunk.deltas:
                        delta, cut = self._meter.count(call, delta)
                        yield delta
                        if cut:
                            break
                    self._faults.reach(FaultPoint.MID_STREAM)
                    if cut:
                        end = End.CUT
                        break
        except (asyncio.CancelledError, GeneratorExit):
            end = End.DEADLINE if self._deadline_passed(request) else End.CLIENT_GONE
            self._in_background(self._finish(call, end, FinishReason.CANCELLED, None))
            raise
        except BaseException:
            call.error_reason = "INTERNAL"
            self._in_background(self._finish(call, End.UPSTREAM_FAILED, FinishReason.UPSTREAM_ERROR, None))
            raise
        record = await self._finish_shielded(call, end, finish_reason, failure)
        self._raise_unless_delivered(call, record, end, failure)
        yield Finished(record, self._timing(call))

    async def generate(self, request: CallRequest) -> Generated:
        """The whole answer. Raises a DomainError when the model did not give one."""
        call = await self._begin(request, streamed=False)
        if isinstance(call, Replay):
            return Generated(call.record, call.message, replayed=True)
        end, failure = End.COMPLETED, None
        finish_reason = FinishReason.STOP
        provider = self._providers[call.deployment.provider]
        try:
            self._begin_attempt(call)
            call.is_waiting = True
            async with asyncio.timeout_at(self._wait_until(call, request, whole=True)):
                upstream = await provider.generate(
                    call.deployment, request.prompt, max_output_tokens=call.record.max_output_tokens,
                    on_sent=call.mark_sent,
                )
            finish_reason = upstream.finish_reason
            call.usage, call.upstream_model = upstream.usage, upstream.upstream_model
            self._take_message(call, upstream.message)
        except TimeoutError:
            end, failure = self._end_of_timeout(call, request)
        except UpstreamFailure as error:
            end, failure = End.UPSTREAM_FAILED, error
        except asyncio.CancelledError:
            if not self._cancelled_by_request(call):
                end = End.DEADLINE if self._deadline_passed(request) else End.CLIENT_GONE
                self._in_background(self._finish(call, end, FinishReason.CANCELLED, None))
                raise
            end = End.CLIENT_GONE
        except BaseException:
            call.error_reason = "INTERNAL"
            self._in_background(self._finish(call, End.UPSTREAM_FAILED, FinishReason.UPSTREAM_ERROR, None))
            raise
        finally:
            call.is_waiting = False
        record = await self._finish_shielded(call, end, finish_reason, failure)
        self._raise_unless_delivered(call, record, end, failure)
        return Generated(record, call.answer.message())

    async def close(self) -> None:
        """Waits until every settlement that is under way is done."""
        while self._background:
            await asyncio.wait(set(self._background))

    # Before the model

    async def _begin(self, request: CallRequest, *, streamed: bool) -> RunningCall | Replay:
        if len(self._running) >= self._most_running:
            raise Overloaded
        arrived = self._clock.monotonic()
        created_at = self._clock.now()
        alias = request.model or DEFAULT_ALIAS
        deployment = self._models.directory.resolve(alias, choose=self._choose)
        counted = await self._tokens.count_prompt(request.prompt)
        most = request.max_output_tokens or deployment.max_output_tokens
        most = min(most, deployment.max_output_tokens)
        if deployment.context_window:
            most = min(most, deployment.context_window - counted)
            if most < max(1, request.min_output_tokens):
                raise ContextTooLong(
                    "the prompt does not fit the model's context window", input_tokens=counted,
                    context_window=deployment.context_window,
                )
        call_id = self._ids.new_id()
        asked = HoldAsked(
            call_id=call_id, billing=request.billing, provider=deployment.provider_for_price, model=alias,
            input_tokens=upper_bound_tokens(counted), max_output_tokens=most,
            min_output_tokens=min(max(1, request.min_output_tokens), most),
        )
        self._faults.reach(FaultPoint.BEFORE_HOLD)
        try:
            hold = await self._open_hold(asked)
        except asyncio.CancelledError:
            # Whether it was granted is not known; given back it is in any case.
            self._in_background(self._release(asked.billing.user_id, call_id))
            raise
        if isinstance(hold, Replay):
            return hold
        self._faults.reach(FaultPoint.AFTER_HOLD)
        call = RunningCall(
            record=CallRecord(
                call_id=call_id, billing=request.billing, model=alias, provider=deployment.provider.name,
                price_provider=deployment.provider_for_price, upstream_model=deployment.upstream_model,
                state=CallState.RUNNING, streamed=streamed, hold_micros=hold.held_micros,
                max_output_tokens=hold.max_output_tokens, quote=hold.quote, usage=Usage(), created_at=created_at,
            ),
            deployment=deployment, input_tokens=counted, clipped=hold.max_output_tokens < most,
            started_seconds=arrived, hold_seconds=self._clock.monotonic(), hold_expires_at=hold.expires_at,
            task=asyncio.current_task(),
        )
        self._running.add(call)
        return call

    def _choose(self, deployments: Any) -> Deployment:
        chosen: Deployment = self._random.choices(deployments, [max(1, each.weight) for each in deployments])[0]
        return chosen

    async def _open_hold(self, asked: HoldAsked) -> HoldGranted | Replay:
        answer = await self._ledger.open_hold(asked)
        if isinstance(answer, HoldRefused) and answer.existing_call_id and answer.reason.startswith("REQUEST_"):
            return await self._repeat(asked, answer, answer.existing_call_id)
        if isinstance(answer, HoldRefused):
            raise refusal(asked, answer)
        return answer

    async def _repeat(self, asked: HoldAsked, refused: HoldRefused, existing: UUID) -> HoldGranted | Replay:
        """The request has an earlier call; the journal knows its end before TokenStore does."""
        user_id = asked.billing.user_id
        record = await self._journal.find(existing, user_id)
        if record is not None and record.state is CallState.SETTLED:
            stored = await self._journal.answer_of(user_id, existing)
            if stored is not None:
                return Replay(record, stored.message)
            raise RequestFinished(
                "this request was answered and charged; its answer is no longer kept", call_id=str(existing)
            )
        if record is not None and record.state is CallState.FAILED and refused.reason == "REQUEST_IN_FLIGHT":
            # It ended without a charge, but its release got lost.
            await self._ledger.release_hold(user_id, existing)
            answer = await self._ledger.open_hold(asked)
            if isinstance(answer, HoldGranted):
                return answer
            refused = answer
        raise refusal(asked, refused)

    async def _release(self, user_id: str, call_id: UUID) -> None:
        try:
            await self._ledger.release_hold(user_id, call_id)
        except DomainError:
            log.warning("hold_not_released", call_id=str(call_id))  # it expires by itself

    # While the model answers

    def _begin_attempt(self, call: RunningCall) -> None:
        call.attempt_started_at = self._clock.now()

    def _wait_until(self, call: RunningCall, request: CallRequest, *, whole: bool = False) -> float:
        """When the next token is overdue, on the loop's clock."""
        timeouts = call.deployment.timeouts
        now = asyncio.get_running_loop().time()
        elapsed = self._clock.monotonic() - call.started_seconds
        left = timeouts.total - elapsed
        if not whole:
            left = min(left, timeouts.idle if call.first_token_seconds is not None else timeouts.first_token)
        if request.deadline_seconds is not None:
            margin = min(DEADLINE_MARGIN_SECONDS, (request.deadline_seconds - call.started_seconds) / 10)
            left = min(left, request.deadline_seconds - margin - self._clock.monotonic())
        return now + max(0.0, left)

    def _end_of_timeout(self, call: RunningCall, request: CallRequest) -> tuple[End, UpstreamFailure | None]:
        if self._deadline_passed(request):
            return End.DEADLINE, None
        if self._clock.monotonic() - call.started_seconds >= call.deployment.timeouts.total:
            return End.MODEL_TIMEOUT, UpstreamFailure("UPSTREAM_UNAVAILABLE", "the total timeout passed")
        what = "idle" if call.first_token_seconds is not None else "first token"
        return End.UPSTREAM_FAILED, UpstreamFailure("UPSTREAM_UNAVAILABLE", f"the {what} timeout passed")

    def _deadline_passed(self, request: CallRequest) -> bool:
        deadline = request.deadline_seconds
        return deadline is not None and self._clock.monotonic() >= deadline - 2 * DEADLINE_MARGIN_SECONDS

    @staticmethod
    def _cancelled_by_request(call: RunningCall) -> bool:
        """Whether it was CancelCall that cancelled the task; then the client is still there and is answered."""
        task = asyncio.current_task()
        if call.is_cancelled and task is not None and task.cancelling() == 1:
            task.uncancel()
            return True
        return False

    def _mark_first_token(self, call: RunningCall) -> None:
        call.first_token_seconds = self._clock.monotonic()
        call.first_token_at = self._clock.now()

    def _take_message(self, call: RunningCall, message: Message) -> None:
        self._mark_first_token(call)
        for delta in deltas_of(message):
            call.answer.add(delta)
        if call.usage is None:
            call.counted_output_tokens = self._tokens.count_message(message)

    # After the model

    async def _finish_shielded(
        self, call: RunningCall, end: End, finish_reason: FinishReason, failure: UpstreamFailure | None
    ) -> CallRecord:
        """The settlement goes on when the client leaves while it is under way."""
        task = self._in_background(self._finish(call, end, finish_reason, failure))
        return await asyncio.shield(task)

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("settlement_failed", reason=str(error))

    async def _finish(
        self, call: RunningCall, end: End, finish_reason: FinishReason, failure: UpstreamFailure | None
    ) -> CallRecord:
        call.is_ended = True
        try:
            if failure is not None:
                call.error_reason, call.http_status = failure.reason, failure.http_status
                log.warning(
                    "upstream_failed", call_id=str(call.call_id), model_id=call.deployment.model_id,
                    reason=failure.reason, http_status=failure.http_status, detail=failure.detail,
                )
            verdict = judge(
                end, finish_reason=finish_reason, reached_model=call.reached_model,
                delivered=not call.answer.is_empty, clipped=call.clipped, error_reason=call.error_reason,
            )
            now = self._clock.now()
            attempt = call.attempt(ended_at=now)
            record = replace(
                settle(call.checkpoint(), verdict, self._usage_of(call, end), at=now),
                attempts=(attempt,) if attempt else (),
            )
            keep = verdict.charged and record.billing.request_id_was_given
            self._faults.reach(FaultPoint.BEFORE_SETTLE)
            recorded = await self._journal.settle(Settlement(record, call.answer.message() if keep else None))
            self._faults.reach(FaultPoint.AFTER_SETTLE)
            if not verdict.charged:
                await self._release(call.user_id, call.call_id)
            return recorded
        finally:
            self._running.remove(call)

    def _usage_of(self, call: RunningCall, end: End) -> Usage:
        """What the model server reported; counted here when it did not, or when we stopped it. Counted output is never
        above the grant, so that our own estimate never takes more than was held."""
        if call.usage is not None and end is End.COMPLETED:
            return call.usage
        output = call.counted_output_tokens
        if end is End.COMPLETED and not call.answer.is_empty:
            output = self._tokens.count_message(call.answer.message())
        input_tokens = call.usage.input_tokens if call.usage and call.usage.input_tokens else call.input_tokens
        return Usage(
            input_tokens=input_tokens, output_tokens=min(output, call.record.max_output_tokens),
            source=UsageSource.ESTIMATED,
        )

    @staticmethod
    def _raise_unless_delivered(
        call: RunningCall, record: CallRecord, end: End, failure: UpstreamFailure | None
    ) -> None:
        """Without a token delivered, a failure is an error of the RPC; after one, it is a finish reason."""
        if not call.answer.is_empty or end in (End.COMPLETED, End.CUT):
            return
        facts: Mapping[str, str | int] = {"call_id": str(record.call_id)}
        if end is End.DEADLINE:
            raise DeadlineExceeded("the deadline passed before the model answered", facts=facts)
        if end is End.CLIENT_GONE:
            raise Cancelled("the call was cancelled before the model answered", facts=facts)
        raise upstream_error(failure, facts)

    def _timing(self, call: RunningCall) -> Timing:
        first = call.first_token_seconds
        return Timing(
            hold=call.hold_seconds - call.started_seconds,
            first_token=None if first is None else first - call.started_seconds,
            total=self._clock.monotonic() - call.started_seconds,
        )

    async def _replay(self, replay: Replay) -> AsyncIterator[Started | Delta | Finished]:
        yield Started(replay.record, replayed=True)
        for delta in deltas_of(replay.message):
            yield delta
        yield Finished(replay.record, Timing(0.0, None, 0.0))
