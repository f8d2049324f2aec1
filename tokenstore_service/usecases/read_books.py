"""Reads: balances, entries, holds, and the explanation of a charge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from metering.charge import Line, lines_of, micros_of
from servicekit.core.clock import Clock
from servicekit.core.errors import InvalidField
from servicekit.core.page_token import decode_page_token, decode_time_token, encode_page_token
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.entry import Entry, EntrySource, EntryStatus
from tokenstore_service.domain.errors import HoldNotFound, TransactionNotFound
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.price_rule import EPOCH
from tokenstore_service.usecases.ports import EntryFilter, LedgerReader, PriceRules

MIN_SEQ_WAIT_SECONDS = 5.0
MIN_SEQ_POLL_SECONDS = 0.02


async def get_balance(reader: LedgerReader, user_id: str, *, min_seq: int, clock: Clock) -> Account:
    """The account; an unknown one reads as zero. Waits for `min_seq`, at most 5 s, then answers what there is."""
    give_up_at = clock.monotonic() + MIN_SEQ_WAIT_SECONDS
    while True:
        account = (await reader.accounts([user_id])).get(user_id) or Account(user_id)
        if account.seq >= min_seq or clock.monotonic() >= give_up_at:
            return account
        await asyncio.sleep(MIN_SEQ_POLL_SECONDS)


async def get_balances(reader: LedgerReader, user_ids: Sequence[str]) -> list[Account]:
    known = await reader.accounts(user_ids)
    return [known.get(user_id) or Account(user_id) for user_id in user_ids]


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
    if entry is None or entry.source is not EntrySource.CHARGE or entry.usage is None:
        raise TransactionNotFound("there is no such charge in this account")
    if entry.rates is None or entry.status is not EntryStatus.APPLIED:
        return Explanation(entry, [], 0, agrees=entry.amount_micros == 0)
    lines = lines_of(entry.usage, entry.rates)
    micros = micros_of(lines)
    rule = await rules.version(entry.price_rule_id, entry.price_rule_version)
    agrees = micros == -entry.amount_micros and rule is not None and rule.rates == entry.rates
    return Explanation(entry, lines, micros, agrees)


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
