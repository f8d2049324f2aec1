"""Models as they travel; a key comes in and is never told again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from creditmesh.llm.v1 import model_service_pb2
from google.protobuf import json_format
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct

from llm_service.domain.deployment import (
    DEFAULT_MAX_OUTPUT_TOKENS,
    DEFAULT_MAX_RETRIES,
    Capabilities,
    Deployment,
    Provider,
    Timeouts,
    masked_key,
)
from llm_service.domain.quirks import Quirks
from llm_service.domain.rate_limit import Limits
from llm_service.usecases.manage_models import ModelChange, ModelTested
from metering.wire import usage_to_proto
from servicekit.core.errors import InvalidField
from servicekit.rpc.times import (
    duration_from_proto,
    duration_to_proto,
    optional_timestamp_to_proto,
)

UPDATABLE = frozenset({
    "alias", "provider", "base_url", "upstream_model", "api_key", "active", "priority", "weight", "context_window",
    "max_output_tokens", "timeouts", "extra_headers", "price_provider", "limits", "capabilities", "default_params",
    "quirks", "hedge_after", "max_retries", "bills_failed_attempts", "tokenizer",
})
MESSAGE_FIELDS = frozenset({"timeouts", "limits", "capabilities", "default_params", "quirks", "hedge_after"})
MOST_PARAMS_BYTES = 16 * 1024


def deployment_from_proto(message: model_service_pb2.Model) -> Deployment:
    """A draft, as if it were new."""
    return Deployment(
        model_id="", alias=message.alias, provider=Provider(message.provider), base_url=message.base_url,
        upstream_model=message.upstream_model, api_key=message.api_key, active=message.active,
        priority=message.priority, weight=message.weight or 1, context_window=message.context_window,
        max_output_tokens=message.max_output_tokens or DEFAULT_MAX_OUTPUT_TOKENS,
        timeouts=_timeouts_from_proto(message.timeouts), extra_headers=tuple(sorted(message.extra_headers.items())),
        price_provider=message.price_provider, limits=limits_from_proto(message.limits),
        capabilities=_capabilities_from_proto(message.capabilities),
        default_params=_params_from_proto(message.default_params), quirks=_quirks_from_proto(message.quirks),
        hedge_after=(
            duration_from_proto(message.hedge_after).total_seconds() if message.HasField("hedge_after") else None
        ),
        max_retries=message.max_retries if message.HasField("max_retries") else DEFAULT_MAX_RETRIES,
        bills_failed_attempts=message.bills_failed_attempts, tokenizer=message.tokenizer,
    )


def limits_from_proto(message: model_service_pb2.Limits) -> Limits:
    return Limits(message.max_concurrency, message.rpm, message.tpm)


def limits_to_proto(limits: Limits) -> model_service_pb2.Limits:
    return model_service_pb2.Limits(max_concurrency=limits.max_concurrency, rpm=limits.rpm, tpm=limits.tpm)


def _capabilities_from_proto(message: model_service_pb2.Capabilities) -> Capabilities:
    return Capabilities(**{field.name: value for field, value in message.ListFields()})


def _capabilities_to_proto(capabilities: Capabilities) -> model_service_pb2.Capabilities:
    given = {name: value for name, value in asdict(capabilities).items() if value is not None}
    return model_service_pb2.Capabilities(**given)


def _quirks_from_proto(message: model_service_pb2.Quirks) -> Quirks:
    values = {field.name: value for field, value in message.ListFields()}
    if "drop_params" in values:
        values["drop_params"] = tuple(values["drop_params"])
    return Quirks(**values)


def _quirks_to_proto(quirks: Quirks) -> model_service_pb2.Quirks:
    given = {name: value for name, value in asdict(quirks).items() if value is not None}
    return model_service_pb2.Quirks(**given)


def _params_from_proto(message: Struct) -> dict[str, Any]:
    """Numbers without a fraction are whole numbers: a Struct knows only floats. Raises InvalidField."""
    if message.ByteSize() > MOST_PARAMS_BYTES:
        raise InvalidField.of("model.default_params", "is longer than 16 KiB")
    params: dict[str, Any] = _whole_numbers(json_format.MessageToDict(message))
    return params


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _whole_numbers(each) for name, each in value.items()}
    return [_whole_numbers(each) for each in value] if isinstance(value, list) else value


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
        limits=limits_to_proto(deployment.limits) if deployment.limits else None,
        capabilities=_capabilities_to_proto(deployment.capabilities),
        default_params=json_format.ParseDict(dict(deployment.default_params), Struct()),
        quirks=_quirks_to_proto(deployment.quirks),
        hedge_after=None if deployment.hedge_after is None else duration_to_proto(deployment.hedge_after),
        max_retries=deployment.max_retries, bills_failed_attempts=deployment.bills_failed_attempts,
        tokenizer=deployment.tokenizer,
    )


def tested_to_proto(tested: ModelTested) -> model_service_pb2.TestModelResponse:
    return model_service_pb2.TestModelResponse(
        ok=not tested.error_reason,
        first_token=None if tested.first_token_seconds is None else duration_to_proto(tested.first_token_seconds),
        latency=duration_to_proto(tested.seconds), usage=usage_to_proto(tested.usage) if tested.usage else None,
        upstream_model=tested.upstream_model, error_reason=tested.error_reason, detail=tested.detail,
        http_status=tested.http_status,
    )


def model_change_to_proto(change: ModelChange) -> model_service_pb2.WatchModelsResponse:
    return model_service_pb2.WatchModelsResponse(
        model=deployment_to_proto(change.deployment) if change.deployment else None, deleted=change.is_deleted,
        synced=change.deployment is None, revision=change.revision,
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
            if path in MESSAGE_FIELDS:
                merged.ClearField(path)  # type: ignore[arg-type]  # by name
                if message.HasField(path):  # type: ignore[arg-type]  # by name
                    getattr(merged, path).CopyFrom(getattr(message, path))
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
