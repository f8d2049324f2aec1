"""The books over a socket: holds, charges, entries, balances."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import grpc
import pytest
from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    charge_service_pb2,
    hold_service_pb2,
    ledger_service_pb2,
    transaction_pb2,
)
from google.protobuf.duration_pb2 import Duration

from tests.support.errors import refused
from tests.support.load import wait_until
from tests.support.mesh import Mesh, hold_request

H, T, C, B = hold_service_pb2, ledger_service_pb2, charge_service_pb2, balance_service_pb2


@pytest.fixture
def user(mesh: Mesh) -> str:
    name = f"user-{uuid4()}"
    mesh.credit(name, 10**9)
    return name


def open_hold(mesh: Mesh, user: str, **fields: Any) -> Any:
    request = hold_request(user, str(uuid4()), **fields)
    return mesh.holds.OpenHolds(H.OpenHoldsRequest(requests=[request]), timeout=5).results[0]


def key(user: str, hold_id: str) -> Any:
    return H.HoldKey(user_id=user, hold_id=hold_id)


def record(mesh: Mesh, user: str, event_id: str, **fields: Any) -> Any:
    values = {
        "event_id": event_id, "user_id": user, "scene": "chat", "provider": "LOCAL", "model": "pro",
        "usage": {"input_tokens": 10, "output_tokens": 20}, **fields,
    }
    return mesh.charges.RecordCharges(C.RecordChargesRequest(charges=[values]), timeout=5).results[0]


def test_a_hold_is_opened_listed_extended_and_released(mesh: Mesh, user: str) -> None:
    granted = open_hold(mesh, user, ttl=Duration(seconds=30)).granted
    assert granted.quote.price_rule_id == "default"
    assert mesh.balance(user).held_micros == granted.held_micros > 0
    (listed,) = mesh.holds.ListHolds(H.ListHoldsRequest(user_id=user), timeout=5).holds
    assert (listed.hold_id, listed.state) == (granted.hold_id, H.HOLD_STATE_OPEN)
    holds = [key(user, granted.hold_id), key(user, str(uuid4())), key("somebody-else", granted.hold_id)]
    extended = mesh.holds.ExtendHolds(H.ExtendHoldsRequest(holds=holds, ttl=Duration(seconds=600)), timeout=5).results
    assert [each.state for each in extended] == [H.HOLD_STATE_OPEN, 0, 0]
    assert extended[0].at.seconds > granted.expires_at.seconds + 500
    for _ in range(2):
        released = mesh.holds.ReleaseHolds(H.ReleaseHoldsRequest(holds=holds), timeout=5).results
        assert [each.state for each in released] == [H.HOLD_STATE_RELEASED, 0, 0]
    assert mesh.balance(user).held_micros == 0
    got = mesh.holds.GetHold(H.GetHoldRequest(user_id=user, hold_id=granted.hold_id), timeout=5).hold
    assert got.state == H.HOLD_STATE_RELEASED
    with refused(grpc.StatusCode.NOT_FOUND, "HOLD_NOT_FOUND"):
        mesh.holds.GetHold(H.GetHoldRequest(user_id="somebody-else", hold_id=granted.hold_id), timeout=5)


def test_an_expired_hold_is_swept_stays_readable_and_a_late_charge_is_booked(mesh: Mesh, user: str) -> None:
    granted = open_hold(mesh, user, ttl=Duration(seconds=1), origin="a-test").granted

    def state() -> Any:
        return mesh.holds.GetHold(H.GetHoldRequest(user_id=user, hold_id=granted.hold_id), timeout=5).hold.state

    wait_until(lambda: state() == H.HOLD_STATE_EXPIRED, seconds=10, what="the expiry")
    assert mesh.balance(user).held_micros == 0
    expired = mesh.holds.ListHolds(
        H.ListHoldsRequest(state=H.HOLD_STATE_EXPIRED, origin="a-test", page_size=500), timeout=5
    ).holds
    assert granted.hold_id in {hold.hold_id for hold in expired}
    result = record(mesh, user, granted.hold_id, call_id=granted.hold_id)
    assert result.status == C.RECORD_STATUS_APPLIED
    (entry, *_) = mesh.transactions(user)
    assert list(entry.flags) == [transaction_pb2.TRANSACTION_FLAG_LATE]
    assert mesh.findings(user) == []


def test_charges_answer_applied_duplicate_conflict_and_keep_the_conflict(mesh: Mesh, user: str) -> None:
    first = record(mesh, user, "e")
    assert (first.status, first.seq, first.credit_micros) == (C.RECORD_STATUS_APPLIED, 2, 35_200)
    again = record(mesh, user, "e")
    assert (again.status, again.seq, again.credit_micros) == (C.RECORD_STATUS_DUPLICATE, 2, 35_200)
    conflict = record(mesh, user, "e", usage={"output_tokens": 1})
    assert conflict.status == C.RECORD_STATUS_CONFLICT
    kept = mesh.rows(mesh.tokenstore_url, "SELECT kind FROM tokenstore.charge_issue WHERE user_id = %s", (user,))
    assert kept == [("CONFLICT",)]
    assert mesh.balance(user).balance_micros == 10**9 - 35_200


def test_entries_are_paged_and_filtered_newest_first(mesh: Mesh, user: str) -> None:
    for number in range(7):
        record(mesh, user, f"e{number}")
    pages, token = [], ""
    while True:
        page = mesh.ledger.ListTransactions(
            T.ListTransactionsRequest(user_id=user, page_size=3, page_token=token), timeout=5
        )
        pages.append([entry.seq for entry in page.transactions])
        token = page.next_page_token
        if not token:
            break
        record(mesh, user, f"late-{len(pages)}")  # an entry in between does not disturb the pages
    assert pages == [[8, 7, 6], [5, 4, 3], [2, 1]]
    income = mesh.transactions(user, direction=transaction_pb2.TRANSACTION_DIRECTION_INCOME)
    assert [entry.seq for entry in income] == [1]
    charges = mesh.transactions(user, source=transaction_pb2.TRANSACTION_SOURCE_CHARGE)
    assert len(charges) == 9
    got = mesh.ledger.GetTransaction(T.GetTransactionRequest(user_id=user, event_id="e3"), timeout=5).transaction
    assert got == mesh.ledger.GetTransaction(T.GetTransactionRequest(user_id=user, seq=5), timeout=5).transaction
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        mesh.ledger.ListTransactions(
            T.ListTransactionsRequest(user_id="somebody-else", page_token=token or "WyJ4IiwgMV0="), timeout=5
        )


def test_an_adjustment_is_booked_once_per_key(mesh: Mesh, user: str) -> None:
    request = T.AdjustBalanceRequest(user_id=user, amount_micros=-5, reason="typo", reference="t-1", idempotency_key="k")
    first = mesh.ledger.AdjustBalance(request, timeout=5)
    assert first.transaction.direction == transaction_pb2.TRANSACTION_DIRECTION_EXPENSE
    assert mesh.ledger.AdjustBalance(request, timeout=5).transaction == first.transaction
    request.amount_micros = -6
    with refused(grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        mesh.ledger.AdjustBalance(request, timeout=5)
    assert mesh.balance(user).balance_micros == 10**9 - 5


def test_balances_are_read_and_an_unknown_user_is_zero_and_unwritten(mesh: Mesh, user: str) -> None:
    answer = mesh.balances.BatchGetBalances(
        B.BatchGetBalancesRequest(user_ids=[user, "never-seen", user]), timeout=5
    ).balances
    assert [(each.user_id, each.balance_micros) for each in answer] == [(user, 10**9), ("never-seen", 0), (user, 10**9)]
    assert (answer[1].seq, answer[1].is_blocked, answer[1].source) == (0, True, "db")
    assert mesh.rows(mesh.tokenstore_url, "SELECT 1 FROM tokenstore.account WHERE user_id = 'never-seen'") == []
    waited = mesh.balances.GetBalance(B.GetBalanceRequest(user_id=user, min_seq=1), timeout=5).balance
    assert waited.seq == 1
