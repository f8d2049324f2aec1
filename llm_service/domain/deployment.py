"""Models behind aliases: what a registered model is, and which one serves a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import IntEnum
from typing import Any

from llm_service.domain.errors import ModelNotFound, ModelNotReady
from llm_service.domain.quirks import STANDARD, Quirks
from llm_service.domain.rate_limit import NO_LIMITS, Limits

DEFAULT_ALIAS = "pro"
DEFAULT_EMBEDDING_ALIAS = "embedding"
DEFAULT_MAX_RETRIES = 2
DEFAULT_MAX_OUTPUT_TOKENS = 4096


class Provider(IntEnum):
    """How a model is spoken to; numbers as on the wire."""

    LOCAL = 1
    OPENAI_CHAT = 2
    OPENAI_RESPONSES = 3
    ANTHROPIC = 4


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait: for the connection, the first token, between two tokens, for the whole answer."""

    connect: float = 5.0
    first_token: float = 60.0
    idle: float = 30.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do; None = what its provider usually can."""

    tools: bool | None = None
    json_schema: bool | None = None
    json_object: bool | None = None
    images: bool | None = None
    audio: bool | None = None
    files: bool | None = None
    embeddings: bool | None = None

    def can(self, what: str, provider: Provider) -> bool:
        own: bool | None = getattr(self, what)
        return what in USUAL[provider] if own is None else own


USUAL: dict[Provider, frozenset[str]] = {
    Provider.LOCAL: frozenset({"tools", "json_schema", "json_object", "images", "audio", "files", "embeddings"}),
    Provider.OPENAI_CHAT: frozenset(
        {"tools", "json_schema", "json_object", "images", "audio", "files", "embeddings"}
    ),
    Provider.OPENAI_RESPONSES: frozenset({"tools", "json_schema", "json_object", "images", "files"}),
    # Messages has no response format: the model is instructed, and we check.
    Provider.ANTHROPIC: frozenset({"tools", "images", "files"}),
}
"""What a provider's protocol has a place for, and its servers usually do."""


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
    limits: Limits = NO_LIMITS
    capabilities: Capabilities = Capabilities()
    default_params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    quirks: Quirks = STANDARD
    hedge_after: float | None = None
    max_retries: int = DEFAULT_MAX_RETRIES
    bills_failed_attempts: bool = False
    tokenizer: str = ""

    def can(self, what: str) -> bool:
        """Whether it can do what a field of Capabilities names."""
        return self.capabilities.can(what, self.provider)

    @property
    def provider_for_price(self) -> str:
        return self.price_provider or self.provider.name


BUILT_IN = Deployment(
    model_id="", alias=DEFAULT_ALIAS, provider=Provider.LOCAL, base_url="", upstream_model="local", api_key="",
    active=True, context_window=128_000,
)
"""Serves the aliases below while nothing at all is registered, so that a new mesh answers without a key."""
BUILT_IN_ALIASES = (DEFAULT_ALIAS, "memory_extract", "memory_decision_compare", DEFAULT_EMBEDDING_ALIAS)


class Directory:
    """The registered models at one moment."""

    def __init__(self, deployments: Iterable[Deployment] = ()) -> None:
        self._by_alias: dict[str, list[Deployment]] = {}
        for deployment in deployments:
            self._by_alias.setdefault(deployment.alias, []).append(deployment)
        if not self._by_alias:
            self._by_alias = {alias: [replace(BUILT_IN, alias=alias)] for alias in BUILT_IN_ALIASES}

    def tiers(
        self, alias: str, *, draw: Callable[[], float], needed: frozenset[str] = frozenset()
    ) -> list[list[Deployment]]:
        """The active deployments of an alias that can do what is `needed`: by priority, within one in an order drawn by
        weight; `draw()` is 0..1. Raises ModelNotFound, ModelNotReady."""
        known = self._by_alias.get(alias)
        if known is None:
            raise ModelNotFound(f"there is no model alias {alias!r}", model=alias)
        if len(known) == 1 and known[0].active and not needed:
            return [[known[0]]]
        active = [deployment for deployment in known if deployment.active]
        if not active:
            raise ModelNotReady(f"no model of alias {alias!r} is active", model=alias)
        able = [each for each in active if all(each.can(what) for what in needed)]
        if not able:
            missing = ", ".join(sorted(needed))
            raise ModelNotReady(f"no active model of alias {alias!r} can take {missing}", model=alias, needed=missing)
        priorities = sorted({each.priority for each in able})
        return [_drawn([each for each in able if each.priority == priority], draw) for priority in priorities]

    def all(self) -> list[Deployment]:
        return [deployment for known in self._by_alias.values() for deployment in known]


def masked_key(key: str) -> str:
    """Enough of a key to recognise it: sk-...wxyz."""
    if not key:
        return ""
    if len(key) < 16:
        return "..."
    return f"{key[:3]}...{key[-4:]}"


def _drawn(deployments: Sequence[Deployment], draw: Callable[[], float]) -> list[Deployment]:
    """In an order drawn by weight: Efraimidis and Spirakis' keys, draw^(1/weight), highest first."""
    if len(deployments) == 1:
        return list(deployments)
    keyed = [(draw() ** (1.0 / max(1, each.weight)), index) for index, each in enumerate(deployments)]
    return [deployments[index] for _, index in sorted(keyed, reverse=True)]
