"""Counting what a model says against what it may."""

from __future__ import annotations

from llm_service.domain.chat import Delta
from llm_service.usecases.ports import TokenCounter
from llm_service.usecases.running_calls import RunningAttempt

UNCLIPPED_TOLERANCE = 1.25
"""A model server's tokenizer may count fewer tokens than ours for the same text; only a hold that credit had clipped is
held to our own count exactly. What we count ourselves is never charged above the grant."""
UNCLIPPED_SLACK_TOKENS = 16


class OutputMeter:
    """Holds an attempt to the output tokens that it was granted."""

    def __init__(self, tokens: TokenCounter) -> None:
        self._tokens = tokens

    def count(self, attempt: RunningAttempt, delta: Delta, *, clipped: bool) -> tuple[Delta, bool]:
        """Counts a delta against the grant. Answers the delta as far as the grant reaches, and whether that was all."""
        tokens = self._count_delta(delta)
        limit = attempt.bound if clipped else int(attempt.bound * UNCLIPPED_TOLERANCE) + UNCLIPPED_SLACK_TOKENS
        left = limit - attempt.counted_output_tokens
        cut = tokens > left
        if cut and delta.text:
            delta = Delta(text=self._first_tokens(delta.text, max(left, 0)), reasoning=delta.reasoning)
            tokens = self._count_delta(delta)
        attempt.counted_output_tokens += tokens
        attempt.answer.add(delta)
        return delta, cut

    def _count_delta(self, delta: Delta) -> int:
        tokens = self._tokens.count_text(delta.text) if delta.text else 0
        if delta.reasoning:
            tokens += self._tokens.count_text(delta.reasoning)
        if delta.tool_call is not None:
            tokens += self._tokens.count_text(delta.tool_call.name + delta.tool_call.arguments)
        return tokens

    def _first_tokens(self, text: str, tokens: int) -> str:
        """The longest beginning of `text` that is at most so many tokens, by halving."""
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if self._tokens.count_text(text[:middle]) <= tokens:
                low = middle
            else:
                high = middle - 1
        return text[:low]
