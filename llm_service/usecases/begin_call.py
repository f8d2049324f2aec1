"""The beginning of a call: which models may serve it, below which limits, and the hold that is its durable start."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from uuid import UUID

from llm_service.domain.call import CallRecord, CallState, Operation
from llm_service.domain.chat import AudioPart, FilePart, ImagePart
from llm_service.domain.deployment import DEFAULT_ALIAS, DEFAULT_EMBEDDING_ALIAS, Deployment
from llm_service.domain.errors import ContextTooLong, RequestFinished
from llm_service.domain.rate_limit import Limits
from llm_service.usecases.admission import Admission
from llm_service.usecases.attempts import until_deadline
from llm_service.usecases.call_errors import refusal
from llm_service.usecases.call_events import CallRequest, Replay
from llm_service.usecases.ports import (
    CallJournal,
    CreditLedger,
    HoldAsked,
    HoldGranted,
    HoldRefused,
    ModelDirectory,
    Place,
    TokenCount,
    TokenCounter,
    UserPolicies,
)
from llm_service.usecases.running_calls import RunningCall, tokens_of
from metering.usage import Usage
from servicekit.core.clock import Clock
from servicekit.core.faults import FaultPoint, Faults
from servicekit.core.ids import IdSource

REPAIR_INPUT_TOKENS = 64
"""What a repair adds to the prompt beside the answer: the words that ask for it."""
MOST_INPUT_TOKENS = 30_000_000
MOST_OTHER_PROVIDERS = 16
"""What a hold may ask for at most; one that asks for more would be refused with all that share its RPC."""
_TOO_LITTLE = frozenset({"INSUFFICIENT_CREDIT", "BUDGET_EXCEEDED"})
_PARTS = {ImagePart: "images", AudioPart: "audio", FilePart: "files"}
NO_NEEDS: frozenset[str] = frozenset()


def needs_of(request: CallRequest) -> frozenset[str]:
    """What a model must be able to do; see Capabilities."""
    if request.inputs:
        return frozenset({"embeddings"})
    needs = {"tools"} if request.prompt.tools else set()
    for message in request.prompt.messages:
        for part in message.parts:
            if type(part) in _PARTS:
                needs.add(_PARTS[type(part)])
    return frozenset(needs) if needs else NO_NEEDS


class HoldUnclear(Exception):
    """The caller left while the hold was asked for: it is to be given back in any case."""

    def __init__(self, user_id: str, call_id: UUID) -> None:
        super().__init__(str(call_id))
        self.user_id = user_id
        self.call_id = call_id


class CallBeginner:
    """Begins calls."""

    def __init__(
        self, *, models: ModelDirectory, ledger: CreditLedger, journal: CallJournal, tokens: TokenCounter,
        admission: Admission, policies: UserPolicies, user_limits: Limits, clock: Clock, ids: IdSource, faults: Faults,
    ) -> None:
        self._models = models
        self._ledger = ledger
        self._journal = journal
        self._tokens = tokens
        self._admission = admission
        self._policies = policies
        self._user_limits = user_limits
        self._clock = clock
        self._ids = ids
        self._faults = faults
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing

    async def begin(self, request: CallRequest, *, streamed: bool) -> RunningCall | Replay:
        """Raises what the caller is told, and HoldUnclear."""
        arrived = self._clock.monotonic()
        created_at = self._clock.now()
        operation = Operation.EMBED if request.inputs else Operation.CHAT
        alias = request.model or (DEFAULT_EMBEDDING_ALIAS if request.inputs else DEFAULT_ALIAS)
        tiers = self._models.directory.tiers(alias, draw=self._random.random, needed=needs_of(request))
        counts = await self._count(request, tiers)
        most, tiers = _fitting(request, tiers, counts)
        bound = max(count.upper_bound for count in counts.values())
        if bound > MOST_INPUT_TOKENS:
            raise ContextTooLong("the prompt is longer than any model takes", input_tokens=bound)
        first = tiers[0][0]
        others = {each.provider_for_price for tier in tiers for each in tier} - {first.provider_for_price}
        asked = HoldAsked(
            call_id=request.call_id or self._ids.new_id(), billing=request.billing,
            provider=first.provider_for_price, model=alias,
            input_tokens=bound, max_output_tokens=most,
            min_output_tokens=min(max(0 if request.inputs else 1, request.min_output_tokens), most),
            other_providers=tuple(sorted(others)[:MOST_OTHER_PROVIDERS]),
        )
        call = RunningCall(
            record=CallRecord(
                call_id=asked.call_id, billing=request.billing, model=alias, provider=first.provider.name,
                price_provider=first.provider_for_price, upstream_model=first.upstream_model,
                state=CallState.RUNNING, streamed=streamed, hold_micros=0, max_output_tokens=most, quote=None,
                usage=Usage(), created_at=created_at, operation=operation,
            ),
            tiers=tiers, quotes={}, input_tokens={family: count.input_tokens for family, count in counts.items()},
            input_bound=bound, clipped=False, may_repair=False, started_seconds=arrived, hold_seconds=arrived,
            hold_expires_at=created_at, deadline_seconds=request.deadline_seconds, task=asyncio.current_task(),
            traceparent=request.traceparent, turn=request.turn, summary_until=request.summary_until,
        )
        place = await self._enter_user(call, bound + most)
        begun = False
        try:
            self._faults.reach(FaultPoint.BEFORE_HOLD)
            hold = await self._hold(call, asked, wants_repair=request.prompt.json_schema is not None)
            if isinstance(hold, Replay):
                return hold
            self._faults.reach(FaultPoint.AFTER_HOLD)
            begun = True
        finally:
            if not begun and place is not None:
                self._admission.leave(place, used_tokens=0)
        call.quotes = hold.quotes
        granted = min(most, hold.max_output_tokens)
        call.clipped = hold.max_output_tokens < most
        call.hold_seconds = self._clock.monotonic()
        call.hold_expires_at = hold.expires_at
        call.record = replace(
            call.record, hold_micros=hold.held_micros, max_output_tokens=granted,
            quote=hold.quotes.get(first.provider_for_price),
        )
        return call

    async def _count(self, request: CallRequest, tiers: list[list[Deployment]]) -> dict[str, TokenCount]:
        """By family of tokenizers, of all models that may serve the call."""
        counts: dict[str, TokenCount] = {}
        for tier in tiers:
            for each in tier:
                family = tokens_of(each)
                if family in counts:
                    continue
                if request.inputs:
                    counts[family] = await self._tokens.count_inputs(request.inputs, family=family)
                else:
                    counts[family] = await self._tokens.count_prompt(
                        request.prompt, family=family, upstream_model=each.upstream_model
                    )
        return counts

    async def _enter_user(self, call: RunningCall, tokens: int) -> Place | None:
        policy = self._policies.of(call.user_id)
        limits = self._user_limits if policy is None or policy.limits is None else policy.limits
        if not limits:
            return None
        began = self._clock.monotonic()
        place = await self._admission.enter(
            f"user:{call.user_id}", limits, tokens=tokens, deadline=until_deadline(call), what="this user"
        )
        call.queued_seconds += self._clock.monotonic() - began
        call.places.append(place)
        return place

    async def _hold(self, call: RunningCall, asked: HoldAsked, *, wants_repair: bool) -> HoldGranted | Replay:
        """With credit for a repair where one may be needed, and without it when the credit does not reach for that."""
        spare = 0
        if any(each.bills_failed_attempts for tier in call.tiers for each in tier):
            spare = asked.input_tokens
        wished = asked
        if wants_repair:
            wished = replace(
                asked, max_output_tokens=2 * asked.max_output_tokens,
                input_tokens=2 * asked.input_tokens + asked.max_output_tokens + REPAIR_INPUT_TOKENS + spare,
            )
        elif spare:
            wished = replace(asked, input_tokens=asked.input_tokens + spare)
        try:
            answer = await self._ledger.open_hold(wished, traceparent=call.traceparent)
            if wished is not asked and isinstance(answer, HoldRefused) and answer.reason in _TOO_LITTLE:
                answer = await self._ledger.open_hold(asked, traceparent=call.traceparent)
            elif wants_repair and isinstance(answer, HoldGranted):
                call.may_repair = True
            if isinstance(answer, HoldRefused) and answer.existing_call_id and answer.reason.startswith("REQUEST_"):
                return await self._repeat(asked, answer, answer.existing_call_id)
        except asyncio.CancelledError:
            # Whether it was granted is not known; given back it is in any case.
            raise HoldUnclear(call.user_id, call.call_id) from None
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
                return Replay(record, stored)
            raise RequestFinished(
                "this request was answered and charged; its answer is not kept", call_id=str(existing)
            )
        if record is not None and record.state is CallState.FAILED and refused.reason == "REQUEST_IN_FLIGHT":
            # It ended without a charge, but its release got lost.
            await self._ledger.release_hold(user_id, existing)
            answer = await self._ledger.open_hold(asked)
            if isinstance(answer, HoldGranted):
                return answer
            refused = answer
        raise refusal(asked, refused)


def _fitting(
    request: CallRequest, tiers: list[list[Deployment]], counts: dict[str, TokenCount]
) -> tuple[int, list[list[Deployment]]]:
    """Most output tokens of the first choice, and the models whose window the prompt fits. Raises ContextTooLong."""
    fitting: list[list[Deployment]] = []
    most = 0
    least = 0 if request.inputs else max(1, request.min_output_tokens)
    widest: tuple[int, int] = (0, 0)
    for tier in tiers:
        kept = []
        for each in tier:
            counted = counts[tokens_of(each)].input_tokens
            room = 0 if request.inputs else min(
                request.max_output_tokens or each.max_output_tokens, each.max_output_tokens
            )
            if each.context_window and not request.inputs:
                room = min(room, each.context_window - counted)
                widest = max(widest, (each.context_window, counted))
            if room < least and not request.inputs:
                continue
            kept.append(each)
            most = most or room
        if kept:
            fitting.append(kept)
    if not fitting:
        raise ContextTooLong(
            "the prompt does not fit the model's context window", input_tokens=widest[1], context_window=widest[0]
        )
    return most, fitting

