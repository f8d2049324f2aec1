"""One call, from its hold to its settlement; see "Life of a call" in ARCHITECTURE.md.

The settlement does not depend on the client: when the client leaves, its task is cancelled, and the call is settled in
a task of its own. Nothing that a client is told about usage or charge is told before it is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any
from uuid import UUID

from llm_service.domain.call import CallRecord, CallState, End, judge, settle
from llm_service.domain.chat import Delta, FinishReason
from llm_service.domain.errors import RateLimited, UpstreamRejected
from llm_service.domain.token_family import TOKENS_PER_MESSAGE
from llm_service.usecases.admission import Admission
from llm_service.usecases.attempts import Attempts, CallInterrupted, deadline_passed
from llm_service.usecases.begin_call import CallBeginner, HoldUnclear
from llm_service.usecases.call_errors import upstream_error
from llm_service.usecases.call_events import CallRequest, Finished, Generated, Replay, Started, Timing, deltas_of
from llm_service.usecases.call_meters import CallMeters
from llm_service.usecases.output_meter import OutputMeter
from llm_service.usecases.ports import (
    CallJournal,
    CreditLedger,
    Settlement,
    StoredAnswer,
    TokenCounter,
    TurnEnd,
    UpstreamChunk,
    UpstreamFailure,
    UserPolicies,
)
from llm_service.usecases.running_calls import NOTHING, RunningAttempt, RunningCall, RunningCalls, tokens_of
from llm_service.usecases.structured_answer import SchemaMismatch, StructuredAnswers
from llm_service.usecases.usage_of import charge_attempt
from servicekit.core.clock import Clock
from servicekit.core.errors import Cancelled, DeadlineExceeded, DomainError, Overloaded
from servicekit.core.faults import FaultPoint, Faults
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

_ENDED = (CallInterrupted, UpstreamFailure, SchemaMismatch, RateLimited)


class CallRunner:
    """Runs calls. `close` waits for settlements that no client waits for."""

    def __init__(
        self, *, beginner: CallBeginner, attempts: Attempts, ledger: CreditLedger, journal: CallJournal,
        tokens: TokenCounter, admission: Admission, policies: UserPolicies, running: RunningCalls, meters: CallMeters,
        clock: Clock, faults: Faults, most_running: int,
    ) -> None:
        self._beginner = beginner
        self._attempts = attempts
        self._ledger = ledger
        self._journal = journal
        self._tokens = tokens
        self._meter = OutputMeter(tokens)
        self._structured = StructuredAnswers(attempts, self._meter, tokens)
        self._admission = admission
        self._policies = policies
        self._running = running
        self._meters = meters
        self._clock = clock
        self._faults = faults
        self._most_running = most_running
        self._background: set[asyncio.Task[Any]] = set()

    async def stream(self, request: CallRequest) -> AsyncIterator[Started | Delta | Finished]:
        """Started, deltas, finished. Raises a DomainError when the call fails before its first token."""
        call = await self._begin(request, streamed=True)
        if isinstance(call, Replay):
            for event in _replayed(call):
                yield event
            return
        is_metered = request.prompt.json_schema is not None
        ended: Exception | None = None
        cut = False
        try:
            yield Started(call.record)
            chunks = self._chunks(call, request, whole=False)
            async with aclosing(chunks):
                async for chunk in chunks:
                    for delta in chunk.deltas:
                        if not is_metered:
                            delta, cut = self._meter.count(call.attempts[-1], delta, clipped=call.clipped)
                        call.delivered = True
                        yield delta
                        if cut:
                            break
                    self._faults.reach(FaultPoint.MID_STREAM)
                    if cut:
                        break
        except _ENDED as error:
            ended = error
        except (asyncio.CancelledError, GeneratorExit):
            self._leave_behind(call, request)
            raise
        except BaseException:
            self._break_off(call, request)
            raise
        record = await self._finish_shielded(call, request, self._end_of(ended, cut=cut), ended)
        self._raise_unless_delivered(call, record, ended)
        yield Finished(record, self._timing(call), _fell_back(call), call.metadata)

    async def generate(self, request: CallRequest) -> Generated:
        """The whole answer, or the vectors. Raises a DomainError when the model did not give one."""
        call = await self._begin(request, streamed=False)
        if isinstance(call, Replay):
            return Generated(call.record, call.answer.message, replayed=True, vectors=call.answer.vectors)
        is_metered = request.prompt.json_schema is not None
        ended: Exception | None = None
        try:
            chunks = self._chunks(call, request, whole=True)
            async with aclosing(chunks):
                async for chunk in chunks:
                    if not is_metered:
                        answer = call.attempts[-1].answer
                        for delta in chunk.deltas:
                            answer.add(delta)
                    call.delivered |= bool(chunk.deltas or chunk.vectors)
        except _ENDED as error:
            ended = error
        except asyncio.CancelledError:
            self._leave_behind(call, request)
            raise
        except BaseException:
            self._break_off(call, request)
            raise
        record = await self._finish_shielded(call, request, self._end_of(ended, cut=False), ended)
        self._raise_unless_delivered(call, record, ended)
        attempt = call.attempts[-1]
        return Generated(
            record, attempt.answer.message(), vectors=attempt.vectors, timing=self._timing(call),
            fallback=_fell_back(call), metadata=call.metadata,
        )

    async def close(self) -> None:
        """Waits until every settlement that is under way is done."""
        while self._background:
            await asyncio.wait(set(self._background))

    async def _begin(self, request: CallRequest, *, streamed: bool) -> RunningCall | Replay:
        if len(self._running) >= self._most_running:
            raise Overloaded
        try:
            call = await self._beginner.begin(request, streamed=streamed)
        except HoldUnclear as unclear:
            self._in_background(self._release(unclear.user_id, unclear.call_id))
            raise asyncio.CancelledError from None
        if isinstance(call, RunningCall):
            self._running.add(call)
        return call

    def _chunks(self, call: RunningCall, request: CallRequest, *, whole: bool) -> AsyncGenerator[UpstreamChunk]:
        if request.prompt.json_schema is not None:
            return self._structured.chunks(call, request, whole=whole)
        return self._attempts.chunks(call, request, request.prompt, input_bound=call.input_bound, whole=whole)

    # After the model

    @staticmethod
    def _end_of(ended: Exception | None, *, cut: bool) -> End:
        if ended is None:
            return End.CUT if cut else End.COMPLETED
        if isinstance(ended, CallInterrupted):
            return ended.end
        return End.SCHEMA_MISMATCH if isinstance(ended, SchemaMismatch) else End.UPSTREAM_FAILED

    def _leave_behind(self, call: RunningCall, request: CallRequest) -> None:
        """The client is gone; the call is settled all the same."""
        end = End.DEADLINE if deadline_passed(call, self._clock) else End.CLIENT_GONE
        self._in_background(self._finish(call, request, end, None))

    def _break_off(self, call: RunningCall, request: CallRequest) -> None:
        call.error_reason = "INTERNAL"
        self._in_background(self._finish(call, request, End.UPSTREAM_FAILED, None))

    async def _finish_shielded(
        self, call: RunningCall, request: CallRequest, end: End, ended: Exception | None
    ) -> CallRecord:
        """The settlement goes on when the client leaves while it is under way."""
        task = self._in_background(self._finish(call, request, end, ended))
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
        self, call: RunningCall, request: CallRequest, end: End, ended: Exception | None
    ) -> CallRecord:
        call.is_ended = True
        call.stop_watch()
        try:
            record = self._settled(call, end, ended)
            keep = self._keeps_answer(request, record, end)
            self._faults.reach(FaultPoint.BEFORE_SETTLE)
            recorded = await self._journal.settle(Settlement(
                record, _stored(call) if keep else None, call.traceparent, self._turn_end(call)
            ))
            self._faults.reach(FaultPoint.AFTER_SETTLE)
            if record.state is not CallState.SETTLED:
                await self._release(call.user_id, call.call_id)
            self._meters.call_ended(call, recorded, seconds=self._clock.monotonic() - call.started_seconds)
            return recorded
        finally:
            self._running.remove(call)
            for place in call.places:
                self._admission.leave(place, used_tokens=_used(call))
            call.places.clear()

    def _turn_end(self, call: RunningCall) -> TurnEnd | None:
        if call.turn is None:
            return None
        message = call.answer.message()
        family = tokens_of(call.deployment)
        tokens = self._tokens.count_message(message, family) + TOKENS_PER_MESSAGE
        return TurnEnd(call.turn, message, tokens, family, call.summary_until, call.traceparent)

    def _settled(self, call: RunningCall, end: End, ended: Exception | None) -> CallRecord:
        attempt = call.attempt
        now = self._clock.now()
        if attempt is not None and self._counts(call, attempt, end):
            completed = end is End.COMPLETED or attempt.error_reason == ""
            charge_attempt(self._tokens, call, attempt, completed=completed and end is not End.CUT)
        if isinstance(ended, UpstreamFailure | RateLimited):
            call.error_reason = ended.reason
        elif isinstance(ended, CallInterrupted) and ended.failure is not None:
            call.error_reason = ended.failure.reason
        elif isinstance(ended, SchemaMismatch):
            call.metadata |= {"schema_path": ended.violation.path, "schema_rule": ended.violation.rule}
        if attempt is not None and attempt.is_unknown_finish:
            call.metadata["upstream_finish_reason"] = attempt.upstream_finish_reason
        spent = call.spent()
        verdict = judge(
            end, finish_reason=attempt.finish_reason if attempt else FinishReason.UNSPECIFIED,
            reached_model=call.reached_model, delivered=call.delivered, clipped=call.clipped,
            error_reason=call.error_reason, billed=spent is not NOTHING,
        )
        return settle(
            call.record, verdict, spent, at=now, first_token_at=call.first_token_at,
            attempts=tuple(each.to_record(at=now) for each in call.attempts),
            **(call.served_by(attempt) if attempt else {}),
        )

    @staticmethod
    def _counts(call: RunningCall, attempt: RunningAttempt, end: End) -> bool:
        """Whether the newest attempt is charged by what was delivered or reported, as the verdict will be."""
        if attempt.charged_usage is not None:
            return False
        if end in (End.COMPLETED, End.CUT):
            return True
        if end in (End.CLIENT_GONE, End.DEADLINE):
            return attempt.reached_model and not attempt.error_reason
        return call.delivered and end is not End.SCHEMA_MISMATCH

    def _keeps_answer(self, request: CallRequest, record: CallRecord, end: End) -> bool:
        if not (request.store and record.billing.request_id_was_given and record.state is CallState.SETTLED):
            return False
        policy = self._policies.of(record.billing.user_id)
        return end is not End.SCHEMA_MISMATCH and not (policy is not None and policy.keep_no_answers)

    async def _release(self, user_id: str, call_id: UUID) -> None:
        try:
            await self._ledger.release_hold(user_id, call_id)
        except DomainError:
            log.warning("hold_not_released", call_id=str(call_id))  # it expires by itself

    @staticmethod
    def _raise_unless_delivered(call: RunningCall, record: CallRecord, ended: Exception | None) -> None:
        """Without a token delivered, a failure is an error of the RPC; after one, it is a finish reason."""
        if ended is None:
            return
        facts: Mapping[str, str | int] = {"call_id": str(record.call_id)}
        if isinstance(ended, SchemaMismatch):
            charged = record.charge.credit_micros if record.charge else 0
            raise UpstreamRejected(
                "the model's answer does not follow the schema, nor does its repair; both were charged",
                facts={**facts, **call.metadata, "credit_micros": charged},
            )
        if call.delivered:
            return
        if isinstance(ended, RateLimited):
            raise ended
        if isinstance(ended, CallInterrupted) and ended.end is End.DEADLINE:
            raise DeadlineExceeded("the deadline passed before the model answered", facts=facts)
        if isinstance(ended, CallInterrupted) and ended.end is End.CLIENT_GONE:
            raise Cancelled("the call was cancelled before the model answered", facts=facts)
        failure = ended if isinstance(ended, UpstreamFailure) else None
        raise upstream_error(failure, {**facts, "attempts": len(call.attempts)}, record)

    def _timing(self, call: RunningCall) -> Timing:
        first = call.first_token_seconds
        return Timing(
            hold=call.hold_seconds - call.started_seconds,
            first_token=None if first is None else first - call.started_seconds,
            total=self._clock.monotonic() - call.started_seconds, queue=call.queued_seconds,
        )


def _stored(call: RunningCall) -> StoredAnswer:
    attempt = call.attempts[-1]
    return StoredAnswer(attempt.answer.message(), attempt.vectors)


def _used(call: RunningCall) -> int:
    spent = call.spent()
    return spent.input_tokens + spent.output_tokens


def _fell_back(call: RunningCall) -> bool:
    return bool(call.attempts) and call.attempts[-1].deployment is not call.tiers[0][0]


def _replayed(replay: Replay) -> list[Started | Delta | Finished]:
    return [
        Started(replay.record, replayed=True), *deltas_of(replay.answer.message),
        Finished(replay.record, Timing(0.0, None, 0.0)),
    ]
