"""Models behind aliases: what a registered model is, and which one serves a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from llm_service.domain.errors import ModelNotFound, ModelNotReady

DEFAULT_ALIAS = "pro"
DEFAULT_MAX_OUTPUT_TOKENS = 4096


class Provider(IntEnum):
    """How a model is spoken to; numbers as on the wire."""

    LOCAL = 1
    OPENAI_CHAT = 2


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait: for the connection, the first token, between two tokens, for the whole answer."""

    connect: float = 5.0
    first_token: float = 60.0
    idle: float = 30.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model server's model behind an alias. `model_id` is empty for the built-in one."""

    model_id: str
    alias: str
    provider: Provider
    base_url: str
    upstream_model: str
    api_key: str = field(repr=False)
    active: bool
    priority: int = 0
    weight: int = 1
    context_window: int = 0
    max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS
    timeouts: Timeouts = Timeouts()
    extra_headers: tuple[tuple[str, str], ...] = ()
    price_provider: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def provider_for_price(self) -> str:
        return self.price_provider or self.provider.name


BUILT_IN = Deployment(
    model_id="", alias=DEFAULT_ALIAS, provider=Provider.LOCAL, base_url="", upstream_model="local", api_key="",
    active=True, context_window=128_000,
)
"""Serves the default alias while nothing at all is registered, so that a new mesh answers without a key."""


class Directory:
    """The registered models at one moment."""

    def __init__(self, deployments: Iterable[Deployment] = ()) -> None:
        self._by_alias: dict[str, list[Deployment]] = {}
        for deployment in deployments:
            self._by_alias.setdefault(deployment.alias, []).append(deployment)
        if not self._by_alias:
            self._by_alias[BUILT_IN.alias] = [BUILT_IN]

    def resolve(self, alias: str, *, choose: Callable[[Sequence[Deployment]], Deployment]) -> Deployment:
        """The deployment for one call: lowest priority first, `choose` among those of one priority.

        Raises ModelNotFound, ModelNotReady.
        """
        known = self._by_alias.get(alias)
        if known is None:
            raise ModelNotFound(f"there is no model alias {alias!r}", model=alias)
        active = [deployment for deployment in known if deployment.active]
        if not active:
            raise ModelNotReady(f"no model of alias {alias!r} is active", model=alias)
        if len(active) == 1:
            return active[0]
        first = min(deployment.priority for deployment in active)
        return choose([deployment for deployment in active if deployment.priority == first])


def masked_key(key: str) -> str:
    """Enough of a key to recognise it: sk-...wxyz."""
    if not key:
        return ""
    if len(key) < 16:
        return "..."
    return f"{key[:3]}...{key[-4:]}"
