"""Models registered, changed, put in and out of service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from llm_service.domain.deployment import Deployment, Provider
from llm_service.domain.errors import ModelNotFound
from llm_service.usecases.ports import ModelDirectory, ModelRegistry
from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict, InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_page_token, encode_page_token


def check_deployment(deployment: Deployment) -> None:
    """Raises InvalidField."""
    if deployment.provider is not Provider.LOCAL and not deployment.base_url:
        raise InvalidField.of("model.base_url", "is needed for this provider")
    if deployment.context_window and deployment.max_output_tokens > deployment.context_window:
        raise InvalidField.of("model.max_output_tokens", "must not be above context_window")


class ModelAdministration:
    """Every change is in this process's directory when it is answered, and in every other's within 2 s."""

    def __init__(self, registry: ModelRegistry, directory: ModelDirectory, *, clock: Clock, ids: IdSource) -> None:
        self._registry = registry
        self._directory = directory
        self._clock = clock
        self._ids = ids

    async def register(self, draft: Deployment, *, idempotency_key: str) -> Deployment:
        """Raises InvalidField, IdempotencyConflict."""
        check_deployment(draft)
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
        check_deployment(changed)
        if not await self._registry.replace(changed, exclusive=exclusive):
            raise ModelNotFound("there is no such model", model_id=model_id)
        await self._directory.refresh()
        return changed

    async def delete(self, model_id: str) -> None:
        """Raises ModelNotFound."""
        if not await self._registry.delete(model_id):
            raise ModelNotFound("there is no such model", model_id=model_id)
        await self._directory.refresh()
