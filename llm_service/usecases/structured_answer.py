"""Answers held to a JSON Schema: checked before the client sees them, and asked for again once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from llm_service.domain.chat import Delta, FinishReason, Message, Prompt, TextPart
from llm_service.domain.errors import RateLimited
from llm_service.domain.structured_output import Violation, check_answer, repair_prompt
from llm_service.usecases.attempts import Attempts
from llm_service.usecases.call_events import CallRequest, deltas_of
from llm_service.usecases.output_meter import OutputMeter
from llm_service.usecases.ports import TokenCounter, UpstreamChunk, UpstreamFailure
from llm_service.usecases.running_calls import RunningAttempt, RunningCall, tokens_of
from llm_service.usecases.usage_of import charge_attempt

CHECKED = frozenset({FinishReason.STOP})
"""An answer that was cut, filtered, or asks for tools is no failed answer: its finish reason says what it is."""


class SchemaMismatch(Exception):
    """The model's last answer does not follow the schema."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.rule)
        self.violation = violation


class StructuredAnswers:
    """Reasoning is passed on as it comes; text only when it is whole and follows the schema."""

    def __init__(self, attempts: Attempts, meter: OutputMeter, tokens: TokenCounter) -> None:
        self._attempts = attempts
        self._meter = meter
        self._tokens = tokens

    async def chunks(
        self, call: RunningCall, request: CallRequest, *, whole: bool
    ) -> AsyncGenerator[UpstreamChunk]:
        """Chunks that need no metering any more. Raises SchemaMismatch, and what Attempts.chunks raises."""
        schema = request.prompt.json_schema
        assert schema is not None
        prompt, input_bound = request.prompt, call.input_bound
        violation: Violation | None = None
        for repair in (False, True):
            reading = self._attempts.chunks(
                call, request, prompt, input_bound=input_bound, whole=whole, repair=repair, may_begin_again=True
            )
            cut = False
            try:
                async with aclosing(reading):
                    async for chunk in reading:
                        reasoning = []
                        for delta in chunk.deltas:
                            counted, cut = self._meter.count(call.attempts[-1], delta, clipped=call.clipped)
                            if counted.reasoning and not repair:
                                reasoning.append(Delta(reasoning=counted.reasoning))
                            if cut:
                                break
                        if reasoning:
                            yield UpstreamChunk(deltas=reasoning)
                        if cut:
                            break
            except (UpstreamFailure, RateLimited):
                if not repair:
                    raise
                # The repair itself was not to be had; what is wrong with the first answer is what the caller needs.
                assert violation is not None
                raise SchemaMismatch(violation) from None
            attempt = call.attempts[-1]
            if cut:
                attempt.finish_reason = FinishReason.LENGTH
                charge_attempt(self._tokens, call, attempt, completed=False)
            answer = attempt.answer.message()
            if attempt.finish_reason not in CHECKED or answer.tool_calls:
                yield _rest_of(answer)
                return
            checked = check_answer(_text_of(answer), schema.schema)
            charge_attempt(self._tokens, call, attempt, completed=True)
            if checked.violation is None:
                if repair:
                    call.metadata["schema_repaired"] = "true"
                attempt.answer.texts[:] = [checked.text]
                yield UpstreamChunk(deltas=[Delta(text=checked.text)])
                return
            violation = checked.violation
            if repair or not call.may_repair:
                break
            prompt, input_bound = await self._repair(call, request.prompt, attempt, answer, violation)
            if call.bound_of_next(input_bound) < max(1, request.min_output_tokens):
                break
        assert violation is not None
        raise SchemaMismatch(violation)

    async def _repair(
        self, call: RunningCall, prompt: Prompt, attempt: RunningAttempt, answer: Message, violation: Violation
    ) -> tuple[Prompt, int]:
        """The question to ask again with, and the bound of its input."""
        again = repair_prompt(prompt, answer, violation)
        deployment = attempt.deployment
        count = await self._tokens.count_prompt(
            again, family=tokens_of(deployment), upstream_model=deployment.upstream_model
        )
        call.input_tokens = {**call.input_tokens, tokens_of(deployment): count.input_tokens}
        return replace(again, json_schema=prompt.json_schema), count.upper_bound


def _text_of(answer: Message) -> str:
    return "".join(part.text for part in answer.parts if isinstance(part, TextPart))


def _rest_of(answer: Message) -> UpstreamChunk:
    """All of an answer but its reasoning, which was passed on."""
    return UpstreamChunk(deltas=deltas_of(replace(answer, reasoning="", reasoning_signature="")))
