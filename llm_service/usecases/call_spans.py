"""Spans of calls by OpenTelemetry's GenAI conventions (open-telemetry/semantic-conventions-genai).

No content is ever in them: there is no switch that would put it there.
"""

from __future__ import annotations

from llm_service.domain.deployment import Provider
from llm_service.usecases.running_calls import RunningAttempt, RunningCall
from servicekit.telemetry import tracing

PROVIDER_NAMES = {
    Provider.LOCAL: "creditmesh.local", Provider.OPENAI_CHAT: "openai", Provider.OPENAI_RESPONSES: "openai",
    Provider.ANTHROPIC: "anthropic",
}
"""gen_ai.provider.name; of OpenAI-compatible servers the protocol's, unless price_provider names one."""


def start_attempt_span(call: RunningCall, attempt: RunningAttempt) -> tracing.Span | None:
    if not tracing.is_on():
        return None
    deployment = attempt.deployment
    operation = "embeddings" if call.record.operation.name == "EMBED" else "chat"
    return tracing.start(
        f"{operation} {deployment.upstream_model}", kind=tracing.SpanKind.CLIENT, parent=call.traceparent,
        starts_trace=False,
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": deployment.price_provider.lower() or PROVIDER_NAMES[deployment.provider],
            "gen_ai.request.model": deployment.upstream_model, "gen_ai.request.max_tokens": attempt.bound,
            "gen_ai.request.stream": call.record.streamed,
            "gen_ai.conversation.id": call.record.billing.conversation_id,
            "creditmesh.call_id": str(call.call_id), "creditmesh.attempt": attempt.number,
            "creditmesh.attempt_kind": attempt.kind.name, "creditmesh.model": call.record.model,
        },
    )


def end_attempt_span(span: tracing.Span | None, attempt: RunningAttempt) -> None:
    if span is None:
        return
    attributes: dict[str, str | int | float | bool | list[str]] = {
        "gen_ai.response.model": attempt.upstream_model or attempt.deployment.upstream_model,
        "gen_ai.response.finish_reasons": [attempt.upstream_finish_reason or attempt.finish_reason.name.lower()],
    }
    if attempt.usage is not None:
        attributes |= {
            "gen_ai.usage.input_tokens": attempt.usage.input_tokens,
            "gen_ai.usage.output_tokens": attempt.usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": attempt.usage.cached_input_tokens,
            "gen_ai.usage.cache_creation.input_tokens": attempt.usage.cache_write_tokens,
            "gen_ai.usage.reasoning.output_tokens": attempt.usage.reasoning_tokens,
        }
    if attempt.first_token_seconds is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = attempt.first_token_seconds - attempt.started_seconds
    if attempt.http_status:
        attributes["http.response.status_code"] = attempt.http_status
    tracing.end(span, error=attempt.error_reason, attributes=attributes)
