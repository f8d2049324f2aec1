"""The arithmetic of the books: invariants after any sequence of commands."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from metering.charge import charge_micros
from metering.usage import Usage
from servicekit.core.errors import IdempotencyConflict
from tests.support.memory_store import MemoryBooks
from tests.unit.tokenstore.test_price_rule import rule
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.commands import (
    AdjustBalance,
    Booked,
    ChargeRecorded,
    ExpireHold,
    ExtendHold,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    OpenHold,
    RecordCharge,
    RecordStatus,
    ReleaseHold,
)
from tokenstore_service.domain.entry import Entry, EntryFlag, EntryStatus
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.lot import FOR_EVER
from tokenstore_service.domain.policy import DEFAULT_POLICY, Policy
from tokenstore_service.domain.price_rule import PriceBook
from tokenstore_service.domain.verification import ChainCheck

NOW = datetime(2026, 6, 1, tzinfo=UTC)
PRICES = PriceBook([rule()])


def open_hold(number: int, user: str = "u", **fields: Any) -> OpenHold:
    values: dict[str, Any] = {
        "request_id": "", "scene": "chat", "provider": "LOCAL", "model": "pro", "input_tokens": 10,
        "max_output_tokens": 100, "min_output_tokens": 1, "ttl": timedelta(seconds=60), **fields,
    }
    return OpenHold(hold_id=UUID(int=number), user_id=user, **values)


def charge(number: int, user: str = "u", **fields: Any) -> RecordCharge:
    values: dict[str, Any] = {
        "event_id": str(UUID(int=number)), "call_id": UUID(int=number), "request_id": "", "scene": "chat",
        "provider": "LOCAL", "model": "pro", "usage": Usage(input_tokens=10, output_tokens=20), "quote": None,
        "occurred_at": NOW, **fields,
    }
    return RecordCharge(user_id=user, **values)


def adjust(amount: int, key: str = "k", user: str = "u") -> AdjustBalance:
    return AdjustBalance(user, amount, "reason", "ref", key)


class World:
    """Books that outlive batches, as a database would keep them."""

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self.books = MemoryBooks()
        self.policy = policy
        self.now = NOW

    @property
    def accounts(self) -> dict[str, Account]:
        return self.books.accounts

    @property
    def holds(self) -> dict[tuple[str, UUID], Hold]:
        return self.books.holds

    @property
    def entries(self) -> list[Entry]:
        return self.books.entries

    def run(self, *commands: Any, prices: PriceBook = PRICES) -> list[Any]:
        return self.books.run(commands, now=self.now, prices=prices, policy=self.policy)

    def lots(self, user: str = "u") -> dict[int, int]:
        """What remains, by the lot's number."""
        return {lot.seq: lot.remaining_micros for lot in self.books.true_lots(user) if lot.remaining_micros}

    def check(self) -> None:
        """I1, I2, I5, I9, and that the sums by hour are those of the entries."""
        for user, account in self.accounts.items():
            chain = ChainCheck(user)
            for entry in self.entries:
                if entry.user_id == user:
                    chain.add(entry)
            held = sum(
                hold.held_micros for hold in self.holds.values()
                if hold.user_id == user and hold.state is HoldState.OPEN
            )
            sums = {key: value for key, value in self.books.consumption.items() if key[0] == user}
            lots = self.books.true_lots(user)
            assert chain.finish(account, held_micros=held, lots=lots, consumption=sums) == []
            assert sum(lot.remaining_micros for lot in lots) == max(account.balance_micros, 0)
            made = chain.replay
            made.finish()
            assert made.account.head_lot_micros == account.head_lot_micros
            assert made.account.head_lot == (account.head_lot if account.head_lot_micros else 0)
            expiries = [lot.expires_at for lot in lots if lot.remaining_micros and lot.expires_at]
            assert account.next_expiry_at is None or account.next_expiry_at <= min(expiries, default=FOR_EVER)
            assert not expiries or account.next_expiry_at is not None
            assert (
                account.total_recharged_micros + account.total_rewarded_micros - account.total_consumed_micros
                == account.balance_micros
            )
            events = [entry.event_id for entry in self.entries if entry.user_id == user]
            assert len(events) == len(set(events))


def test_a_hold_sets_credit_aside_and_a_charge_releases_it() -> None:
    world = World()
    (_, granted) = world.run(adjust(1_000_000), open_hold(1))
    assert isinstance(granted, HoldGranted)
    assert world.accounts["u"].held_micros == granted.hold.held_micros == 163_200
    (recorded,) = world.run(charge(1))
    assert recorded == ChargeRecorded(RecordStatus.APPLIED, 2, 35_200)
    assert world.accounts["u"].held_micros == 0
    assert world.accounts["u"].balance_micros == 1_000_000 - 35_200
    assert world.holds[("u", UUID(int=1))].state is HoldState.SETTLED
    world.check()


def test_a_hold_is_clipped_to_what_the_credit_affords_or_refused() -> None:
    world = World()
    (_, granted, refused) = world.run(adjust(100_000), open_hold(1), open_hold(2))
    assert isinstance(granted, HoldGranted)
    assert granted.hold.max_output_tokens == 60
    assert isinstance(refused, HoldRefused)
    assert (refused.reason, refused.available_micros) == ("INSUFFICIENT_CREDIT", 800)
    (whole,) = world.run(open_hold(3, user="v", min_output_tokens=100))
    assert isinstance(whole, HoldRefused)
    assert "v" not in world.accounts, "a refused hold makes no account"


def test_the_same_event_is_a_duplicate_and_other_content_a_recorded_conflict() -> None:
    world = World()
    answers = world.run(charge(1), charge(1), charge(1, usage=Usage(output_tokens=21)))
    assert [answer.status for answer in answers] == [
        RecordStatus.APPLIED, RecordStatus.DUPLICATE, RecordStatus.CONFLICT
    ]
    assert (len(world.entries), len(world.books.issues)) == (1, 1)
    # A redelivery tells another time and perhaps no quote; it is the same charge.
    (again,) = world.run(charge(1, occurred_at=NOW + timedelta(days=1), quote=rule().quote))
    assert again.status is RecordStatus.DUPLICATE


def test_usage_without_a_price_is_kept_unpriced() -> None:
    world = World()
    (answer,) = world.run(charge(1), prices=PriceBook([]))
    assert answer.status is RecordStatus.UNPRICED
    assert (world.entries[0].status, world.entries[0].amount_micros) == (EntryStatus.UNPRICED, 0)
    assert world.entries[0].usage == Usage(input_tokens=10, output_tokens=20)


def test_late_overrun_and_holdless_charges_are_booked_and_flagged() -> None:
    world = World()
    world.run(adjust(10**9), open_hold(1), open_hold(2, max_output_tokens=1))
    world.now += timedelta(seconds=61)
    world.run(ExpireHold("u", UUID(int=1)))
    answers = world.run(charge(1), charge(2), charge(3))
    assert all(answer.status is RecordStatus.APPLIED for answer in answers)
    flags = [entry.flags for entry in world.entries[1:]]
    assert flags == [EntryFlag.LATE, EntryFlag.OVERRUN, EntryFlag.NO_HOLD]
    world.check()


def test_a_hold_extended_meanwhile_does_not_expire() -> None:
    world = World()
    world.run(adjust(10**9), open_hold(1), ExtendHold("u", UUID(int=1), timedelta(seconds=120)))
    world.now += timedelta(seconds=61)
    (answer,) = world.run(ExpireHold("u", UUID(int=1)))
    assert isinstance(answer, HoldChanged)
    assert answer.state is HoldState.OPEN


def test_one_open_or_settled_hold_for_a_request() -> None:
    world = World()
    world.run(adjust(10**9))
    first, in_flight, other = world.run(
        open_hold(1, request_id="r", request_fingerprint=b"a"), open_hold(2, request_id="r", request_fingerprint=b"a"),
        open_hold(3, request_id="r", request_fingerprint=b"b"),
    )
    assert isinstance(first, HoldGranted)
    assert (in_flight.reason, other.reason) == ("REQUEST_IN_FLIGHT", "IDEMPOTENCY_CONFLICT")
    world.run(charge(1))
    (finished,) = world.run(open_hold(4, request_id="r", request_fingerprint=b"a"))
    assert (finished.reason, finished.existing_call_id) == ("REQUEST_FINISHED", str(UUID(int=1)))


def test_a_released_request_may_be_tried_again() -> None:
    world = World()
    world.run(adjust(10**9), open_hold(1, request_id="r"), ReleaseHold("u", UUID(int=1)))
    (again,) = world.run(open_hold(2, request_id="r"))
    assert isinstance(again, HoldGranted)
    world.check()


def test_the_same_hold_asked_again_is_the_first_answer() -> None:
    world = World()
    _, first, again, other = world.run(
        adjust(10**9), open_hold(1), open_hold(1), open_hold(1, max_output_tokens=7)
    )
    assert first == again
    assert isinstance(other, HoldRefused)
    assert other.reason == "IDEMPOTENCY_CONFLICT"


def test_an_adjustment_key_is_used_once() -> None:
    world = World()
    first, again, other = world.run(adjust(5), adjust(5), adjust(6))
    assert isinstance(first, Booked)
    assert isinstance(again, Booked)
    assert first.entry == again.entry
    assert isinstance(other, IdempotencyConflict)


def test_a_rate_that_the_books_do_not_know_is_not_believed() -> None:
    world = World()
    quote = rule().quote
    lied = replace(quote, rates=replace(quote.rates, output_pico=1))
    (answer,) = world.run(charge(1, quote=lied))
    assert answer.credit_micros == 35_200
    assert EntryFlag.QUOTE_MISMATCH in world.entries[0].flags


USERS = st.sampled_from(["u", "v", "w"])
NUMBERS = st.integers(1, 6)
COMMANDS = st.one_of(
    st.builds(lambda user, amount, key: adjust(amount, f"k{key}", user), USERS,
              st.integers(-10**6, 10**6).filter(bool), NUMBERS),
    st.builds(lambda user, number, most, least, request: open_hold(
        number, user, max_output_tokens=most, min_output_tokens=min(least, most), request_id=request
    ), USERS, NUMBERS, st.integers(0, 300), st.integers(0, 50), st.sampled_from(["", "r1", "r2"])),
    st.builds(lambda user, number, output, skip: charge(
        number, user, usage=Usage(input_tokens=10, output_tokens=output), skip_charge=skip
    ), USERS, NUMBERS, st.integers(0, 500), st.booleans()),
    st.builds(lambda user, number: ReleaseHold(user, UUID(int=number)), USERS, NUMBERS),
    st.builds(lambda user, number: ExpireHold(user, UUID(int=number)), USERS, NUMBERS),
    st.builds(lambda user, number: ExtendHold(user, UUID(int=number), timedelta(seconds=90)), USERS, NUMBERS),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(COMMANDS, min_size=1, max_size=6), st.integers(0, 80)), max_size=12))
def test_invariants_hold_after_any_sequence_of_batches(batches: list[tuple[list[Any], int]]) -> None:
    """I1, I2, I3 and I5 after every batch."""
    world = World()
    for commands, seconds in batches:
        for command in commands:
            account = world.accounts.get(command.user_id) or Account(command.user_id)
            available, known = account.holdable_micros, len(world.holds)
            (answer,) = world.run(command)
            if isinstance(answer, HoldGranted) and len(world.holds) > known:
                assert answer.hold.held_micros <= available
            if isinstance(answer, ChargeRecorded) and answer.status is RecordStatus.APPLIED:
                expected = 0 if command.skip_charge else charge_micros(command.usage, rule().rates)
                assert answer.credit_micros == expected
        world.check()
        world.now += timedelta(seconds=seconds)


def plain_account(account: Account) -> Account:
    """Without its version; an empty lot may still be its head or not."""
    return replace(account, version=0, head_lot=account.head_lot if account.head_lot_micros else 0)


def plain(answer: Any) -> str:
    """Without what is known only once the batch has ended."""
    if isinstance(answer, Booked):
        account = replace(answer.account, version=0, head_lot=0, head_lot_micros=0, next_expiry_at=None)
        answer = replace(answer, account=account)
    return repr(answer)


@given(st.lists(COMMANDS, max_size=20))
def test_a_batch_is_the_same_as_its_commands_one_by_one(commands: list[Any]) -> None:
    together, apart = World(), World()
    answers = together.run(*commands)
    one_by_one = [apart.run(command)[0] for command in commands]
    assert [plain(answer) for answer in answers] == [plain(answer) for answer in one_by_one]
    assert together.entries == apart.entries
    assert {user: plain_account(account) for user, account in together.accounts.items()} == {
        user: plain_account(account) for user, account in apart.accounts.items()
    }
    assert {user: together.lots(user) for user in together.accounts} == {user: apart.lots(user) for user in apart.accounts}
