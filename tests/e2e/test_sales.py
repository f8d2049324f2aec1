"""Selling credit over a socket: products, orders, payments, refunds, rewards, corrections, lots."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import grpc
import pytest
from creditmesh.tokenstore.v1 import (
    budget_service_pb2,
    ledger_service_pb2,
    order_service_pb2,
    reward_service_pb2,
    transaction_pb2,
)
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.errors import facts_of, reason_of, refused
from tests.support.load import wait_until
from tests.support.mesh import Mesh, hold_request
from tokenstore_service.domain.payment import signature_of

S, R, T = order_service_pb2, reward_service_pb2, ledger_service_pb2
OLD, NEW = "an old secret of the provider", "a new secret of the provider"
CREDIT = 1_000_000


@pytest.fixture(scope="module")
def mesh(new_module_mesh: Callable[..., Mesh], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    secrets = tmp_path_factory.mktemp("secrets") / "secrets.json"
    secrets.write_text(json.dumps({"providers": {"paymaster": [NEW, OLD]}}))
    made = new_module_mesh(
        TOKENSTORE_PAYMENT_SECRETS_FILE=str(secrets), TOKENSTORE_ALLOW_MOCK_PAYMENT="true",
        TOKENSTORE_ORDER_EXPIRY_SECONDS="5",
    )
    made.tokenstore.start()
    made.wait_for_tokenstore()
    yield made
    assert made.findings() == []


@pytest.fixture
def user() -> str:
    return f"buyer-{uuid4()}"


def order(mesh: Mesh, user: str, product: str = "starter_1000", key: str = "k", quantity: int = 1) -> Any:
    request = S.CreateOrderRequest(user_id=user, product_id=product, quantity=quantity, idempotency_key=key)
    return mesh.orders.CreateOrder(request, timeout=10).order


def confirmation(made: Any, *, secret: str = NEW, at: int | None = None, **said: Any) -> Any:
    document = {
        "order_id": made.order_id, "amount_cent": made.amount_cent, "currency": made.currency,
        "reference": f"p-{made.order_no}", **said,
    }
    payload, timestamp = json.dumps(document), int(time.time()) if at is None else at
    return S.ConfirmPaymentRequest(
        order_id=made.order_id, provider="paymaster", payload=payload, timestamp=timestamp,
        signature=signature_of(secret, timestamp=timestamp, payload=payload),
    )


def pay(mesh: Mesh, made: Any, **fields: Any) -> Any:
    return mesh.orders.ConfirmPayment(confirmation(made, **fields), timeout=10)


def lots(mesh: Mesh, user: str, **fields: Any) -> list[Any]:
    return list(mesh.ledger.ListLots(T.ListLotsRequest(user_id=user, **fields), timeout=10).lots)


def spend(mesh: Mesh, user: str, micros: int, key: str = "spend") -> Any:
    request = T.AdjustBalanceRequest(
        user_id=user, amount_micros=-micros, reason="spent", reference="t", idempotency_key=key
    )
    return mesh.ledger.AdjustBalance(request, timeout=10)


def test_the_seeded_products_are_there_and_products_change_by_mask(mesh: Mesh) -> None:
    products = mesh.orders.ListProducts(S.ListProductsRequest(), timeout=10).products
    assert [(each.sku, each.credit_micros // CREDIT, each.price_cent, each.validity_days) for each in products][:5] == [
        ("free_100", 100, 0, 0), ("starter_1000", 1000, 990, 31), ("lite_3000", 3000, 1990, 31),
        ("pro_10000", 10000, 3990, 31), ("max_40000", 40000, 9990, 31),
    ]
    create = S.CreateProductRequest(
        product={"sku": "tiny", "credit_micros": 5, "price_cent": 1, "sort_order": 90}, idempotency_key="tiny"
    )
    made = mesh.orders.CreateProduct(create, timeout=10).product
    assert mesh.orders.CreateProduct(create, timeout=10).product == made
    create.product.credit_micros = 6
    with refused(grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        mesh.orders.CreateProduct(create, timeout=10)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        create.idempotency_key = "another"
        mesh.orders.CreateProduct(create, timeout=10)
    changed = mesh.orders.UpdateProduct(S.UpdateProductRequest(
        product={"product_id": made.product_id, "status": S.PRODUCT_STATUS_INACTIVE, "name": "not in the mask"},
        update_mask={"paths": ["status"]},
    ), timeout=10).product
    assert (changed.status, changed.name) == (S.PRODUCT_STATUS_INACTIVE, "tiny")
    inactive = mesh.orders.ListProducts(S.ListProductsRequest(status=S.PRODUCT_STATUS_INACTIVE), timeout=10).products
    assert [each.sku for each in inactive] == ["tiny"]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "PRODUCT_NOT_AVAILABLE"):
        order(mesh, "somebody", made.product_id)
    with refused(grpc.StatusCode.NOT_FOUND, "PRODUCT_NOT_FOUND"):
        order(mesh, "somebody", "nothing")


def test_an_order_is_paid_credited_once_and_keeps_its_product(mesh: Mesh, user: str) -> None:
    made = order(mesh, user, quantity=2)
    assert (made.status, made.credit_micros, made.amount_cent) == (S.ORDER_STATUS_PENDING, 2000 * CREDIT, 1980)
    assert order(mesh, user, quantity=2) == made
    with refused(grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        order(mesh, user, quantity=3)
    first = pay(mesh, made)
    assert (first.order.status, first.order.payment.provider) == (S.ORDER_STATUS_CREDITED, "paymaster")
    assert first.balance.balance_micros == first.balance.total_recharged_micros == 2000 * CREDIT
    for secret in (NEW, OLD):
        again = pay(mesh, made, secret=secret)
        assert again.order == first.order
        assert again.balance.balance_micros == 2000 * CREDIT
    got = mesh.orders.GetOrder(S.GetOrderRequest(user_id=user, order_id=made.order_id), timeout=10)
    assert [step.status for step in got.steps] == [
        S.ORDER_STATUS_PENDING, S.ORDER_STATUS_PAID, S.ORDER_STATUS_CREDITED
    ]
    (entry,) = mesh.transactions(user, order_id=made.order_id)
    assert (entry.source, entry.order_id) == (transaction_pb2.TRANSACTION_SOURCE_PURCHASE, made.order_id)
    assert entry.actor
    (lot,) = lots(mesh, user)
    assert lot.order_id == made.order_id
    assert 30 * 86400 < lot.expires_at.seconds - time.time() < 32 * 86400
    twice = pay(mesh, made, reference="another payment of the same order")
    assert twice.order.refund_due
    assert twice.balance.balance_micros == 2000 * CREDIT
    due = mesh.orders.ListOrders(S.ListOrdersRequest(page_size=500), timeout=10).orders
    assert made.order_id in {each.order_id for each in due}


WRONG: dict[str, Callable[[Any], Any]] = {
    "another secret": lambda made: confirmation(made, secret="not one of the provider's"),
    "too old": lambda made: confirmation(made, at=int(time.time()) - 301),
    "from the future": lambda made: confirmation(made, at=int(time.time()) + 400),
    "another amount": lambda made: confirmation(made, amount_cent=1),
    "another currency": lambda made: confirmation(made, currency="USD"),
    "another order": lambda made: confirmation(made, order_id=str(uuid4())),
    "no reference": lambda made: confirmation(made, reference=""),
    "an unknown provider": lambda made: S.ConfirmPaymentRequest(order_id=made.order_id, provider="who"),
    "a changed payload": lambda made: S.ConfirmPaymentRequest(
        **{**{field.name: value for field, value in confirmation(made).ListFields()}, "payload": "{}"}
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_confirmation_that_is_not_the_providers_is_refused(mesh: Mesh, user: str, wrong: str) -> None:
    made = order(mesh, user)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "PAYMENT_REFUSED"):
        mesh.orders.ConfirmPayment(WRONG[wrong](made), timeout=10)
    assert mesh.balance(user).seq == 0


def test_another_users_order_is_not_found(mesh: Mesh, user: str) -> None:
    made = order(mesh, user)
    for ask in (
        lambda: mesh.orders.GetOrder(S.GetOrderRequest(user_id="other", order_id=made.order_id), timeout=10),
        lambda: mesh.orders.GetOrder(S.GetOrderRequest(user_id="other", order_id=str(uuid4())), timeout=10),
        lambda: mesh.orders.CloseOrder(S.CloseOrderRequest(user_id="other", order_id=made.order_id), timeout=10),
    ):
        with refused(grpc.StatusCode.NOT_FOUND, "ORDER_NOT_FOUND"):
            ask()


def test_a_closed_order_that_is_paid_late_is_credited_or_flagged(
    mesh: Mesh, user: str, new_mesh: Callable[..., Mesh]
) -> None:
    made = order(mesh, user)
    closed = mesh.orders.CloseOrder(S.CloseOrderRequest(user_id=user, order_id=made.order_id, reason="no"), timeout=10)
    assert closed.order.status == S.ORDER_STATUS_CLOSED
    assert pay(mesh, made).order.status == S.ORDER_STATUS_CREDITED
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ORDER_NOT_PAYABLE"):
        mesh.orders.CloseOrder(S.CloseOrderRequest(order_id=made.order_id), timeout=10)
    strict = new_mesh(TOKENSTORE_ALLOW_MOCK_PAYMENT="true", TOKENSTORE_LATE_PAYMENT="flag")
    strict.tokenstore.start()
    strict.wait_for_tokenstore()
    late = order(strict, user)
    strict.orders.CloseOrder(S.CloseOrderRequest(order_id=late.order_id), timeout=10)
    request = S.ConfirmPaymentRequest(order_id=late.order_id, provider="mock")
    flagged = strict.orders.ConfirmPayment(request, timeout=10)
    assert (flagged.order.status, flagged.order.refund_due) == (S.ORDER_STATUS_CLOSED, True)
    assert strict.orders.ConfirmPayment(request, timeout=10).order == flagged.order
    assert strict.balance(user).balance_micros == 0


def test_an_unpaid_order_is_closed_after_its_time(mesh: Mesh, user: str) -> None:
    made = order(mesh, user)

    def status() -> Any:
        return mesh.orders.GetOrder(S.GetOrderRequest(order_id=made.order_id), timeout=10).order.status

    wait_until(lambda: status() == S.ORDER_STATUS_CLOSED, seconds=20, what="the closing")


def test_mock_payment_is_off_by_default(new_mesh: Callable[..., Mesh], user: str) -> None:
    plain = new_mesh()
    plain.tokenstore.start()
    plain.wait_for_tokenstore()
    made = order(plain, user)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "PAYMENT_REFUSED"):
        plain.orders.ConfirmPayment(S.ConfirmPaymentRequest(order_id=made.order_id, provider="mock"), timeout=10)


def test_the_free_product_is_credited_at_once_and_one_a_day(mesh: Mesh, user: str) -> None:
    """50 parallel orders give one."""
    outcomes: list[str] = []

    def one(number: int) -> None:
        try:
            made = order(mesh, user, "free_100", key=f"free-{number}")
            outcomes.append(S.OrderStatus.Name(made.status))
        except grpc.RpcError as error:
            outcomes.append(str(reason_of(error)))

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        list(pool.map(one, range(50)))
    assert sorted(outcomes) == ["ORDER_STATUS_CREDITED"] + ["PURCHASE_LIMIT_REACHED"] * 49
    assert mesh.balance(user).balance_micros == 100 * CREDIT


def test_a_closed_order_gives_its_place_in_the_limit_back(mesh: Mesh, user: str) -> None:
    product = mesh.orders.CreateProduct(S.CreateProductRequest(
        product={
            "sku": f"limited-{user}"[:60], "credit_micros": 10, "price_cent": 1,
            "purchase_limit": {"count": 2, "period": budget_service_pb2.PERIOD_MONTH},
        }, idempotency_key=user,
    ), timeout=10).product
    first = order(mesh, user, product.product_id, key="a")
    order(mesh, user, product.product_id, key="b")
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "PURCHASE_LIMIT_REACHED"):
        order(mesh, user, product.product_id, key="c")
    mesh.orders.CloseOrder(S.CloseOrderRequest(order_id=first.order_id), timeout=10)
    assert order(mesh, user, product.product_id, key="c").status == S.ORDER_STATUS_PENDING


def refund(mesh: Mesh, made: Any, micros: int = 0, key: str = "refund") -> Any:
    return mesh.orders.RefundOrder(S.RefundOrderRequest(
        order_id=made.order_id, credit_micros=micros, reason="asked for", idempotency_key=key
    ), timeout=10)


def test_a_refund_takes_the_orders_own_credit_and_never_what_was_spent(mesh: Mesh, user: str) -> None:
    mesh.credit(user, 50 * CREDIT)  # of higher priority, so that it is spent first
    made = order(mesh, user)
    pay(mesh, made)
    spend(mesh, user, 300 * CREDIT)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ORDER_NOT_REFUNDABLE") as caught:
        refund(mesh, made)
    assert facts_of(caught.value)["refundable_micros"] == str(750 * CREDIT)
    part = refund(mesh, made, 250 * CREDIT)
    assert (part.order.status, part.order.refunded_cent) == (S.ORDER_STATUS_CREDITED, 247)
    assert part.transaction.amount_micros == -250 * CREDIT
    assert refund(mesh, made, 250 * CREDIT).transaction == part.transaction
    with refused(grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        refund(mesh, made, 251 * CREDIT)
    hold = hold_request(user, str(uuid4()), max_output_tokens=1_000_000)
    held = mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5).results[0]
    assert held.granted.held_micros > 0
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "INSUFFICIENT_CREDIT"):
        refund(mesh, made, 500 * CREDIT, key="while held")
    assert mesh.findings(user) == []


def test_a_whole_refund_ends_the_order(mesh: Mesh, user: str) -> None:
    made = order(mesh, user)
    pay(mesh, made)
    done = refund(mesh, made)
    assert (done.order.status, done.order.refunded_cent) == (S.ORDER_STATUS_REFUNDED, 990)
    assert (done.balance.balance_micros, done.balance.total_recharged_micros) == (0, 0)
    assert lots(mesh, user) == []
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "ORDER_NOT_REFUNDABLE"):
        refund(mesh, made, key="again")


def test_rewards_are_versioned_limited_and_granted_once_per_event(mesh: Mesh, user: str) -> None:
    def grant(event: str, source: str = "forum_like", ref: str = "post-1") -> Any:
        request = R.GrantRewardRequest(event_id=event, user_id=user, source=source, source_ref_id=ref)
        return mesh.rewards.GrantReward(request, timeout=10).transaction

    def rule(key: str, **fields: Any) -> Any:
        values = {"source": "test_source", "amount_micros": 7, "active": True, **fields}
        return mesh.rewards.SetRewardRule(
            R.SetRewardRuleRequest(reward_rule=values, idempotency_key=f"{user}-{key}"), timeout=10
        ).reward_rule

    assert grant("like:1").amount_micros == 1 * CREDIT
    assert grant("import:1", "forum_import").amount_micros == 5 * CREDIT
    with refused(grpc.StatusCode.NOT_FOUND, "REWARD_RULE_NOT_FOUND"):
        grant("x", "unknown_source")
    first = rule("1", limit={"count": 2, "period": budget_service_pb2.PERIOD_DAY})
    assert rule("1", limit={"count": 2, "period": budget_service_pb2.PERIOD_DAY}) == first
    with refused(grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        rule("1", amount_micros=8)
    entries = [grant(f"e{number}", "test_source") for number in range(3)]
    assert [entry.amount_micros for entry in entries] == [7, 7, 0]
    assert entries[2].status == transaction_pb2.TRANSACTION_STATUS_SKIPPED
    second = rule("2", amount_micros=9, active=False)
    assert second.version == first.version + 1
    assert grant("e0", "test_source") == entries[0], "the rule changed in between"
    assert grant("e9", "test_source").amount_micros == 0
    rule("3", amount_micros=9)
    assert grant("e9", "test_source").amount_micros == 0, "what was decided stays decided"
    with refused(grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        grant("e0", "test_source", ref="another post")
    listed = mesh.rewards.ListRewardRules(R.ListRewardRulesRequest(source="test_source"), timeout=10).reward_rules
    assert [each.version for each in listed] == [3, 2, 1]
    newest = mesh.rewards.ListRewardRules(R.ListRewardRulesRequest(), timeout=10).reward_rules
    assert [each.source for each in newest] == ["forum_import", "forum_like", "test_source"]


def test_an_entry_is_reversed_once_and_linked_both_ways(mesh: Mesh, user: str) -> None:
    mesh.credit(user, 100)
    spent = spend(mesh, user, 30).transaction

    def reverse(seq: int, key: str = "rev", **fields: Any) -> Any:
        return mesh.ledger.ReverseTransaction(T.ReverseTransactionRequest(
            user_id=user, seq=seq, reason="mistake", idempotency_key=key, **fields
        ), timeout=10)

    done = reverse(spent.seq)
    assert (done.transaction.amount_micros, done.transaction.reverses_seq) == (30, spent.seq)
    assert [(use.lot_seq, use.micros) for use in done.transaction.lots] == [(1, 30)]
    assert reverse(spent.seq).transaction == done.transaction
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "TRANSACTION_NOT_REVERSIBLE"):
        reverse(spent.seq, key="again")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "TRANSACTION_NOT_REVERSIBLE"):
        reverse(done.transaction.seq, key="of the reversal")
    with refused(grpc.StatusCode.NOT_FOUND, "TRANSACTION_NOT_FOUND"):
        reverse(99, key="nothing")
    got = mesh.ledger.GetTransaction(T.GetTransactionRequest(user_id=user, seq=spent.seq), timeout=10).transaction
    assert got.reversed_by_seq == done.transaction.seq
    assert {entry.seq: entry.reversed_by_seq for entry in mesh.transactions(user)} == {3: 0, 2: 3, 1: 0}
    spend(mesh, user, 80, key="spend again")
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "INSUFFICIENT_CREDIT"):
        reverse(1, key="of the income")
    assert reverse(1, key="of the income", allow_negative=True).balance.balance_micros == -80


def test_credit_expires_once_but_never_what_a_running_call_holds(mesh: Mesh, user: str) -> None:
    until = Timestamp()
    until.FromMilliseconds(int((time.time() + 1.5) * 1000))
    mesh.ledger.AdjustBalance(T.AdjustBalanceRequest(
        user_id=user, amount_micros=10**6, reason="promotion", reference="p", idempotency_key="p", expires_at=until
    ), timeout=10)
    mesh.credit(user, 500)
    hold = hold_request(user, str(uuid4()), max_output_tokens=10)
    granted = mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5).results[0].granted
    time.sleep(2.5)
    assert mesh.balance(user).balance_micros == 10**6 + 500
    # What is due serves only calls that run already.
    another = hold_request(user, str(uuid4()), max_output_tokens=10, min_output_tokens=10)
    answer = mesh.holds.OpenHolds(Mesh.open_holds_request([another]), timeout=5).results[0]
    assert answer.refused.reason == "INSUFFICIENT_CREDIT"
    mesh.holds.ReleaseHolds(Mesh.release_request(user, granted.hold_id), timeout=5)
    wait_until(lambda: mesh.balance(user).balance_micros == 500, seconds=10, what="the expiry")
    time.sleep(1.2)
    expiries = mesh.transactions(user, source=transaction_pb2.TRANSACTION_SOURCE_EXPIRY)
    assert [entry.amount_micros for entry in expiries] == [-10**6]
    assert [(lot.lot_seq, lot.remaining_micros) for lot in lots(mesh, user)] == [(2, 500)]
    assert [lot.lot_seq for lot in lots(mesh, user, with_closed=True, page_size=1)] == [1]


def test_an_overdraft_limit_lets_holds_go_below_zero(mesh: Mesh, user: str) -> None:
    hold = hold_request(user, str(uuid4()), max_output_tokens=100, min_output_tokens=100)
    refused_one = mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5).results[0]
    assert refused_one.refused.reason == "INSUFFICIENT_CREDIT"
    limit = mesh.ledger.SetOverdraftLimit(
        T.SetOverdraftLimitRequest(user_id=user, overdraft_limit_micros=10**6), timeout=5
    ).balance
    assert (limit.overdraft_limit_micros, limit.is_blocked) == (10**6, False)
    granted = mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5).results[0].granted
    assert mesh.balance(user).available_micros == -granted.held_micros < 0
