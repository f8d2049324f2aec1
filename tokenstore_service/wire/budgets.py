"""Budgets as they travel."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import budget_service_pb2

from servicekit.core.errors import InvalidField
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_to_proto
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.commands import SetBudget
from tokenstore_service.domain.period import Period


def set_budget_from_proto(message: budget_service_pb2.SetBudgetRequest, *, budget_id: str) -> SetBudget:
    """Raises InvalidField when only one of label key and value is given."""
    if bool(message.label_key) != bool(message.label_value):
        raise InvalidField.of("label_value", "goes together with label_key")
    return SetBudget(
        user_id=message.user_id, budget_id=budget_id, label_key=message.label_key, label_value=message.label_value,
        period=Period(message.period), limit_micros=message.limit_micros,
    )


def budget_to_proto(budget: Budget) -> budget_service_pb2.Budget:
    """What it has counted in the period that `budget.updated_at` or a later look lies in."""
    return budget_service_pb2.Budget(
        budget_id=budget.budget_id, user_id=budget.user_id, label_key=budget.label_key, label_value=budget.label_value,
        period=budget_service_pb2.Period.ValueType(budget.period), limit_micros=budget.limit_micros,
        spent_micros=budget.spent_micros, held_micros=budget.held_micros, left_micros=budget.left_micros,
        resets_at=optional_timestamp_to_proto(budget.resets_at(budget.period_start)),
        created_at=timestamp_to_proto(budget.created_at),
    )
