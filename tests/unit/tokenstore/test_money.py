"""Lots, expiry, orders, refunds, rewards, reversals, budgets: rules on books in memory, and any sequence of them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.charge import bound_micros
from metering.usage import Usage, UsageSource
from servicekit.core.errors import DomainError, IdempotencyConflict, InvalidField
from tests.unit.tokenstore.test_book import NOW, World, adjust, charge, open_hold
from tests.unit.tokenstore.test_price_rule import rule
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.commands import (
    Booked,
    CloseOrder,
    CreateOrder,
    DeleteBudget,
    ExpireHold,
    ExpireLots,
    GrantReward,
    HoldGranted,
    HoldRefused,
    IssueKind,
    OrderChanged,
    PayOrder,
    RecordCharge,
    RecordStatus,
    RefundOrder,
    ReleaseHold,
    Reprice,
    ReverseEntry,
    SetBudget,
    SetOverdraftLimit,
    Units,
)
from tokenstore_service.domain.entry import EntryFlag, EntrySource, EntryStatus
from tokenstore_service.domain.errors import (
    InsufficientCredit,
    OrderNotPayable,
    OrderNotRefundable,
    PaymentRefused,
    PurchaseLimitReached,
    TransactionNotReversible,
)
from tokenstore_service.domain.order import ALLOWED, Order, OrderStatus, Product, ProductStatus
from tokenstore_service.domain.payment import Confirmation, check_signature, payment_reference, signature_of
from tokenstore_service.domain.period import Limit, Period, period_end, period_start
from tokenstore_service.domain.policy import DEFAULT_POLICY, Policy
from tokenstore_service.domain.price_rule import PriceBook, UnitPrice, with_rates
from tokenstore_service.domain.reward import RewardRule
from tokenstore_service.domain.units import amount_from_text, amount_to_text
from tokenstore_service.wire.usage_events import usage_charge_from_bytes

PRODUCT = Product(
    "p", "p", "P", "", 1_000, 990, 990, "CNY", "", ProductStatus.ACTIVE, 0, 31, None, NOW, NOW
)
HOURS = timedelta(hours=1)


def order(number: int = 1, *, product: Product = PRODUCT, key: str = "", quantity: int = 1, user: str = "u") -> CreateOrder:
    return CreateOrder(user, UUID(int=number), f"CM-{number}", key or f"o{number}", product, quantity)


def pay(number: int = 1, reference: str = "r", user: str = "u") -> PayOrder:
    return PayOrder(user, UUID(int=number), "prov", reference)


def refund(micros: int = 0, key: str = "f", number: int = 1, user: str = "u") -> RefundOrder:
    return RefundOrder(user, UUID(int=number), micros, "reason", key)


def reverse(seq: int, key: str = "v", *, user: str = "u", allow_negative: bool = False) -> ReverseEntry:
    return ReverseEntry(user, seq, "reason", key, allow_negative=allow_negative)


def reward(event: str, user: str = "u", **fields: Any) -> GrantReward:
    values: dict[str, Any] = {
        "version": 1, "name": "N", "amount_micros": 5, "is_active": True, "limit": None, "validity_days": 0,
        "description": "", "created_at": NOW, **fields,
    }
    return GrantReward(user, event, RewardRule("like", **values), "post")


def expiring(amount: int, key: str, hours: int, user: str = "u") -> Any:
    return replace(adjust(amount, key, user), expires_at=NOW + hours * HOURS)


def test_lots_are_spent_by_priority_then_expiry_then_age() -> None:
    world = World()
    world.run(adjust(100, "a"), order(), pay(), expiring(100, "late", 9), expiring(100, "early", 5), reward("e"))
    assert world.lots() == {1: 100, 2: 1000, 3: 100, 4: 100, 5: 5}
    (spent,) = world.run(adjust(-207, "spend"))
    assert spent.entry.lots == "5:5,4:100,3:100,1:2"
    assert world.lots() == {1: 98, 2: 1000}
    world.check()


def test_a_charge_that_fits_the_head_touches_no_lot_and_one_that_does_not_takes_as_many_as_it_needs() -> None:
    world = World()
    world.run(*[adjust(20_000, f"k{number}") for number in range(10)])
    stored = {key: lot.remaining_micros for key, lot in world.books.lots.items()}
    small = Usage(output_tokens=1)
    world.run(charge(1, usage=small))
    assert {key: lot.remaining_micros for key, lot in world.books.lots.items()} == stored
    assert world.accounts["u"].head_lot_micros == 20_000 - 1_600
    world.run(charge(2, usage=Usage(output_tokens=30)), charge(3, usage=small))
    assert [entry.lots for entry in world.entries[-2:]] == ["1:18400,2:20000,3:9600", "3:1600"]
    world.check()


def test_a_debt_is_paid_before_credit_becomes_a_lot() -> None:
    world = World()
    world.run(adjust(10, "a"), adjust(-30, "b"), adjust(5, "c"))
    assert (world.lots(), world.accounts["u"].balance_micros) == ({}, -15)
    world.run(adjust(40, "d"))
    assert world.lots() == {4: 25}
    world.check()


def test_expiry_is_booked_once_and_what_comes_back_later_never_expires_again() -> None:
    world = World()
    world.run(expiring(100, "p", 2), adjust(50, "x"), adjust(-30, "s"))
    world.now += 3 * HOURS
    world.run(ExpireLots("u"), ExpireLots("u"))
    expiry = world.entries[-1]
    assert (expiry.source, expiry.amount_micros, expiry.lots) == (EntrySource.EXPIRY, -70, "1:70")
    assert world.lots() == {2: 50}
    world.run(reverse(3))
    assert world.entries[-1].lots == ""
    assert world.lots() == {2: 50, 5: 30}
    assert world.books.lots[("u", 5)].expires_at is None
    world.now += 1000 * HOURS
    world.run(ExpireLots("u"))
    assert world.accounts["u"].balance_micros == 80
    assert world.accounts["u"].next_expiry_at is None
    world.check()


def test_with_grace_a_lot_reopens_for_a_while() -> None:
    world = World(Policy(lot_grace=timedelta(days=2)))
    world.run(expiring(100, "p", 2), adjust(-30, "s"))
    world.now += 3 * HOURS
    world.run(reverse(2))
    assert world.entries[-1].lots == "1:30"
    assert world.lots() == {1: 30}
    world.check()
    world.now += timedelta(days=3)
    world.run(ExpireLots("u"))
    assert world.accounts["u"].balance_micros == 0
    world.check()


def test_what_a_running_call_holds_does_not_expire_and_new_calls_can_not_use_it() -> None:
    world = World()
    world.run(expiring(163_200, "p", 1), open_hold(1), adjust(10, "x"))
    world.now += 2 * HOURS
    world.run(ExpireLots("u"))
    assert world.lots() == {1: 163_200, 2: 10}
    (refused,) = world.run(open_hold(2))
    assert isinstance(refused, HoldRefused)
    world.run(charge(1))
    assert world.accounts["u"].balance_micros == 163_200 + 10 - 35_200
    world.run(ExpireLots("u"))
    assert world.lots() == {2: 10}
    assert [entry.amount_micros for entry in world.entries if entry.source is EntrySource.EXPIRY] == [-128_000]
    world.check()


def test_every_step_of_an_order_is_allowed_and_kept() -> None:
    world = World()
    world.run(order(), pay(), refund())
    steps = [step.status for step in world.books.steps]
    assert steps == [OrderStatus.PENDING, OrderStatus.PAID, OrderStatus.CREDITED, OrderStatus.REFUNDED]
    assert all(pair in ALLOWED for pair in itertools.pairwise(steps))
    assert world.lots() == {}
    world.check()


def test_a_payment_is_credited_once_and_a_second_one_is_flagged() -> None:
    world = World()
    _, first, again, other = world.run(order(), pay(), pay(), pay(reference="r2"))
    assert first.order == again.order
    assert other.order.refund_due
    assert world.accounts["u"].total_recharged_micros == 1000
    for late, status in ((True, OrderStatus.CREDITED), (False, OrderStatus.CLOSED)):
        world = World(Policy(credit_late_payments=late))
        close = CloseOrder("u", UUID(int=1), "me", "")
        _, _, paid, closed = world.run(order(), close, pay(), close)
        assert paid.order.status is status
        assert paid.order.refund_due is not late
        assert isinstance(closed, OrderNotPayable) is late
        world.check()


def test_a_limit_counts_places_that_a_closed_order_gives_back() -> None:
    limited = replace(PRODUCT, purchase_limit=Limit(2, Period.DAY))
    world = World()
    answers = world.run(*[order(number, product=limited) for number in (1, 2, 3)])
    assert isinstance(answers[2], PurchaseLimitReached)
    world.run(CloseOrder("u", UUID(int=1), "me", ""))
    (again, too_many) = world.run(order(4, product=limited), order(5, product=limited))
    assert isinstance(again, OrderChanged)
    assert isinstance(too_many, PurchaseLimitReached)
    world.now += timedelta(days=1)
    (both, none) = world.run(order(6, product=limited, quantity=2), order(7, product=limited))
    assert isinstance(both, OrderChanged)
    assert isinstance(none, PurchaseLimitReached)
    assert isinstance(world.run(order(8, product=limited, quantity=3))[0], PurchaseLimitReached)


def test_a_refund_takes_the_orders_lot_and_what_policy_allows() -> None:
    for policy, spent_is_refundable in ((DEFAULT_POLICY, False), (Policy(refund_spent=True), True)):
        world = World(policy)
        world.run(order(), pay(), adjust(-400, "spend"), adjust(300, "other"))
        (whole,) = world.run(refund())
        if not spent_is_refundable:
            assert isinstance(whole, OrderNotRefundable)
            assert whole.metadata["refundable_micros"] == "600"
            part, again, rest, other = world.run(
                refund(250), refund(250), refund(350, "g"), replace(refund(250), reason="another")
            )
            assert (part.entry.lots, part.order.refunded_cent) == ("1:250", 247)
            assert again.entry == part.entry
            assert rest.order.status is OrderStatus.CREDITED
            assert isinstance(other, IdempotencyConflict)
        else:
            assert isinstance(whole, InsufficientCredit)
            world.run(SetOverdraftLimit("u", 100))
            (whole,) = world.run(refund())
            assert whole.entry.lots == "1:600,3:300"
            assert (whole.order.status, whole.order.refunded_cent) == (OrderStatus.REFUNDED, 990)
            assert world.accounts["u"].balance_micros == -100
        world.check()


def test_a_refund_never_takes_what_a_running_call_holds() -> None:
    world = World()
    world.run(order(product=replace(PRODUCT, credit_micros=163_200)), pay(), open_hold(1))
    assert isinstance(world.run(refund(1))[0], InsufficientCredit)
    world.run(ReleaseHold("u", UUID(int=1)))
    assert isinstance(world.run(refund(1))[0], OrderChanged)


def test_a_reward_is_decided_once_per_event() -> None:
    world = World()
    limited = {"limit": Limit(1, Period.TOTAL)}
    paid, over, again, off, other = world.run(
        reward("1", **limited), reward("2", **limited), reward("1", amount_micros=9, is_active=False, version=2),
        reward("3", is_active=False), replace(reward("1"), source_ref_id="another"),
    )
    assert [answer.entry.amount_micros for answer in (paid, over, again, off)] == [5, 0, 5, 0]
    assert over.entry.status is off.entry.status is EntryStatus.SKIPPED
    assert isinstance(other, IdempotencyConflict)
    world.check()


def test_an_entry_is_reversed_once_and_its_lots_get_it_back() -> None:
    world = World()
    world.run(adjust(30, "a"), adjust(50, "b"), adjust(-60, "s"))
    done, again, twice, of_reversal = world.run(reverse(3), reverse(3), reverse(3, "w"), reverse(4, "x"))
    assert (done.entry.lots, done.entry.reverses_seq) == ("2:30,1:30", 3)
    assert again.entry == done.entry
    assert isinstance(twice, TransactionNotReversible)
    assert isinstance(of_reversal, TransactionNotReversible)
    assert world.lots() == {1: 30, 2: 50}
    world.run(adjust(-50, "t"))
    (refused, forced) = world.run(reverse(2, "y"), reverse(2, "z", allow_negative=True))
    assert isinstance(refused, InsufficientCredit)
    assert forced.entry.amount_micros == -50
    assert world.accounts["u"].balance_micros == -20
    world.check()


def test_a_reversed_charge_leaves_the_sums_of_its_hour() -> None:
    world = World()
    world.run(adjust(10**6), charge(1), charge(2))
    world.run(reverse(2))
    ((_, sums),) = world.books.consumption.items()
    assert (sums.calls, sums.micros) == (2, 35_200)
    world.check()


def test_usage_is_priced_by_unit_and_later_when_there_was_no_price() -> None:
    units = with_rates(replace(rule("units"), unit_prices=(UnitPrice("second", 7),), model="voice"))
    used = replace(charge(1, model="voice"), usage=None, units=Units("second", Decimal("1.5")), call_id=None)
    world = World()
    unpriced, again = world.run(used, replace(used, units=Units("second", Decimal("1.50"))))
    assert (unpriced.status, again.status) == (RecordStatus.UNPRICED, RecordStatus.DUPLICATE)
    assert [issue.kind for issue in world.books.issues] == [IssueKind.UNPRICED]
    reprice = Reprice("u", used.event_id, "me")
    assert isinstance(world.run(reprice)[0], DomainError)
    priced, same = world.run(reprice, reprice, prices=PriceBook([rule(), units]))
    assert priced.entry.amount_micros == -1050
    assert priced.entry.flags == EntryFlag.REPRICED
    assert same.entry == priced.entry
    ((_, sums),) = world.books.consumption.items()
    assert (sums.calls, sums.micros) == (1, 1050)
    world.check()


def test_budgets_cap_what_they_match_and_begin_anew_with_their_period() -> None:
    world = World()
    world.run(adjust(10**9), open_hold(1, labels={"project": "a"}))
    (made,) = world.run(SetBudget("u", "b1", "project", "a", Period.DAY, 2 * 163_200))
    assert made.budget.held_micros == 163_200
    second, third, other = world.run(
        open_hold(2, labels={"project": "a"}, min_output_tokens=100),
        open_hold(3, labels={"project": "a"}, min_output_tokens=100), open_hold(4, labels={"project": "b"}),
    )
    assert isinstance(second, HoldGranted)
    assert isinstance(other, HoldGranted)
    assert (third.reason, third.budget.budget_id, third.resets_at) == ("BUDGET_EXCEEDED", "b1", NOW + timedelta(days=1))
    world.run(charge(1), ExpireHold("u", UUID(int=2)))
    assert world.books.budgets["b1"].spent_micros == 35_200
    world.now += timedelta(days=1)
    world.run(ReleaseHold("u", UUID(int=2)), charge(5, labels={"project": "a"}))
    budget = world.books.budgets["b1"]
    assert (budget.spent_micros, budget.held_micros) == (35_200, 0)
    world.run(DeleteBudget("u", "b1"))
    assert not world.accounts["u"].has_budgets
    world.check()


def test_a_low_balance_is_told_once_until_it_has_risen_well_above() -> None:
    world = World(Policy(low_balances=(100, 10), announce=True))
    world.run(adjust(1_000, "a"))
    told = []
    for number, amount in enumerate([-850, -60, -5, 20, -20, 35, -40, -80]):
        before = len(world.books.announced)
        world.run(adjust(amount, f"k{number}"))
        told.append((world.accounts["u"].balance_micros, world.accounts["u"].low_level))
        assert len(world.books.announced) == before + 1
    assert told == [(150, 0), (90, 1), (85, 1), (105, 1), (85, 1), (120, 0), (80, 1), (0, 2)]


def test_periods_are_calendar_ones_in_utc() -> None:
    assert period_start(Period.DAY, NOW + 5 * HOURS) == NOW
    assert period_start(Period.MONTH, NOW + timedelta(days=20)) == NOW
    assert period_end(Period.MONTH, NOW + timedelta(days=20)) == NOW.replace(month=7)
    assert period_end(Period.TOTAL, NOW) is None


def confirmed(order_: Order, **said: Any) -> Confirmation:
    document = {
        "order_id": str(order_.order_id), "amount_cent": order_.amount_cent, "currency": order_.currency,
        "reference": "r", **said,
    }
    payload = json.dumps(document)
    return Confirmation("prov", payload, signature_of("secret", timestamp=1000, payload=payload), 1000)


def test_a_confirmation_needs_one_of_the_secrets_a_fresh_time_and_this_order() -> None:
    world = World()
    (made,) = world.run(order())
    good = confirmed(made.order)
    check_signature(good, ["other", "secret"], now_seconds=1300)
    assert payment_reference(good, made.order) == "r"
    for secrets, now in ((["other"], 1000), ([], 1000), (["secret"], 1301), (["secret"], 699)):
        with pytest.raises(PaymentRefused):
            check_signature(good, secrets, now_seconds=now)
    for said in ({"amount_cent": 1}, {"currency": "X"}, {"order_id": "x"}, {"reference": ""}, {"reference": 5}):
        with pytest.raises(PaymentRefused):
            payment_reference(confirmed(made.order, **said), made.order)
    with pytest.raises(PaymentRefused):
        payment_reference(replace(good, payload="["), made.order)
    assert payment_reference(Confirmation("mock", "", "", 0), made.order) == "mock-CM-1"


@given(st.decimals(min_value=0, max_value=10**17, allow_nan=False, allow_infinity=False, places=9))
def test_amounts_keep_every_digit(amount: Decimal) -> None:
    text = amount_to_text(amount)
    assert amount_from_text(text) == amount
    assert amount_to_text(amount_from_text(text)) == text


@pytest.mark.parametrize("text", ["", "-1", "1e3", "NaN", ".5", "1.", "1" * 19, "1.0000000000001"])
def test_amounts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidField):
        amount_from_text(text)


FOREIGN = {
    "event_id": "e", "user_id": "u", "product_id": "voice", "usage_amount": 1.25, "unit_type": "Second",
}


@pytest.mark.parametrize(("document", "amount"), [
    (FOREIGN, "1.25"), ({**FOREIGN, "usage_amount": "1.250"}, "1.25"), ({**FOREIGN, "usage_amount": 3}, "3"),
    ({"eventId": "e", "userId": "u", "productId": "voice", "usageAmount": "1e2", "unitType": "second"}, "100"),
    ({**FOREIGN, "occurred_at": 1_780_000_000, "user_id": 42}, "1.25"),
    ({**FOREIGN, "occurred_at": "2026-01-31T12:00:00Z"}, "1.25"),
])
def test_json_is_read_as_foreign_producers_write_it(document: dict[str, Any], amount: str) -> None:
    read = usage_charge_from_bytes(json.dumps(document).encode(), is_json=True, now=NOW)
    assert read.units is not None
    assert (read.event_id, read.model, read.units.unit_type) == ("e", "voice", "second")
    assert amount_to_text(read.units.amount) == amount


def test_unknown_fields_of_foreign_json_are_kept_and_a_header_may_name_the_event() -> None:
    document = {**FOREIGN, "event_id": "", "traceId": "t", "usage_details": {"a": [1, "x"]}}
    read = usage_charge_from_bytes(json.dumps(document).encode(), is_json=True, now=NOW, event_id="from-header")
    assert (read.event_id, json.loads(read.details)) == ("from-header", {"traceId": "t", "a": [1, "x"]})


@pytest.mark.parametrize("value", [
    b"", b"{", b"[]", b"1", b'{"event_id": {}}', b"[" * 100_000, json.dumps({**FOREIGN, "usage_amount": True}).encode(),
    json.dumps({**FOREIGN, "event_id": ""}).encode(), json.dumps({**FOREIGN, "user_id": "a\nb"}).encode(),
    json.dumps({**FOREIGN, "occurred_at": "soon"}).encode(), json.dumps({**FOREIGN, "labels": [1]}).encode(),
    json.dumps({**FOREIGN, "usage_amount": "Infinity"}).encode(), b'{"usage_amount": NaN, "event_id": "e"}',
])
@pytest.mark.parametrize("is_json", [True, False])
def test_what_is_no_usage_event_is_refused_whatever_it_is(value: bytes, is_json: bool) -> None:
    with pytest.raises(InvalidField):
        usage_charge_from_bytes(value, is_json=is_json, now=NOW)


# Any sequence

USERS = st.sampled_from(["u", "v"])
NUMBERS = st.integers(1, 4)
AMOUNTS = st.integers(1, 300_000)
LABELS = st.sampled_from([{}, {"k": "a"}, {"k": "b"}])
LIMITED = replace(PRODUCT, purchase_limit=Limit(2, Period.DAY), credit_micros=50_000)
KEYS = st.integers(1, 60)
ANY = st.one_of(
    st.builds(lambda u, a, k, h: expiring(a, f"x{k}", h, u), USERS, AMOUNTS, KEYS, st.integers(1, 40)),
    st.builds(lambda u, a, k: adjust(a, f"a{k}", u), USERS, st.integers(-200_000, 200_000).filter(bool), KEYS),
    st.builds(lambda u, n, ls, least: open_hold(n, u, labels=ls, min_output_tokens=least), USERS, NUMBERS, LABELS,
              st.integers(0, 100)),
    st.builds(lambda u, n, out: charge(n, u, usage=Usage(input_tokens=10, output_tokens=out)), USERS, NUMBERS,
              st.integers(0, 300)),
    st.builds(lambda u, n: ReleaseHold(u, UUID(int=n)), USERS, NUMBERS),
    st.builds(lambda u, n: ExpireHold(u, UUID(int=n)), USERS, NUMBERS),
    st.builds(lambda u, n: order(n, user=u, product=LIMITED), USERS, NUMBERS),
    st.builds(lambda u, n, r: pay(n, r, u), USERS, NUMBERS, st.sampled_from(["r", "s"])),
    st.builds(lambda u, n: CloseOrder(u, UUID(int=n), "me", ""), USERS, NUMBERS),
    st.builds(lambda u, n, a, k: refund(a, f"f{k}", n, u), USERS, NUMBERS, st.integers(0, 60_000), KEYS),
    st.builds(lambda u, s, k, neg: reverse(s, f"v{k}", user=u, allow_negative=neg), USERS, st.integers(1, 12), KEYS,
              st.booleans()),
    st.builds(lambda u, k, on: reward(f"w{k}", u, is_active=on, limit=Limit(3, Period.DAY), amount_micros=20_000),
              USERS, KEYS, st.booleans()),
    st.builds(ExpireLots, USERS),
    st.builds(SetOverdraftLimit, USERS, st.sampled_from([0, 50_000])),
    st.builds(lambda u, k, a: SetBudget(u, f"b{u}{k}", "k" if k else "", "a" if k else "", Period.DAY, a), USERS,
              st.integers(0, 1), st.integers(0, 400_000)),
    st.builds(lambda u, k: DeleteBudget(u, f"b{u}{k}"), USERS, st.integers(0, 1)),
)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(st.tuples(st.lists(ANY, min_size=1, max_size=8), st.integers(0, 20)), max_size=12), st.booleans(),
    st.booleans(),
)
def test_the_books_stay_in_order_after_any_sequence(
    batches: list[tuple[list[Any], int]], grace: bool, refund_spent: bool
) -> None:
    """I1, I2, I3, I5, I9, sums and totals after every batch; nothing is half done by a command that is refused."""
    world = World(Policy(lot_grace=timedelta(hours=9) if grace else timedelta(0), refund_spent=refund_spent))
    for commands, hours in batches:
        for command in commands:
            account = world.accounts.get(command.user_id) or Account(command.user_id)
            holdable, holds = account.holdable_micros, len(world.holds)
            (answer,) = world.run(command)
            if isinstance(answer, HoldGranted) and len(world.holds) > holds:
                assert answer.hold.held_micros <= holdable
            if isinstance(answer, Booked | OrderChanged):
                kept = world.accounts.get(command.user_id) or Account(command.user_id)
                assert answer.account.balance_micros == kept.balance_micros
        world.check()
        check_budgets(world)
        world.now += hours * HOURS


def check_budgets(world: World) -> None:
    for budget in world.books.budgets.values():
        held = sum(
            hold.held_micros for hold in world.holds.values()
            if budget.budget_id in hold.budget_ids and hold.state.name == "OPEN"
        )
        assert budget.held_micros == held


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY, max_size=14))
def test_one_batch_is_the_same_as_one_by_one(commands: list[Any]) -> None:
    together, apart = World(), World()
    world_answers = together.run(*commands)
    one_by_one = [apart.run(command)[0] for command in commands]
    assert [type(answer) for answer in world_answers] == [type(answer) for answer in one_by_one]
    assert together.entries == apart.entries
    assert {user: together.lots(user) for user in together.accounts} == {user: apart.lots(user) for user in apart.accounts}



def corrected(number: int, input_tokens: int, output_tokens: int, **fields: Any) -> RecordCharge:
    usage = Usage(input_tokens, output_tokens=output_tokens, source=UsageSource.CORRECTED)
    return replace(charge(number, usage=usage), event_id=f"correction-{number}", **fields)


@pytest.mark.parametrize(("input_tokens", "output_tokens", "difference"), [(10, 30, 16_000), (10, 5, -24_000), (4, 20, -1_920)])
def test_a_correction_books_only_the_difference_once(input_tokens: int, output_tokens: int, difference: int) -> None:
    world = World()
    world.run(adjust(10**6), charge(1))
    (done,) = world.run(corrected(1, input_tokens, output_tokens))
    assert (done.status, done.credit_micros) == (RecordStatus.APPLIED, difference)
    entry = world.books.entries[-1]
    assert (entry.amount_micros, entry.flags) == (-difference, EntryFlag.CORRECTED)
    assert entry.event_id == f"correct:{charge(1).event_id}"
    again, other = world.run(corrected(1, input_tokens, output_tokens), corrected(1, 1, 1))
    assert (again.status, other.status) == (RecordStatus.DUPLICATE, RecordStatus.CONFLICT)
    ((_, sums),) = world.books.consumption.items()
    assert (sums.calls, sums.input_tokens, sums.output_tokens) == (1, input_tokens, output_tokens)
    assert sums.micros == 35_200 + difference
    assert world.lots() == {1: 10**6 - 35_200 - difference}
    world.check()


def test_a_correction_of_nothing_is_refused_and_one_of_the_charge_itself_is_a_charge() -> None:
    world = World()
    world.run(adjust(10**6))
    (refused,) = world.run(corrected(1, 5, 5))
    assert refused.status is RecordStatus.REJECTED
    (booked,) = world.run(replace(corrected(2, 10, 20), event_id=charge(2).event_id))
    assert (booked.status, booked.credit_micros) == (RecordStatus.APPLIED, 35_200)
    world.check()


def test_a_correction_of_a_charge_without_price_waits_for_the_price() -> None:
    world = World()
    world.run(adjust(10**6))
    world.run(charge(1), prices=PriceBook([]))
    (early,) = world.run(corrected(1, 10, 30))
    assert early.status is RecordStatus.REJECTED
    world.check()


def test_a_hold_is_sized_for_the_dearest_of_the_providers_that_may_serve_it() -> None:
    dear = with_rates(replace(rule("dear"), provider="OTHER", markup_bps=90_000))
    prices = PriceBook([rule(), dear])
    world = World()
    world.run(adjust(10**9))
    (granted,) = world.run(open_hold(1, other_providers=("OTHER", "LOCAL")), prices=prices)
    (alone,) = world.run(open_hold(2), prices=prices)
    assert granted.hold.held_micros > alone.hold.held_micros
    assert granted.quote == alone.quote
    assert granted.other_quotes["OTHER"].rule_id == "dear"
    assert granted.hold.held_micros == bound_micros(input_tokens=10, output_tokens=100, rates=dear.rates)
    world.check()
