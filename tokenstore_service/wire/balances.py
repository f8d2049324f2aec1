"""Accounts as they travel."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import balance_service_pb2

from servicekit.rpc.times import optional_timestamp_to_proto
from tokenstore_service.domain.account import Account


def balance_to_proto(account: Account, *, source: str = "db") -> balance_service_pb2.Balance:
    return balance_service_pb2.Balance(
        user_id=account.user_id,
        balance_micros=account.balance_micros,
        held_micros=account.held_micros,
        available_micros=account.available_micros,
        overdraft_limit_micros=account.overdraft_limit_micros,
        is_blocked=account.holdable_micros <= 0,
        total_recharged_micros=account.total_recharged_micros,
        total_rewarded_micros=account.total_rewarded_micros,
        total_consumed_micros=account.total_consumed_micros,
        seq=account.seq,
        updated_at=optional_timestamp_to_proto(account.updated_at),
        source=source,
        version=account.version,
    )
