"""Policies of users as they travel."""

from __future__ import annotations

from datetime import datetime

from creditmesh.llm.v1 import user_policy_service_pb2

from llm_service.usecases.ports import UserPolicy
from llm_service.wire.models import limits_from_proto, limits_to_proto
from servicekit.rpc.times import optional_timestamp_to_proto


def policy_from_proto(message: user_policy_service_pb2.UserPolicy, *, now: datetime) -> UserPolicy:
    limits = limits_from_proto(message.limits) if message.HasField("limits") else None
    return UserPolicy(message.user_id, limits, message.keep_no_answers, now)


def policy_to_proto(policy: UserPolicy) -> user_policy_service_pb2.UserPolicy:
    return user_policy_service_pb2.UserPolicy(
        user_id=policy.user_id, limits=None if policy.limits is None else limits_to_proto(policy.limits),
        keep_no_answers=policy.keep_no_answers, updated_at=optional_timestamp_to_proto(policy.updated_at),
    )
