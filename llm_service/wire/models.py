"""Models as they travel; a key comes in and is never told again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from creditmesh.llm.v1 import model_service_pb2
from google.protobuf.message import Message as ProtoMessage

from llm_service.domain.deployment import (
    DEFAULT_MAX_OUTPUT_TOKENS,
    Deployment,
    Provider,
    Timeouts,
    masked_key,
)
from servicekit.core.errors import InvalidField
from servicekit.rpc.times import (
    duration_from_proto,
    duration_to_proto,
    optional_timestamp_to_proto,
)

UPDATABLE = frozenset({
    "alias", "provider", "base_url", "upstream_model", "api_key", "active", "priority", "weight", "context_window",
    "max_output_tokens", "timeouts", "extra_headers", "price_provider",
})


def deployment_from_proto(message: model_service_pb2.Model) -> Deployment:
    """A draft, as if it were new."""
    return Deployment(
        model_id="", alias=message.alias, provider=Provider(message.provider), base_url=message.base_url,
        upstream_model=message.upstream_model, api_key=message.api_key, active=message.active,
        priority=message.priority, weight=message.weight or 1, context_window=message.context_window,
        max_output_tokens=message.max_output_tokens or DEFAULT_MAX_OUTPUT_TOKENS,
        timeouts=_timeouts_from_proto(message.timeouts), extra_headers=tuple(sorted(message.extra_headers.items())),
        price_provider=message.price_provider,
    )


def _timeouts_from_proto(message: model_service_pb2.Timeouts) -> Timeouts:
    defaults = Timeouts()

    def seconds(name: str, default: float) -> float:
        if not message.HasField(name):  # type: ignore[arg-type]  # by name
            return default
        return duration_from_proto(getattr(message, name)).total_seconds()

    return Timeouts(
        connect=seconds("connect", defaults.connect), first_token=seconds("first_token", defaults.first_token),
        idle=seconds("idle", defaults.idle), total=seconds("total", defaults.total),
    )


def deployment_to_proto(deployment: Deployment) -> model_service_pb2.Model:
    return _to_proto(deployment, api_key=masked_key(deployment.api_key))


def _to_proto(deployment: Deployment, *, api_key: str) -> model_service_pb2.Model:
    timeouts = deployment.timeouts
    return model_service_pb2.Model(
        model_id=deployment.model_id, alias=deployment.alias,
        provider=model_service_pb2.Provider.ValueType(deployment.provider), base_url=deployment.base_url,
        upstream_model=deployment.upstream_model, api_key=api_key, active=deployment.active,
        priority=deployment.priority, weight=deployment.weight, context_window=deployment.context_window,
        max_output_tokens=deployment.max_output_tokens,
        timeouts=model_service_pb2.Timeouts(
            connect=duration_to_proto(timeouts.connect), first_token=duration_to_proto(timeouts.first_token),
            idle=duration_to_proto(timeouts.idle), total=duration_to_proto(timeouts.total),
        ),
        extra_headers=dict(deployment.extra_headers), price_provider=deployment.price_provider,
        created_at=optional_timestamp_to_proto(deployment.created_at),
        updated_at=optional_timestamp_to_proto(deployment.updated_at),
    )


def update_from_proto(
    message: model_service_pb2.Model, paths: Sequence[str], *, check: Callable[[ProtoMessage], None]
) -> Callable[[Deployment], Deployment]:
    """A change of the named fields; the result is checked by the rules for a new model. Raises InvalidField."""
    if not paths:
        raise InvalidField.of("update_mask", "must name at least one field")
    if unknown := sorted(set(paths) - UPDATABLE):
        raise InvalidField.of("update_mask", f"names fields that can not be changed: {', '.join(unknown)[:200]}")

    def change(deployment: Deployment) -> Deployment:
        merged = _to_proto(deployment, api_key=deployment.api_key)
        for path in paths:
            if path == "timeouts":
                merged.timeouts.CopyFrom(message.timeouts)
            elif path == "extra_headers":
                merged.extra_headers.clear()
                merged.extra_headers.update(message.extra_headers)
            else:
                setattr(merged, path, getattr(message, path))
        check(model_service_pb2.RegisterModelRequest(model=merged))
        return replace(
            deployment_from_proto(merged), model_id=deployment.model_id, created_at=deployment.created_at,
            updated_at=deployment.updated_at,
        )

    return change
