"""An account made again from nothing but its entries: what the books must show, and what they can be rebuilt from."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import add_to_totals
from tokenstore_service.domain.consumption import Consumption, ConsumptionKey, add_entry, consumption_key, new_sums
from tokenstore_service.domain.entry import Entry, EntrySource
from tokenstore_service.domain.lot import Lot, LotPriority, uses_from_text


@dataclass(slots=True)
class Replay:
    """Entries go in by seq; `account`, `lots` (empty ones too) and `consumption` are what they make."""

    account: Account
    lots: dict[int, Lot] = field(default_factory=dict)
    remaining_micros: int = 0
    _sums: dict[ConsumptionKey, list[int]] = field(default_factory=dict)

    @property
    def consumption(self) -> dict[ConsumptionKey, Consumption]:
        return {key: Consumption(*sums) for key, sums in self._sums.items()}

    def add(self, entry: Entry) -> str:
        """Returns what is wrong with the entry's lots; empty = nothing."""
        account = self.account
        before = account.balance_micros
        account.seq = entry.seq
        account.head_hash = entry.entry_hash
        account.updated_at = entry.booked_at
        account.balance_micros = before + entry.amount_micros
        add_to_totals(account, entry)
        if entry.counts_as_consumption:
            add_entry(self._sums.setdefault(consumption_key(entry), new_sums()), entry)
        if entry.form == 1:
            return self._without_lots(entry)
        wrong = self._expense(entry) if entry.amount_micros < 0 else self._income(entry, before)
        if not wrong and self.remaining_micros != max(account.balance_micros, 0):
            wrong = f"lots have {self.remaining_micros}, the balance is {account.balance_micros}"
        return wrong

    def finish(self) -> None:
        """Sets what the account knows of its lots."""
        open_lots = [lot for lot in self.lots.values() if lot.remaining_micros > 0]
        head = min(open_lots, key=lambda lot: lot.rank, default=None)
        self.account.head_lot = head.seq if head else 0
        self.account.head_lot_micros = head.remaining_micros if head else 0
        self.account.next_expiry_at = min((lot.expires_at for lot in open_lots if lot.expires_at), default=None)

    def _without_lots(self, entry: Entry) -> str:
        """Before there were lots, an account had one for all its credit, as old as its newest entry."""
        self.remaining_micros = max(self.account.balance_micros, 0)
        self.lots = {}
        if self.remaining_micros:
            self.lots[entry.seq] = Lot(
                user_id=entry.user_id, seq=entry.seq, source=EntrySource.ADJUSTMENT, priority=LotPriority.ADJUSTMENT,
                granted_micros=self.remaining_micros, remaining_micros=self.remaining_micros, expires_at=None,
                order_id="", granted_at=entry.booked_at,
            )
        return ""

    def _expense(self, entry: Entry) -> str:
        for seq, micros in uses_from_text(entry.lots):
            lot = self.lots.get(seq)
            if lot is None or lot.remaining_micros < micros:
                return f"uses {micros} of lot {seq}, which has {lot.remaining_micros if lot else 'never been'}"
            lot.remaining_micros -= micros
            self.remaining_micros -= micros
        return ""

    def _income(self, entry: Entry, before: int) -> str:
        left = entry.amount_micros - min(max(-before, 0), entry.amount_micros)
        for seq, micros in uses_from_text(entry.lots):
            lot = self.lots.get(seq)
            if lot is None or micros > left:
                return f"gives {micros} back to lot {seq}, which {'is too much' if lot else 'has never been'}"
            if lot.is_due(entry.booked_at):
                lot.expires_at = entry.lot_expires_at
            lot.remaining_micros += micros
            self.remaining_micros += micros
            left -= micros
        if left:
            self.lots[entry.seq] = Lot(
                user_id=entry.user_id, seq=entry.seq, source=entry.lot_source or EntrySource.ADJUSTMENT,
                priority=entry.lot_priority or LotPriority.ADJUSTMENT, granted_micros=left, remaining_micros=left,
                expires_at=entry.lot_expires_at, order_id=entry.order_id, granted_at=entry.booked_at,
            )
            self.remaining_micros += left
        return ""
