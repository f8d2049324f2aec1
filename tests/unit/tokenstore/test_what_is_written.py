"""Every field that a hold, an entry, an issue, a sum says."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import pytest

from metering.charge import Rates
from metering.usage import Usage, UsageSource
from tests.unit.tokenstore.test_book import NOW, World, adjust, charge, open_hold
from tests.unit.tokenstore.test_money import order, pay, refund, reverse, reward
from tests.unit.tokenstore.test_price_rule import rule
from tokenstore_service.domain.account import GENESIS_HASH
from tokenstore_service.domain.commands import (
    Booked,
    ExtendHold,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    IssueKind,
    RecordStatus,
)
from tokenstore_service.domain.consumption import Consumption
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource, EntryStatus, entry_hash
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.order import OrderStatus
from tokenstore_service.domain.price_rule import PriceBook

SPECIAL = rule("special", scene="course", provider="P", model="big", output_price=32_000_000)
BOOK = PriceBook([rule(), SPECIAL])
USAGE = Usage(100, 10, 5, 50, 7, 0, 0, UsageSource.ESTIMATED)
FIELDS = {"scene": "course", "provider": "P", "model": "big"}


def test_a_hold_says_what_it_is_for_and_when_it_ended() -> None:
    world = World()
    _, granted = world.run(
        adjust(10**9), open_hold(1, request_id="r", request_fingerprint=b"f", origin="o", labels={"k": "v"}, **FIELDS),
        prices=BOOK,
    )
    assert isinstance(granted, HoldGranted)
    assert granted.quote == SPECIAL.quote
    expected = Hold(
        user_id="u", hold_id=UUID(int=1), request_id="r", scene="course", provider="P", model="big",
        held_micros=10 * 320 + 100 * 3200, input_tokens=10, max_output_tokens=100, asked_output_tokens=100,
        price_rule_id="special", price_rule_version=1, request_fingerprint=b"f", skip_charge=False, origin="o",
        state=HoldState.OPEN, opened_at=NOW, expires_at=NOW + timedelta(seconds=60), labels={"k": "v"},
    )
    assert world.holds[("u", UUID(int=1))] == expected
    world.now += timedelta(seconds=5)
    world.run(charge(1), prices=BOOK)
    assert world.holds[("u", UUID(int=1))] == replace(
        expected, state=HoldState.SETTLED, closed_at=NOW + timedelta(seconds=5)
    )


def test_a_hold_without_a_price_or_a_charge_sets_nothing_aside() -> None:
    world = World()
    (free,) = world.run(open_hold(1), prices=PriceBook([]))
    assert isinstance(free, HoldGranted)
    assert (free.quote, free.hold.held_micros, free.hold.price_rule_id, free.hold.price_rule_version) == (None, 0, "", 0)
    (skipped,) = world.run(open_hold(2, skip_charge=True))
    assert isinstance(skipped, HoldGranted)
    assert (skipped.hold.held_micros, skipped.hold.max_output_tokens, skipped.hold.price_rule_id) == (0, 100, "r")


def test_an_extended_hold_never_ends_earlier() -> None:
    world = World()
    world.run(adjust(10**9), open_hold(1))
    later, earlier, unknown = world.run(
        ExtendHold("u", UUID(int=1), timedelta(seconds=90)), ExtendHold("u", UUID(int=1), timedelta(seconds=10)),
        ExtendHold("u", UUID(int=9), timedelta(seconds=10)),
    )
    at = NOW + timedelta(seconds=90)
    assert later == earlier == HoldChanged(UUID(int=1), HoldState.OPEN, at)
    assert unknown == HoldChanged(UUID(int=9), None, None)
    assert world.holds[("u", UUID(int=1))].expires_at == at


def test_an_entry_says_everything_about_its_charge() -> None:
    world = World()
    said = {"request_id": "r", "conversation_id": "c", "usage": USAGE, "occurred_at": NOW - timedelta(hours=3), **FIELDS}
    _, _, recorded = world.run(adjust(10**9), open_hold(1), charge(1, **said), prices=BOOK)
    micros = (85 * 320_000_000 + 10 * 80_000_000 + 5 * 320_000_000 + 50 * 3_200_000_000) // 10**6
    assert (recorded.status, recorded.seq, recorded.credit_micros) == (RecordStatus.APPLIED, 2, micros)
    first, entry = world.entries
    expected = Entry(
        user_id="u", seq=2, event_id=str(UUID(int=1)), source=EntrySource.CHARGE, amount_micros=-micros,
        balance_after_micros=10**9 - micros, status=EntryStatus.APPLIED, occurred_at=NOW - timedelta(hours=3),
        booked_at=NOW, scene="course", model="big", provider="P", usage=USAGE, price_rule_id="special",
        price_rule_version=1, rates=SPECIAL.rates, call_id=str(UUID(int=1)), request_id="r", conversation_id="c",
        flags=EntryFlag.OVERRUN, lots=f"1:{micros}",
    )
    expected.entry_hash = entry_hash(first.entry_hash, expected)
    assert entry == expected
    assert first.entry_hash == entry_hash(GENESIS_HASH, replace(first, entry_hash=b""))


def test_what_is_skipped_or_unpriced_keeps_what_is_known() -> None:
    world = World()
    world.run(charge(1, skip_charge=True), charge(2, quote=replace(rule().quote, rule_id="gone")))
    skipped, unpriced = world.entries
    assert (skipped.status, skipped.price_rule_id, skipped.amount_micros) == (EntryStatus.SKIPPED, "r", 0)
    assert (unpriced.status, unpriced.rates) == (EntryStatus.UNPRICED, None)
    assert unpriced.flags == EntryFlag.QUOTE_MISMATCH | EntryFlag.NO_HOLD


@pytest.mark.parametrize(("rates", "flags"), [
    (rule().rates, EntryFlag(0)), (Rates(), EntryFlag(0)), (replace(rule().rates, input_pico=1), EntryFlag.QUOTE_MISMATCH),
])
def test_a_quote_is_believed_only_as_far_as_the_books_know_it(rates: Rates, flags: EntryFlag) -> None:
    world = World()
    world.run(adjust(10**9), open_hold(1), charge(1, quote=replace(rule().quote, rates=rates)))
    assert world.entries[-1].flags == flags
    assert world.entries[-1].rates == rule().rates


def test_sums_hold_each_kind_of_token() -> None:
    world = World()
    world.run(charge(1, usage=USAGE), charge(2, usage=USAGE), charge(3, usage=USAGE, scene="x", skip_charge=True))
    each = charge(1, usage=USAGE)
    hour = each.occurred_at.replace(minute=0, second=0, microsecond=0)
    micros = -world.entries[0].amount_micros
    assert world.books.consumption == {
        ("u", hour, "chat", "pro"): Consumption(2, 200, 20, 100, 14, 2 * micros),
        ("u", hour, "x", "pro"): Consumption(1, 100, 10, 50, 7, 0),
    }
    assert Consumption(1, 2, 3, 4, 5, 6).plus(Consumption(1, 1, 1, 1, 1, 1)) == Consumption(2, 3, 4, 5, 6, 7)


def test_issues_say_what_where_and_why() -> None:
    world = World()
    other = charge(1, usage=Usage(output_tokens=21))
    late = charge(2)
    world.run(adjust(10**9), charge(1), other, open_hold(2, max_output_tokens=1, min_output_tokens=0))
    world.run(late)
    conflict, overrun = world.books.issues
    assert (conflict.user_id, conflict.event_id, conflict.kind, conflict.seq) == ("u", other.event_id, IssueKind.CONFLICT, 2)
    assert conflict.original is other
    assert other.event_id in conflict.detail
    assert (overrun.kind, overrun.seq, overrun.original) == (IssueKind.OVERRUN, 3, late)
    assert "35200" in overrun.detail


def test_a_charge_that_would_leave_the_range_is_kept_and_not_booked() -> None:
    world = World()
    world.run(adjust(-9 * 10**18 + 10))
    (answer,) = world.run(charge(1))
    assert (answer.status, answer.seq) == (RecordStatus.REJECTED, 0)
    assert [(issue.kind, issue.seq) for issue in world.books.issues] == [(IssueKind.REJECTED, 0)]
    assert len(world.entries) == 1


def test_orders_refunds_and_reversals_say_whose_they_are() -> None:
    world = World()
    made, paid = world.run(replace(order(), actor="shop"), replace(pay(), actor="bank"))
    assert (made.order.status, made.order.credit_micros, made.order.amount_cent) == (OrderStatus.PENDING, 1000, 990)
    entry = world.entries[0]
    assert (entry.event_id, entry.order_id, entry.reference) == (f"order:{UUID(int=1)}", str(UUID(int=1)), "CM-1")
    assert (entry.actor, entry.description, entry.lot_source) == ("bank", "P", EntrySource.PURCHASE)
    assert entry.lot_expires_at == NOW + timedelta(days=31)
    assert (paid.order.credit_seq, paid.order.paid_at, paid.order.credited_at) == (1, NOW, NOW)
    assert [(step.number, step.actor) for step in world.books.steps] == [(1, "shop"), (2, "bank"), (3, "bank")]
    (first,) = world.run(replace(refund(300), actor="desk"))
    (again, rest) = world.run(refund(300), refund(0, "g"))
    assert again.entry == first.entry
    assert again.account.balance_micros == 700
    assert (first.entry.actor, first.entry.order_id, first.order.refunded_cent) == ("desk", str(UUID(int=1)), 297)
    assert (rest.entry.amount_micros, rest.order.refunded_micros, rest.order.refunded_cent) == (-700, 1000, 990)
    world.run(adjust(-5, "n"))
    (back,) = world.run(replace(reverse(4), actor="desk"))
    assert isinstance(back, Booked)
    assert (back.entry.reference, back.entry.actor, back.entry.description) == ("n", "desk", "reason")
    (earned,) = world.run(replace(reward("e", validity_days=3), actor="forum"))
    assert (earned.entry.scene, earned.entry.actor, earned.entry.reference) == ("like", "forum", "post")
    assert earned.entry.lot_expires_at == NOW + timedelta(days=3)


def test_a_refusal_says_what_was_needed_and_what_there_was() -> None:
    world = World()
    _, refused = world.run(adjust(5_000), open_hold(1, min_output_tokens=10))
    assert refused == HoldRefused("INSUFFICIENT_CREDIT", needed_micros=19_200, available_micros=5_000)
