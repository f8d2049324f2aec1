"""What model servers' errors mean, in our words; none of their own words, which may quote a prompt or a key."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from llm_service.domain.routing import FailureKind
from llm_service.usecases.ports import UpstreamFailure

LONGEST_RETRY_AFTER = 3600.0
TOO_LONG_CODES = frozenset({
    "context_length_exceeded", "string_above_max_length", "request_too_large", "context_window_exceeded",
    "model_context_window_exceeded",
})
LIMITED_CODES = frozenset({"rate_limit_error", "rate_limit_exceeded", "too_many_requests"})
MISCONFIGURED_CODES = frozenset({
    "authentication_error", "invalid_api_key", "permission_error", "insufficient_quota", "not_found_error",
    "model_not_found", "billing_error", "permission_denied",
})
REJECTED_CODES = frozenset({
    "invalid_request_error", "content_policy_violation", "content_filter", "invalid_prompt", "invalid_value",
    "unsupported_parameter", "unsupported_value", "image_parse_error", "invalid_image", "invalid_base64_image",
    "image_content_policy_violation", "bad_request",
})
TOO_LONG_WORDS = ("prompt is too long", "maximum context length", "context window", "context length")
REASONS = {
    FailureKind.TOO_LONG: "CONTEXT_TOO_LONG", FailureKind.REJECTED: "UPSTREAM_REJECTED",
}


def failure_of(
    error: Any, *, http_status: int = 0, retry_after_seconds: float | None = None
) -> UpstreamFailure:
    """`error` is the server's error object, if it sent one; its text is looked at and never told."""
    told = error if isinstance(error, dict) else {}
    codes = [str(told.get(name)) for name in ("code", "type", "status") if isinstance(told.get(name), str)]
    text = told.get("message")
    kind = _kind_of(codes, str(text) if isinstance(text, str) else "", http_status)
    known = next((code for code in codes if code.replace("_", "").isalnum() and len(code) <= 64), "none")
    where = f"HTTP {http_status}" if http_status else "error event"
    return UpstreamFailure(
        REASONS.get(kind, "UPSTREAM_UNAVAILABLE"), f"{where}, code {known}", kind=kind, http_status=http_status,
        retry_after_seconds=retry_after_seconds,
    )


def _kind_of(codes: list[str], text: str, http_status: int) -> FailureKind:
    said = set(codes)
    if said & TOO_LONG_CODES:
        return FailureKind.TOO_LONG
    if http_status in (400, 413, 422, 0) and any(words in text.lower() for words in TOO_LONG_WORDS):
        return FailureKind.TOO_LONG
    if http_status == 429 and "insufficient_quota" not in said:
        return FailureKind.LIMITED
    if said & LIMITED_CODES:
        return FailureKind.LIMITED
    if http_status in (401, 402, 403, 404, 405) or said & MISCONFIGURED_CODES:
        # Our key or path is at fault, not the caller.
        return FailureKind.MISCONFIGURED
    if http_status in (400, 413, 415, 422) or (http_status == 0 and said & REJECTED_CODES):
        return FailureKind.REJECTED
    if 300 <= http_status < 400:
        return FailureKind.MISCONFIGURED  # redirects are not followed
    return FailureKind.UNAVAILABLE


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds, of retry-after in either form, or of retry-after-ms. `headers`: names in lower case."""
    milliseconds = headers.get("retry-after-ms", "")
    if milliseconds.isdigit():
        return min(int(milliseconds) / 1000, LONGEST_RETRY_AFTER)
    value = headers.get("retry-after", "")
    if value.replace(".", "", 1).isdigit():
        return min(float(value), LONGEST_RETRY_AFTER)
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date", ""))
    except (TypeError, ValueError):
        return None
    return min(max(0.0, wait.total_seconds()), LONGEST_RETRY_AFTER)
