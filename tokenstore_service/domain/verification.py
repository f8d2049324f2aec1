"""Finding what is wrong with an account's books."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from tokenstore_service.domain.account import GENESIS_HASH, Account
from tokenstore_service.domain.consumption import Consumption, ConsumptionKey
from tokenstore_service.domain.entry import Entry, entry_hash
from tokenstore_service.domain.lot import Lot
from tokenstore_service.domain.replay import Replay


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong; seq 0 = the account itself."""

    user_id: str
    seq: int
    kind: str
    detail: str


def _remaining(lots: Iterable[Lot]) -> dict[int, tuple[int, datetime | None]]:
    return {lot.seq: (lot.remaining_micros, lot.expires_at) for lot in lots if lot.remaining_micros}


@dataclass(slots=True)
class ChainCheck:
    """Walks one account's entries in the order of seq; entries come in pieces, memory stays flat."""

    user_id: str
    replay: Replay = field(init=False)
    head_hash: bytes = GENESIS_HASH
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.replay = Replay(Account(self.user_id))

    def add(self, entry: Entry) -> None:
        made = self.replay.account
        if entry.seq != made.seq + 1:
            self._find(entry.seq, "SEQ_GAP", f"expected entry {made.seq + 1}, found {entry.seq}")
        if entry_hash(self.head_hash, entry) != entry.entry_hash:
            self._find(entry.seq, "HASH_MISMATCH", "the entry or the one before it is not as it was booked")
        wrong = self.replay.add(entry)
        if entry.balance_after_micros != made.balance_micros:
            self._find(
                entry.seq, "BALANCE_AFTER_MISMATCH",
                f"the entries sum to {made.balance_micros}, the entry says {entry.balance_after_micros}",
            )
            made.balance_micros = entry.balance_after_micros
        elif wrong:
            self._find(entry.seq, "LOT_MISMATCH", wrong)
        self.head_hash = entry.entry_hash

    def finish(
        self, account: Account, *, held_micros: int, lots: Iterable[Lot] = (),
        consumption: Mapping[ConsumptionKey, Consumption] | None = None,
    ) -> list[Finding]:
        """Compares with the account; `held_micros` is the sum of its open holds."""
        made = self.replay.account
        self._compare("HEAD_MISMATCH", "newest entry", made.seq, account.seq)
        if made.seq == account.seq and self.head_hash != account.head_hash:
            self._find(0, "HEAD_MISMATCH", "the hash of the newest entry is not the account's")
        self._compare("BALANCE_MISMATCH", "balance", made.balance_micros, account.balance_micros)
        self._compare("HELD_MISMATCH", "held", held_micros, account.held_micros)
        for name in ("recharged", "rewarded", "consumed"):
            field_name = f"total_{name}_micros"
            self._compare(
                "TOTALS_MISMATCH", f"total {name}", getattr(made, field_name), getattr(account, field_name)
            )
        self._compare_lots(lots)
        if consumption is not None and dict(consumption) != self.replay.consumption:
            self._find(0, "CONSUMPTION_MISMATCH", "the sums by hour are not those of the entries")
        return self.findings

    def _compare_lots(self, lots: Iterable[Lot]) -> None:
        stored = _remaining(lots)
        made = _remaining(self.replay.lots.values())
        for seq in sorted(stored.keys() | made.keys()):
            if stored.get(seq) != made.get(seq):
                self._find(0, "LOT_MISMATCH", f"lot {seq}: the books make {made.get(seq)}, found {stored.get(seq)}")

    def _compare(self, kind: str, what: str, computed: int, stored: int) -> None:
        if computed != stored:
            self._find(0, kind, f"{what}: the books make {computed}, the account says {stored}")

    def _find(self, seq: int, kind: str, detail: str) -> None:
        self.findings.append(Finding(self.user_id, seq, kind, detail))
