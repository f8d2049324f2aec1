"""Finding what is wrong with an account's books."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenstore_service.domain.account import GENESIS_HASH, Account
from tokenstore_service.domain.entry import Entry, EntrySource, entry_hash


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong; seq 0 = the account itself."""

    user_id: str
    seq: int
    kind: str
    detail: str


@dataclass(slots=True)
class ChainCheck:
    """Walks one account's entries in the order of seq; entries come in pieces, memory stays flat."""

    user_id: str
    seq: int = 0
    balance_micros: int = 0
    rewarded_micros: int = 0
    recharged_micros: int = 0
    consumed_micros: int = 0
    head_hash: bytes = GENESIS_HASH
    findings: list[Finding] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        if entry.seq != self.seq + 1:
            self._find(entry.seq, "SEQ_GAP", f"expected entry {self.seq + 1}, found {entry.seq}")
        self.balance_micros += entry.amount_micros
        if entry.balance_after_micros != self.balance_micros:
            self._find(
                entry.seq, "BALANCE_AFTER_MISMATCH",
                f"the entries sum to {self.balance_micros}, the entry says {entry.balance_after_micros}",
            )
            self.balance_micros = entry.balance_after_micros
        if entry_hash(self.head_hash, entry) != entry.entry_hash:
            self._find(entry.seq, "HASH_MISMATCH", "the entry or the one before it is not as it was booked")
        self._add_to_totals(entry)
        self.seq = entry.seq
        self.head_hash = entry.entry_hash

    def finish(self, account: Account, *, held_micros: int) -> list[Finding]:
        """Compares with the account; `held_micros` is the sum of its open holds."""
        self._compare("HEAD_MISMATCH", "newest entry", self.seq, account.seq)
        if self.seq == account.seq and self.head_hash != account.head_hash:
            self._find(0, "HEAD_MISMATCH", "the hash of the newest entry is not the account's")
        self._compare("BALANCE_MISMATCH", "balance", self.balance_micros, account.balance_micros)
        self._compare("HELD_MISMATCH", "held", held_micros, account.held_micros)
        self._compare("TOTALS_MISMATCH", "total recharged", self.recharged_micros, account.total_recharged_micros)
        self._compare("TOTALS_MISMATCH", "total rewarded", self.rewarded_micros, account.total_rewarded_micros)
        self._compare("TOTALS_MISMATCH", "total consumed", self.consumed_micros, account.total_consumed_micros)
        return self.findings

    def _add_to_totals(self, entry: Entry) -> None:
        if entry.amount_micros < 0:
            self.consumed_micros -= entry.amount_micros
        elif entry.source is EntrySource.PURCHASE:
            self.recharged_micros += entry.amount_micros
        else:
            self.rewarded_micros += entry.amount_micros

    def _compare(self, kind: str, what: str, computed: int, stored: int) -> None:
        if computed != stored:
            self._find(0, kind, f"{what}: the books make {computed}, the account says {stored}")

    def _find(self, seq: int, kind: str, detail: str) -> None:
        self.findings.append(Finding(self.user_id, seq, kind, detail))
