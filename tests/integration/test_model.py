"""The real writer and readers on real PostgreSQL, step by step beside a model of the ledger (tests/support/ledger_model).

Every answer and every account is compared after each step, and the service's own proof must find nothing.
`make model N=2000` runs it long; the seed is printed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID, uuid5

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metering.usage import Usage
from servicekit.core.clock import ManualClock
from servicekit.core.errors import DomainError
from servicekit.core.faults import NoFaults
from servicekit.db.database import Database
from tests.support.databases import Databases
from tests.support.ledger_model import ORDER_CENTS, ORDER_CREDIT, ORDER_DAYS, PER_DAY, REWARD, LedgerModel
from tests.support.memory_store import FixedPrices
from tests.unit.tokenstore.test_book import NOW, PRICES
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.commands import (
    AdjustBalance,
    Booked,
    BudgetChanged,
    ChargeRecorded,
    CloseOrder,
    CreateOrder,
    GrantReward,
    HoldChanged,
    HoldGranted,
    HoldRefused,
    OpenHold,
    OrderChanged,
    PayOrder,
    RecordCharge,
    RefundOrder,
    ReleaseHold,
    ReverseEntry,
    SetBudget,
)
from tokenstore_service.domain.order import Product, ProductStatus
from tokenstore_service.domain.period import Limit, Period
from tokenstore_service.domain.reward import RewardRule
from tokenstore_service.domain.verification import Finding
from tokenstore_service.storage.book_store import PostgresBookStore
from tokenstore_service.storage.ledger_reader import PostgresLedgerReader
from tokenstore_service.storage.tables import SCHEMA
from tokenstore_service.usecases.sweep_books import expire_holds_once, expire_lots_once
from tokenstore_service.usecases.verify_ledger import verify_ledger
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.announcements import announcement_of
from tokenstore_service.wire.charges import issue_original

EXAMPLES = int(os.environ.get("CREDITMESH_MODEL_EXAMPLES", "25"))
SPACE = UUID(int=1)
PRODUCT = Product(
    "p", "p", "P", "", ORDER_CREDIT, ORDER_CENTS, ORDER_CENTS, "CNY", "", ProductStatus.ACTIVE, 0, ORDER_DAYS, None,
    NOW, NOW,
)
LIKE = RewardRule("like", 1, "L", REWARD, True, Limit(PER_DAY, Period.DAY), 0, "", NOW)
USERS = st.sampled_from(["a", "a", "a", "b"])
NUMBERS = st.integers(1, 4)
KEYS = st.integers(1, 300)


class Service:
    """The service's parts, on a loop of their own."""

    def __init__(self, url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock(NOW)
        self.writing = Database(url, schema=SCHEMA, application_name="model", pool_size=2, by_key_only=True)
        self.reading = Database(url, schema=SCHEMA, application_name="model-reads", pool_size=2)
        for database in (self.writing, self.reading):
            self.run(database.open())
        self.reader = PostgresLedgerReader(self.reading)
        self.writer = BookWriter(
            PostgresBookStore(self.writing, encode_issue=issue_original, announce=announcement_of),
            FixedPrices(PRICES), clock=self.clock, faults=NoFaults(),
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.writer.close())
        for database in (self.writing, self.reading):
            self.run(database.close())
        self.loop.close()


class LedgerMachine(RuleBasedStateMachine):
    """One step on both sides, then everything compared."""

    service: ClassVar[Service]
    numbers: ClassVar[Iterator[int]] = itertools.count(1)

    @initialize()
    def begin(self) -> None:
        self.prefix = f"m{next(self.numbers)}-"
        self.service.clock.set(NOW)
        self.model = LedgerModel(NOW)
        for user in ("a", "b"):
            self.adjust(user, 0, 400_000, None)
            self.adjust(user, 301, 150_000, 1)

    def name(self, user: str) -> str:
        return self.prefix + user

    def id_of(self, user: str, number: int) -> UUID:
        return uuid5(SPACE, f"{self.prefix}{user}{number}")

    def ask(self, command: Any, kind: type) -> Any:
        try:
            return self.service.run(self.service.writer.apply(command, kind))
        except DomainError as error:
            return "error", error.reason

    def booked(self, command: Any) -> Any:
        answer = self.ask(command, Booked)
        return ("ok", answer.entry.amount_micros) if isinstance(answer, Booked) else answer

    def order_state(self, command: Any) -> Any:
        answer = self.ask(command, OrderChanged)
        return ("ok", answer.order.status.name) if isinstance(answer, OrderChanged) else answer

    @rule(user=USERS, key=KEYS, amount=st.integers(-90_000, 200_000).filter(bool), days=st.sampled_from([None, 1, 1, 2]))
    def adjust(self, user: str, key: int, amount: int, days: int | None) -> None:
        until = self.model.now + timedelta(days=days) if days and amount > 0 else None
        command = AdjustBalance(self.name(user), amount, "r", "f", f"k{key}", expires_at=until)
        assert self.booked(command) == self.model.adjust(user, f"k{key}", amount, until)

    @rule(user=USERS, key=KEYS, back=st.integers(0, 6))
    def reverse(self, user: str, key: int, back: int) -> None:
        seq = max(1, self.model.user(user).seq - back)
        command = ReverseEntry(self.name(user), seq, "r", f"v{key}")
        assert self.booked(command) == self.model.reverse(user, f"v{key}", seq)

    @rule(user=USERS, key=KEYS)
    def reward(self, user: str, key: int) -> None:
        command = GrantReward(self.name(user), f"w{key}", LIKE, "ref")
        assert self.booked(command) == self.model.reward(user, f"w{key}")

    @rule(user=USERS, limit=st.sampled_from([200_000, 500_000, 10**9, 10**9]))
    def budget(self, user: str, limit: int) -> None:
        command = SetBudget(self.name(user), f"{self.prefix}{user}", "", "", Period.DAY, limit)
        answer = self.ask(command, BudgetChanged)
        assert ("ok", answer.budget.limit_micros) == self.model.budget(user, limit)

    @rule(user=USERS, number=NUMBERS, tokens=st.integers(1, 150), least=st.integers(0, 80),
          request=st.sampled_from(["", "r1", "r2"]), seconds=st.sampled_from([60, 7200]))
    def hold(self, user: str, number: int, tokens: int, least: int, request: str, seconds: int) -> None:
        least = min(least, tokens)
        ttl = timedelta(seconds=seconds)
        answer = self.ask(OpenHold(
            self.id_of(user, number), self.name(user), request, "chat", "LOCAL", "pro", 10, tokens, least, ttl
        ), HoldGranted | HoldRefused)
        if isinstance(answer, HoldGranted):
            told: Any = ("granted", answer.hold.max_output_tokens, answer.hold.held_micros)
        else:
            told = ("refused", answer.reason)
        assert told == self.model.hold(user, number, tokens, least, request, ttl)

    @rule(user=USERS, number=NUMBERS, output=st.sampled_from([0, 10, 10, 160]))
    def charge(self, user: str, number: int, output: int) -> None:
        answer = self.ask(RecordCharge(
            f"call {number}", self.name(user), self.id_of(user, number), "", "chat", "LOCAL", "pro",
            Usage(input_tokens=10, output_tokens=output), None, self.model.now,
        ), ChargeRecorded)
        assert (answer.status.name, answer.credit_micros) == self.model.charge(user, number, output)

    @precondition(lambda self: any(user.holds for user in self.model.users.values()))
    @rule(user=USERS, number=NUMBERS)
    def release(self, user: str, number: int) -> None:
        answer = self.ask(ReleaseHold(self.name(user), self.id_of(user, number)), HoldChanged)
        state = answer.state.name.lower() if answer.state else None
        assert state == self.model.release(user, number)

    @rule(user=USERS, number=NUMBERS)
    def order(self, user: str, number: int) -> None:
        command = CreateOrder(self.name(user), self.id_of(user, number), f"CM{number}", f"o{number}", PRODUCT, 1)
        assert self.order_state(command) == self.model.order(user, number)

    @precondition(lambda self: any(user.orders for user in self.model.users.values()))
    @rule(user=USERS, number=NUMBERS, reference=st.sampled_from(["p", "q"]))
    def pay(self, user: str, number: int, reference: str) -> None:
        command = PayOrder(self.name(user), self.id_of(user, number), "prov", reference)
        assert self.order_state(command) == self.model.pay(user, number, reference)

    @precondition(lambda self: any(user.orders for user in self.model.users.values()))
    @rule(user=USERS, number=NUMBERS)
    def close_order(self, user: str, number: int) -> None:
        command = CloseOrder(self.name(user), self.id_of(user, number), "me", "")
        assert self.order_state(command) == self.model.close(user, number)

    @precondition(lambda self: any(user.orders for user in self.model.users.values()))
    @rule(user=USERS, number=NUMBERS, micros=st.sampled_from([0, 10_000, 50_000]), key=KEYS)
    def refund(self, user: str, number: int, micros: int, key: int) -> None:
        command = RefundOrder(self.name(user), self.id_of(user, number), micros, "r", f"f{key}")
        assert self.order_state(command) == self.model.refund(user, number, micros, f"f{key}")

    @rule(seconds=st.sampled_from([-30, 1, 61, 3_600, 86_400, 86_400, 2 * 86_400, 32 * 86_400]))
    def time_passes(self, seconds: int) -> None:
        """Clocks jump, back as well."""
        self.service.clock.set(self.model.now + timedelta(seconds=seconds))
        self.model.now += timedelta(seconds=seconds)

    @rule()
    def sweep(self) -> None:
        service = self.service
        service.run(expire_holds_once(service.reader, service.writer, clock=service.clock))
        service.run(expire_lots_once(service.reader, service.writer, clock=service.clock))
        self.model.sweep()

    @invariant()
    def both_say_the_same(self) -> None:
        if not hasattr(self, "model"):
            return
        names = [self.name(user) for user in self.model.users]
        accounts = self.service.run(self.service.reader.accounts(names)) if names else {}
        for user, expected in self.model.users.items():
            account = accounts.get(self.name(user)) or Account(self.name(user))
            assert (account.balance_micros, account.held_micros, account.seq) == (
                expected.balance, expected.held, expected.seq
            )
            lots = self.service.run(self.service.reader.lots(self.name(user), with_closed=False, after=None, limit=500))
            assert {lot.seq: lot.remaining_micros for lot in lots} == {
                seq: lot["left"] for seq, lot in expected.lots.items() if lot["left"]
            }
            assert sum(lot.remaining_micros for lot in lots) == max(account.balance_micros, 0)
            assert self.service.run(self.findings(self.name(user))) == []

    async def findings(self, user: str) -> list[Finding]:
        return [piece async for piece in verify_ledger(self.service.reader, user) if isinstance(piece, Finding)]


@pytest.mark.timeout(0)
def test_the_service_is_its_model(databases: Databases) -> None:
    LedgerMachine.service = Service(databases.make("tokenstore"))
    machine = LedgerMachine.TestCase
    machine.settings = settings(
        max_examples=EXAMPLES, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    try:
        machine().runTest()
    finally:
        LedgerMachine.service.close()

