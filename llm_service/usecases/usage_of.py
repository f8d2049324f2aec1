"""What an attempt is charged for: what its model server reported, else what we counted.

docs/settlement.md is the table of all cases.
"""

from __future__ import annotations

from llm_service.usecases.ports import TokenCounter
from llm_service.usecases.running_calls import RunningAttempt, RunningCall
from metering.usage import Usage, UsageSource


def charge_attempt(tokens: TokenCounter, call: RunningCall, attempt: RunningAttempt, *, completed: bool) -> None:
    """Sets `charged_usage`. Counted output is never above the grant, so that our own estimate never takes more than was
    held; of what was interrupted a report of output is only a lower bound."""
    told = attempt.usage
    if completed and told is not None and (told.input_tokens or told.output_tokens or attempt.answer.is_empty):
        attempt.charged_usage = told
        return
    counted = attempt.counted_output_tokens
    if not attempt.answer.is_empty:
        counted = tokens.count_message(attempt.answer.message(), attempt.family)
    if told is not None and told.output_tokens > counted:
        counted = told.output_tokens
    attempt.charged_usage = Usage(
        input_tokens=told.input_tokens if told and told.input_tokens else attempt.input_tokens,
        cached_input_tokens=told.cached_input_tokens if told else 0,
        cache_write_tokens=told.cache_write_tokens if told else 0,
        output_tokens=min(counted, attempt.bound), source=UsageSource.ESTIMATED,
    )
