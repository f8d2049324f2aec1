"""Models registered, changed, put in and out of service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_service.domain.chat import Message, Prompt, Role, TextPart
from llm_service.domain.deployment import DEFAULT_EMBEDDING_ALIAS, Deployment, Provider
from llm_service.domain.errors import ModelNotFound
from llm_service.domain.upstream_address import Reach, problem_of_url
from llm_service.usecases.ports import ModelDirectory, ModelProvider, ModelRegistry, Question, UpstreamFailure
from metering.usage import Usage
from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict, InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_page_token, encode_page_token

TEST_SECONDS = 30.0
TEST_TOKENS = 16
TEST_PROMPT = Prompt((Message(Role.USER, (TextPart("Say ok."),)),))


@dataclass(frozen=True, slots=True)
class ModelTested:
    """How a tiny call went; `error_reason` empty = well."""

    seconds: float
    first_token_seconds: float | None = None
    usage: Usage | None = None
    upstream_model: str = ""
    error_reason: str = ""
    detail: str = ""
    http_status: int = 0


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A model as it is now, or was when it was deleted; no model = all have been told."""

    deployment: Deployment | None
    is_deleted: bool
    revision: int


def check_deployment(deployment: Deployment, reach: Reach) -> None:
    """Raises InvalidField."""
    if deployment.provider is not Provider.LOCAL:
        if not deployment.base_url:
            raise InvalidField.of("model.base_url", "is needed for this provider")
        if problem := problem_of_url(deployment.base_url, reach):
            raise InvalidField.of("model.base_url", problem)
    if deployment.context_window and deployment.max_output_tokens > deployment.context_window:
        raise InvalidField.of("model.max_output_tokens", "must not be above context_window")


class ModelAdministration:
    """Every change is in this process's directory when it is answered, and in every other's within 2 s."""

    def __init__(
        self, registry: ModelRegistry, directory: ModelDirectory, providers: Mapping[Provider, ModelProvider], *,
        check_local: Callable[[Mapping[str, Any]], object], reach: Reach, clock: Clock, ids: IdSource,
    ) -> None:
        self._registry = registry
        self._directory = directory
        self._providers = providers
        self._check_local = check_local
        self._reach = reach
        self._clock = clock
        self._ids = ids

    async def register(self, draft: Deployment, *, idempotency_key: str) -> Deployment:
        """Raises InvalidField, IdempotencyConflict."""
        self._check(draft)
        stored = await self._registry.by_key(idempotency_key) if idempotency_key else None
        if stored is None:
            now = self._clock.now()
            wanted = replace(draft, model_id=str(self._ids.new_id()), created_at=now, updated_at=now)
            stored = await self._registry.add(wanted, idempotency_key=idempotency_key)
            await self._directory.refresh()
        alike = replace(
            draft, model_id=stored.model_id, created_at=stored.created_at, updated_at=stored.updated_at
        )
        if alike != stored:
            raise IdempotencyConflict("the idempotency key was used for another model", model_id=stored.model_id)
        return stored

    async def get(self, model_id: str) -> Deployment:
        """Raises ModelNotFound."""
        found = await self._registry.get(model_id)
        if found is None:
            raise ModelNotFound("there is no such model", model_id=model_id)
        return found

    async def list_models(self, *, alias: str, page_size: int, page_token: str) -> tuple[list[Deployment], str]:
        question = ("models", alias)
        key = decode_page_token(page_token, question=question, types=(str, int, str))
        after = (str(key[0]), int(key[1]), str(key[2])) if key else None
        found = await self._registry.list_models(alias=alias, after=after, limit=page_size + 1)
        if len(found) <= page_size:
            return found, ""
        last = found[page_size - 1]
        return found[:page_size], encode_page_token([last.alias, last.priority, last.model_id], question=question)

    async def change(
        self, model_id: str, change: Callable[[Deployment], Deployment], *, exclusive: bool = False
    ) -> Deployment:
        """Raises ModelNotFound, InvalidField."""
        changed = replace(change(await self.get(model_id)), model_id=model_id, updated_at=self._clock.now())
        self._check(changed)
        if not await self._registry.replace(changed, exclusive=exclusive):
            raise ModelNotFound("there is no such model", model_id=model_id)
        await self._directory.refresh()
        return changed

    async def delete(self, model_id: str) -> None:
        """Raises ModelNotFound."""
        if not await self._registry.delete(model_id):
            raise ModelNotFound("there is no such model", model_id=model_id)
        await self._directory.refresh()

    def _check(self, deployment: Deployment) -> None:
        check_deployment(deployment, self._reach)
        if deployment.provider is Provider.LOCAL:
            try:
                self._check_local(deployment.default_params)
            except (TypeError, ValueError) as error:
                raise InvalidField.of("model.default_params", str(error)[:200]) from None

    async def test(self, model_id: str) -> ModelTested:
        """One tiny real call, of nobody. Raises ModelNotFound."""
        deployment = await self.get(model_id)
        embeds = deployment.alias == DEFAULT_EMBEDDING_ALIAS or deployment.capabilities.embeddings is True
        question = Question(TEST_PROMPT, TEST_TOKENS, whole=embeds, inputs=("ok",) if embeds else ())
        began = self._clock.monotonic()
        first: float | None = None
        usage: Usage | None = None
        name = ""
        chunks = self._providers[deployment.provider].ask(deployment, question, on_sent=lambda: None)
        try:
            async with asyncio.timeout(min(TEST_SECONDS, deployment.timeouts.total)):
                async for chunk in chunks:
                    if first is None and (chunk.deltas or chunk.vectors):
                        first = self._clock.monotonic() - began
                    usage, name = chunk.usage or usage, chunk.upstream_model or name
        except UpstreamFailure as failure:
            return ModelTested(
                self._clock.monotonic() - began, error_reason=failure.reason, detail=failure.detail,
                http_status=failure.http_status,
            )
        except TimeoutError:
            return ModelTested(
                self._clock.monotonic() - began, error_reason="DEADLINE_EXCEEDED", detail="it did not answer in time"
            )
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]  # providers are generators
        return ModelTested(self._clock.monotonic() - began, first, usage, name)

    async def watch(self, alias: str) -> AsyncIterator[ModelChange]:
        """Every model now, one change without a model, then the changes."""
        known: dict[str, Deployment] = {}
        synced = False
        while True:
            revision = self._directory.revision
            now = {
                each.model_id: each for each in self._directory.directory.all()
                if each.model_id and alias in ("", each.alias)
            }
            for model_id, deployment in now.items():
                if known.get(model_id) != deployment:
                    yield ModelChange(deployment, is_deleted=False, revision=revision)
            for model_id, deployment in known.items():
                if model_id not in now:
                    yield ModelChange(deployment, is_deleted=True, revision=revision)
            if not synced:
                synced = True
                yield ModelChange(None, is_deleted=False, revision=revision)
            known = now
            await self._directory.changed(revision)
