"""Events that tell of changed balances."""

from __future__ import annotations

from creditmesh.events.v1 import balance_changed_pb2

from servicekit.rpc.times import optional_timestamp_to_proto
from tokenstore_service.domain.account import Account
from tokenstore_service.usecases.ports import Announcement

BALANCES_TOPIC = "creditmesh.balances.v1"
BALANCE_CHANGED = "credit.balance.changed"


def announcement_of(account: Account, fell_below_micros: int | None, *, topic: str = BALANCES_TOPIC) -> Announcement:
    message = balance_changed_pb2.BalanceChanged(
        user_id=account.user_id, balance_micros=account.balance_micros, held_micros=account.held_micros,
        available_micros=account.available_micros, seq=account.seq, version=account.version,
        changed_at=optional_timestamp_to_proto(account.updated_at), fell_below_micros=fell_below_micros,
    )
    return Announcement(
        event_id=f"{account.user_id}:{account.version}", event_type=BALANCE_CHANGED, topic=topic,
        payload=message.SerializeToString(),
    )
