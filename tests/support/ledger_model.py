"""The ledger as one would explain it: dictionaries and plain sums, written without a look at the service's rules.

Every method is one operation and answers what the service must answer. Prices: 320 micro-credits for an input token,
1 600 for an output token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

INPUT, OUTPUT = 320, 1_600
ORDER_CREDIT, ORDER_CENTS, ORDER_DAYS = 50_000, 990, 31
REWARD = 20_000
PER_DAY = 3
FAR = "9999"


@dataclass
class User:
    """One account."""

    balance: int = 0
    held: int = 0
    seq: int = 0
    last: datetime | None = None
    limit: int | None = None
    capped: int = 0
    cap_day: Any = None
    events: dict[str, Any] = field(default_factory=dict)
    entries: dict[int, Any] = field(default_factory=dict)
    lots: dict[int, dict[str, Any]] = field(default_factory=dict)
    holds: dict[int, dict[str, Any]] = field(default_factory=dict)
    orders: dict[int, dict[str, Any]] = field(default_factory=dict)
    rewarded: dict[Any, int] = field(default_factory=dict)


class LedgerModel:
    """All accounts, at a time that the caller sets."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.users: dict[str, User] = {}

    def user(self, name: str) -> User:
        user = self.users.setdefault(name, User())
        for seq, lot in sorted(user.lots.items(), key=self._rank):
            if self._is_due(user, lot) and 0 < lot["left"] <= user.balance - user.held:
                self._enter(user, f"expiry {seq} {lot['until']}", "expiry", -lot["left"], first=seq)
        return user

    def _touch(self, user: User) -> None:
        """Time never goes back within an account, whatever the clock does."""
        user.last = max(user.last or self.now, self.now)

    def _is_due(self, user: User, lot: dict[str, Any]) -> bool:
        return bool(lot["until"]) and lot["until"] <= max(user.last or self.now, self.now)

    @staticmethod
    def _rank(item: Any) -> Any:
        seq, lot = item
        return lot["priority"], lot["until"].isoformat() if lot["until"] else FAR, seq

    def _enter(
        self, user: User, event: str, kind: str, amount: int, *, first: int = 0, priority: int = 0,
        until: datetime | None = None, back: Any = (), order: int = 0, about: Any = None,
    ) -> int:
        """One entry; moves lots as it must. Returns its number."""
        before = user.balance
        is_due = {seq for seq, lot in user.lots.items() if self._is_due(user, lot)}
        self._touch(user)
        user.seq += 1
        user.balance += amount
        used = []
        if amount < 0:
            left = -amount
            for seq, lot in sorted(user.lots.items(), key=lambda item: (item[0] != first, self._rank(item))):
                part = min(left, lot["left"])
                if part:
                    lot["left"] -= part
                    left -= part
                    used.append((seq, part))
        else:
            left = amount - min(amount, max(0, -before))
            for seq, most in reversed(list(back)):
                lot = user.lots[seq]
                part = min(most, left)
                if part and seq not in is_due:
                    lot["left"] += part
                    left -= part
            if left:
                user.lots[user.seq] = {"left": left, "priority": priority, "until": until, "order": order}
        user.entries[user.seq] = {
            "kind": kind, "amount": amount, "used": used, "event": event, "reversed": False, "about": about,
        }
        user.events[event] = user.seq
        return user.seq

    # Corrections

    def adjust(self, name: str, key: str, amount: int, until: datetime | None) -> Any:
        user = self.user(name)
        if key in user.events:
            entry = user.entries[user.events[key]]
            same = entry["kind"] == "adjust" and entry["amount"] == amount and entry["about"] in (until, None)
            return ("ok", entry["amount"]) if same else ("error", "IDEMPOTENCY_CONFLICT")
        debt = max(0, -user.balance)
        self._enter(user, key, "adjust", amount, priority=20, until=until if amount > 0 else None,
                    about=until if amount > debt else None)
        return "ok", amount

    def reverse(self, name: str, key: str, seq: int) -> Any:
        user = self.user(name)
        if key in user.events:
            entry = user.entries[user.events[key]]
            same = entry["kind"] == "reverse" and entry["about"] == seq
            return ("ok", entry["amount"]) if same else ("error", "IDEMPOTENCY_CONFLICT")
        entry = user.entries.get(seq)
        if entry is None:
            return "error", "TRANSACTION_NOT_FOUND"
        if entry["reversed"] or entry["kind"] not in ("adjust", "charge", "reward", "expiry") or not entry["amount"]:
            return "error", "TRANSACTION_NOT_REVERSIBLE"
        amount = -entry["amount"]
        if amount < 0 and -amount > user.balance - user.held:
            return "error", "INSUFFICIENT_CREDIT"
        entry["reversed"] = True
        source = user.lots[entry["used"][0][0]] if entry["used"] else {"priority": 20}
        self._enter(user, key, "reverse", amount, first=seq, priority=source["priority"], back=entry["used"], about=seq)
        return "ok", amount

    def reward(self, name: str, event: str) -> Any:
        user = self.user(name)
        if event in user.events:
            entry = user.entries[user.events[event]]
            return ("ok", entry["amount"]) if entry["kind"] == "reward" else ("error", "IDEMPOTENCY_CONFLICT")
        day = self.now.date()
        amount = REWARD if user.rewarded.get(day, 0) < PER_DAY else 0
        user.rewarded[day] = user.rewarded.get(day, 0) + (1 if amount else 0)
        self._enter(user, event, "reward", amount, priority=10)
        return "ok", amount

    # Calls

    def _cap(self, user: User) -> int | None:
        """What the day's budget leaves."""
        if user.limit is None:
            return None
        if user.cap_day is None or self.now.date() > user.cap_day:
            user.capped, user.cap_day = 0, self.now.date()
        return user.limit - user.capped - user.held

    def budget(self, name: str, limit: int) -> Any:
        user = self.user(name)
        self._cap(user)
        if user.limit is None:
            user.cap_day, user.capped = self.now.date(), 0
            self._touch(user)
        user.limit = limit
        return "ok", limit

    def hold(self, name: str, number: int, tokens: int, least: int, request: str, ttl: timedelta) -> Any:
        raw = self.users.setdefault(name, User())
        known = raw.holds.get(number)
        if known:
            if known["state"] == "open" and (known["asked"], known["request"]) == (tokens, request):
                return "granted", known["tokens"], known["micros"]
            return "refused", "IDEMPOTENCY_CONFLICT"
        for other in raw.holds.values():
            if request and other["request"] == request and other["state"] in ("open", "settled"):
                return "refused", "REQUEST_IN_FLIGHT" if other["state"] == "open" else "REQUEST_FINISHED"
        user = self.user(name)
        due = sum(lot["left"] for lot in user.lots.values() if self._is_due(user, lot))
        free, cap = user.balance - max(user.held, due), self._cap(user)
        room = free if cap is None else min(free, cap)
        needed = 10 * INPUT + min(max(least, 1), tokens) * OUTPUT
        if needed > room:
            return "refused", "INSUFFICIENT_CREDIT" if cap is None or free <= cap else "BUDGET_EXCEEDED"
        granted = min(tokens, (room - 10 * INPUT) // OUTPUT)
        micros = 10 * INPUT + granted * OUTPUT
        user.held += micros
        self._touch(user)
        user.holds[number] = {
            "state": "open", "micros": micros, "tokens": granted, "asked": tokens, "request": request,
            "until": self.now + ttl,
        }
        return "granted", granted, micros

    def charge(self, name: str, number: int, output: int) -> Any:
        raw = self.users.setdefault(name, User())
        event = f"call {number}"
        micros = 10 * INPUT + output * OUTPUT
        if event in raw.events:
            known = raw.entries[raw.events[event]]
            return ("DUPLICATE", -known["amount"]) if known["amount"] == -micros else ("CONFLICT", 0)
        user = self.user(name)
        hold = user.holds.get(number)
        self._enter(user, event, "charge", -micros)
        if user.limit is not None:
            self._cap(user)
            user.capped += micros
        if hold:
            if hold["state"] == "open":
                user.held -= hold["micros"]
            hold["state"] = "settled"
        return "APPLIED", micros

    def release(self, name: str, number: int) -> Any:
        raw = self.users.setdefault(name, User())
        hold = raw.holds.get(number)
        if not hold:
            return None
        if hold["state"] == "open":
            user = self.user(name)
            user.held -= hold["micros"]
            self._touch(user)
            hold["state"] = "released"
        return hold["state"]

    def sweep(self) -> None:
        """Holds first, then lots, as time has it."""
        for name, user in self.users.items():
            for hold in user.holds.values():
                if hold["state"] == "open" and hold["until"] <= self.now:
                    self.user(name)
                    user.held -= hold["micros"]
                    self._touch(user)
                    hold["state"] = "expired"
        for name, user in self.users.items():
            is_due = any(lot["until"] and lot["until"] <= self.now and lot["left"] for lot in user.lots.values())
            self.user(name)
            if is_due:
                self._touch(user)

    # Orders

    def order(self, name: str, number: int) -> Any:
        user = self.user(name)
        user.orders.setdefault(number, {"state": "PENDING", "paid": "", "refunded": 0, "seq": 0})
        return "ok", user.orders[number]["state"]

    def pay(self, name: str, number: int, reference: str) -> Any:
        raw = self.users.setdefault(name, User())
        if number not in raw.orders:
            return "error", "ORDER_NOT_FOUND"
        user = self.user(name)
        order = user.orders[number]
        if order["state"] == "PENDING" or (order["state"] == "CLOSED" and not order["paid"]):
            order["state"], order["paid"] = "CREDITED", reference
            order["seq"] = self._enter(
                user, f"order {number}", "purchase", ORDER_CREDIT, priority=30,
                until=self.now + timedelta(days=ORDER_DAYS), order=number,
            )
        return "ok", order["state"]

    def close(self, name: str, number: int) -> Any:
        raw = self.users.setdefault(name, User())
        if number not in raw.orders:
            return "error", "ORDER_NOT_FOUND"
        order = self.user(name).orders[number]
        if order["state"] not in ("PENDING", "CLOSED"):
            return "error", "ORDER_NOT_PAYABLE"
        order["state"] = "CLOSED"
        return "ok", "CLOSED"

    def refund(self, name: str, number: int, micros: int, key: str) -> Any:
        raw = self.users.setdefault(name, User())
        if number not in raw.orders:
            return "error", "ORDER_NOT_FOUND"
        user = self.user(name)
        order = user.orders[number]
        if key in user.events:
            entry = user.entries[user.events[key]]
            same = entry["kind"] == "refund" and entry["about"] == number and micros in (0, -entry["amount"])
            return ("ok", order["state"]) if same else ("error", "IDEMPOTENCY_CONFLICT")
        left = ORDER_CREDIT - order["refunded"]
        wanted = micros or left
        unspent = user.lots.get(order["seq"], {"left": 0})["left"]
        if order["state"] != "CREDITED" or wanted > min(left, unspent):
            return "error", "ORDER_NOT_REFUNDABLE"
        if wanted > user.balance - user.held:
            return "error", "INSUFFICIENT_CREDIT"
        self._enter(user, key, "refund", -wanted, first=order["seq"], about=number)
        order["refunded"] += wanted
        if wanted == left:
            order["state"] = "REFUNDED"
        return "ok", order["state"]
