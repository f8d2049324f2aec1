"""Calls told, listed, cancelled; tokens counted."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from llm_service.domain.call import CallRecord, CallState
from llm_service.domain.chat import Prompt
from llm_service.domain.deployment import DEFAULT_ALIAS
from llm_service.domain.errors import CallNotFound, CallNotRunning
from llm_service.domain.token_family import tokenizer_name
from llm_service.usecases.ports import CallJournal, ModelDirectory, TokenCounter
from llm_service.usecases.running_calls import RunningCalls, tokens_of
from servicekit.core.errors import InvalidField
from servicekit.core.page_token import decode_time_token, encode_page_token


async def get_call(
    journal: CallJournal, running: RunningCalls, *, call_id: UUID | None, user_id: str, request_id: str
) -> CallRecord:
    """By call id, or the newest of the request. Raises CallNotFound."""
    if call_id is None:
        record = await journal.find_by_request(user_id, request_id)
        if record is None:
            matching = [
                call for call in running.all()
                if call.user_id == user_id and call.record.billing.request_id == request_id
            ]
            record = matching[-1].checkpoint() if matching else None
    else:
        here = running.get(call_id)
        if here is not None and user_id in ("", here.user_id):
            return here.checkpoint()
        record = await journal.find(call_id, user_id)
    if record is None:
        raise CallNotFound("there is no such call")
    return record


async def list_calls(
    journal: CallJournal, user_id: str, *, conversation_id: str, state: CallState | None, page_size: int,
    page_token: str,
) -> tuple[list[CallRecord], str]:
    """A user's calls, newest first."""
    question = ("calls", user_id, conversation_id, state)
    key = decode_time_token(page_token, question=question)
    try:
        before = (key[0], UUID(key[1])) if key else None
    except ValueError:
        raise InvalidField.of("page_token", "is not a token of this list") from None
    records = await journal.list_calls(
        user_id, conversation_id=conversation_id, state=state, before=before, limit=page_size + 1
    )
    if len(records) <= page_size:
        return records, ""
    last = records[page_size - 1]
    return records[:page_size], encode_page_token(
        [last.created_at.isoformat(), str(last.call_id)], question=question
    )


async def cancel_call(journal: CallJournal, running: RunningCalls, *, call_id: UUID, user_id: str) -> None:
    """Here at once; in another replica within a second. Raises CallNotFound, CallNotRunning."""
    here = running.get(call_id)
    if here is not None and user_id in ("", here.user_id):
        here.cancel()
        return
    record = await journal.find(call_id, user_id)
    if record is None:
        raise CallNotFound("there is no such call")
    if record.state is not CallState.RUNNING:
        raise CallNotRunning("the call has ended", state=record.state.name)
    await journal.ask_to_cancel(record.billing.user_id, call_id)


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The best estimate, what a hold would be made for, and how it was counted."""

    input_tokens: int
    upper_bound_tokens: int
    tokenizer: str


async def count_tokens(models: ModelDirectory, tokens: TokenCounter, alias: str, prompt: Prompt) -> TokenCount:
    """For the first choice of the alias. Raises ModelNotFound, ModelNotReady."""
    deployment = models.directory.tiers(alias or DEFAULT_ALIAS, draw=lambda: 0.5)[0][0]
    family = tokens_of(deployment)
    counted = await tokens.count_prompt(prompt, family=family, upstream_model=deployment.upstream_model)
    return TokenCount(counted.input_tokens, counted.upper_bound, tokenizer_name(family))
