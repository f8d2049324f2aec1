"""In what model servers differ from the standard of the protocol they speak: settings, so that no code asks who it is.

The presets are what the servers' own documentation says; a model's own settings win over its preset.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from enum import Enum


class UsageArrival(Enum):
    """How a model server tells usage while it streams."""

    FINAL = "final"
    """Once, at the end."""
    CUMULATIVE = "cumulative"
    """Again and again, each the sum so far."""
    DELTA = "delta"
    """Again and again, each what came since the last."""


@dataclass(frozen=True, slots=True)
class Quirks:
    """Empty or None = as the preset says, or standard; `server` names the preset."""

    server: str = ""
    max_tokens_field: str = ""
    path: str = ""
    api_version: str = ""
    auth_header: str = ""
    developer_role: str = ""
    no_stream_usage: bool | None = None
    usage_arrival: str = ""
    reasoning_field: str = ""
    thinking_field: str = ""
    drop_params: tuple[str, ...] = ()

    @property
    def arrival(self) -> UsageArrival:
        return UsageArrival(self.usage_arrival or UsageArrival.FINAL.value)


STANDARD = Quirks()
PRESETS: dict[str, Quirks] = {
    "": STANDARD,
    # Its reasoning models refuse max_tokens; thinking is asked for by reasoning_effort alone; metadata needs store.
    "openai": Quirks(max_tokens_field="max_completion_tokens", thinking_field="none", drop_params=("metadata",)),
    # The deployment is in the path, the key in a header of its own, and an api-version is needed.
    "azure": Quirks(
        max_tokens_field="max_completion_tokens", thinking_field="none", drop_params=("metadata",),
        auth_header="api-key",
        path="/openai/deployments/{model}/chat/completions", api_version="2024-10-21",
    ),
    "deepseek": Quirks(
        developer_role="system", reasoning_field="reasoning_content",
        drop_params=("metadata", "seed", "parallel_tool_calls"),
    ),
    "vllm": Quirks(
        developer_role="system", thinking_field="chat_template_kwargs", usage_arrival="cumulative",
        drop_params=("metadata",),
    ),
    "ollama": Quirks(
        developer_role="system", thinking_field="none", drop_params=("metadata", "parallel_tool_calls"),
    ),
    "openrouter": Quirks(thinking_field="reasoning", reasoning_field="reasoning", drop_params=("metadata",)),
}


@functools.lru_cache(maxsize=1024)
def effective(quirks: Quirks) -> Quirks:
    """The settings with their preset under them."""
    preset = PRESETS[quirks.server]
    own = {
        field.name: value for field in fields(Quirks)
        if (value := getattr(quirks, field.name)) not in ("", None, ())
    }
    return replace(preset, **own)


__all__ = ["PRESETS", "STANDARD", "Quirks", "UsageArrival", "effective"]
