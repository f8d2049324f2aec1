"""Reads: entries, holds, lots, sums, exports, and the explanation of a charge."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from uuid import UUID

from metering.charge import PICO_PER_MICRO, Line, lines_of, micros_of, unit_charge_micros
from servicekit.core.errors import InvalidField
from servicekit.core.page_token import decode_page_token, decode_time_token, encode_page_token
from tokenstore_service.domain.account import GENESIS_HASH
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.consumption import Consumption
from tokenstore_service.domain.correction import corrected_from_text
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource, EntryStatus
from tokenstore_service.domain.errors import HoldNotFound, TransactionNotFound
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.lot import Lot
from tokenstore_service.domain.period import EPOCH
from tokenstore_service.domain.price_rule import PriceRule
from tokenstore_service.usecases.ports import EntryFilter, LedgerReader, PriceRules


async def list_entries(
    reader: LedgerReader, wanted: EntryFilter, *, page_size: int, page_token: str
) -> tuple[list[Entry], str]:
    """A page, newest first, and the token of the next; stable while entries are added."""
    question = ("entries", wanted)
    key = decode_page_token(page_token, question=question, types=(int,))
    before_seq = int(key[0]) if key else None
    entries = await reader.entries(wanted, before_seq=before_seq, limit=page_size + 1)
    if len(entries) <= page_size:
        return entries, ""
    page = entries[:page_size]
    return page, encode_page_token([page[-1].seq], question=question)


async def get_entry(reader: LedgerReader, user_id: str, *, seq: int, event_id: str) -> Entry:
    """By seq when it is above 0, else by event id. Raises TransactionNotFound."""
    found = await (reader.entry_by_seq(user_id, seq) if seq else reader.entry_by_event(user_id, event_id))
    if found is None:
        raise TransactionNotFound("there is no such entry in this account")
    return found


@dataclass(frozen=True, slots=True)
class Explanation:
    """A charge recomputed from the books; `agrees` when the entry and the rule version say the same."""

    entry: Entry
    lines: list[Line]
    recomputed_micros: int
    agrees: bool


async def explain_charge(reader: LedgerReader, rules: PriceRules, user_id: str, event_id: str) -> Explanation:
    """Raises TransactionNotFound when the event is no charge of this account."""
    entry = await reader.entry_by_event(user_id, event_id)
    if entry is None or entry.source is not EntrySource.CHARGE:
        raise TransactionNotFound("there is no such charge in this account")
    if entry.status is not EntryStatus.APPLIED:
        return Explanation(entry, [], 0, agrees=entry.amount_micros == 0)
    rule = await rules.version(entry.price_rule_id, entry.price_rule_version)
    if entry.unit_pico is not None:
        return _explain_units(entry, entry.unit_pico, rule)
    assert entry.usage is not None
    assert entry.rates is not None
    lines = lines_of(entry.usage, entry.rates)
    if EntryFlag.CORRECTED in entry.flags:
        charged = corrected_from_text(entry.details).charged_micros
        lines.append(Line("charged_before", 0, 0, -charged * PICO_PER_MICRO))
    micros = micros_of(lines)
    agrees = micros == -entry.amount_micros and rule is not None and rule.rates == entry.rates
    return Explanation(entry, lines, micros, agrees)


def _explain_units(entry: Entry, unit_pico: int, rule: PriceRule | None) -> Explanation:
    amount = Decimal(entry.unit_amount)
    micros = unit_charge_micros(amount, unit_pico)
    line = Line(entry.unit_type, int(amount), unit_pico, int((amount * unit_pico).to_integral_value(ROUND_CEILING)))
    known = rule is not None and rule.prices_unit(entry.unit_type) and rule.unit_pico(entry.unit_type) == unit_pico
    return Explanation(entry, [line], micros, agrees=known and micros == -entry.amount_micros)


async def balance_at(reader: LedgerReader, user_id: str, at: datetime) -> Entry | None:
    """The newest entry booked at or before `at`; None = there was none."""
    return await reader.entry_at(user_id, at)


PERIODS = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30), "all": None}


@dataclass(frozen=True, slots=True)
class ConsumptionRead:
    """Sums since the beginning of an hour; None = since ever."""

    total: Consumption
    groups: list[tuple[str, Consumption]]
    since: datetime | None


async def read_consumption(
    reader: LedgerReader, user_id: str, *, period: str, group: str, now: datetime
) -> ConsumptionRead:
    """The current hour and those that the period reaches back to, whole hours, so that sums and ledger agree."""
    length = PERIODS[period or "24h"]
    since = None if length is None else (now - length).replace(minute=0, second=0, microsecond=0)
    groups = await reader.consumption(user_id, since=since, group=group)
    total = Consumption()
    for _, sums in groups:
        total = total.plus(sums)
    return ConsumptionRead(total, groups if group != "none" else [], since)


@dataclass(frozen=True, slots=True)
class Exported:
    """An entry, and the hash before it."""

    entry: Entry
    previous_hash: bytes


async def export_entries(
    reader: LedgerReader, user_id: str, *, after_seq: int = 0, after_user_id: str = ""
) -> AsyncIterator[Exported]:
    """Entries in the order of booking; an empty user_id = of all accounts, one after the other. Memory stays flat."""
    previous = GENESIS_HASH
    pieces = reader.audit([user_id] if user_id else None, after_user_id=after_user_id, after_seq=after_seq)
    async for piece in pieces:
        if not isinstance(piece, Entry):
            previous = GENESIS_HASH
            continue
        if piece.seq > after_seq:
            yield Exported(piece, previous)
        previous = piece.entry_hash


async def list_lots(
    reader: LedgerReader, user_id: str, *, with_closed: bool, page_size: int, page_token: str
) -> tuple[list[Lot], str]:
    """In the order in which they are spent."""
    question = ("lots", user_id, with_closed)
    key = decode_page_token(page_token, question=question, types=(int, str, int))
    after = None
    if key is not None:
        try:
            after = (int(key[0]), datetime.fromisoformat(str(key[1])), int(key[2]))
        except ValueError:
            raise InvalidField.of("page_token", "is not a token of this list") from None
    lots = await reader.lots(user_id, with_closed=with_closed, after=after, limit=page_size + 1)
    if len(lots) <= page_size:
        return lots, ""
    priority, expires_at, seq = lots[page_size - 1].rank
    return lots[:page_size], encode_page_token([int(priority), expires_at.isoformat(), seq], question=question)


async def list_budgets(
    reader: LedgerReader, user_id: str, *, page_size: int, page_token: str, now: datetime
) -> tuple[list[Budget], str]:
    """Oldest first, each as it counts now."""
    question = ("budgets", user_id)
    after = decode_time_token(page_token, question=question)
    budgets = await reader.budgets(user_id, after=after, limit=page_size + 1)
    for budget in budgets:
        budget.roll(now)
    if len(budgets) <= page_size:
        return budgets, ""
    last = budgets[page_size - 1]
    return budgets[:page_size], encode_page_token([last.created_at.isoformat(), last.budget_id], question=question)


async def get_hold(reader: LedgerReader, user_id: str, hold_id: UUID) -> Hold:
    """Raises HoldNotFound."""
    hold = await reader.hold(user_id, hold_id)
    if hold is None:
        raise HoldNotFound("there is no such hold in this account")
    return hold


async def list_holds(
    reader: LedgerReader, user_id: str, *, state: HoldState, page_size: int, page_token: str
) -> tuple[list[Hold], str]:
    """Holds of one account, newest first."""
    question = ("holds", user_id, int(state))
    before = _decode_hold_key(page_token, question)
    holds = await reader.holds_of_user(user_id, state=state, before=before, limit=page_size + 1)
    return _page_of(holds, page_size, question, lambda hold: hold.opened_at)


async def list_expired_holds(
    reader: LedgerReader, *, origin: str, since: datetime | None, page_size: int, page_token: str
) -> tuple[list[Hold], str]:
    """Expired holds of all accounts, oldest closed first."""
    question = ("expired", origin, since)
    after = _decode_hold_key(page_token, question)
    holds = await reader.expired_holds(
        origin=origin, since=since or EPOCH, after=after, limit=page_size + 1
    )
    return _page_of(holds, page_size, question, lambda hold: hold.closed_at or hold.expires_at)


def _decode_hold_key(page_token: str, question: Sequence[object]) -> tuple[datetime, UUID] | None:
    key = decode_time_token(page_token, question=question)
    try:
        return (key[0], UUID(key[1])) if key else None
    except ValueError:
        raise InvalidField.of("page_token", "is not a token of this list") from None


def _page_of(
    holds: list[Hold], size: int, question: Sequence[object], time_of: Callable[[Hold], datetime]
) -> tuple[list[Hold], str]:
    if len(holds) <= size:
        return holds, ""
    last = holds[size - 1]
    return holds[:size], encode_page_token([time_of(last).isoformat(), str(last.hold_id)], question=question)
