"""What can be asked of the books, and the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import IntEnum
from uuid import UUID

from metering.charge import Quote
from metering.usage import Usage, UsageSource
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.budget import Budget
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.hold import Hold, HoldState
from tokenstore_service.domain.order import Order, Product
from tokenstore_service.domain.period import Period
from tokenstore_service.domain.reward import RewardRule


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Set credit aside for a call. Tokens >= 0, min_output_tokens <= max_output_tokens."""

    hold_id: UUID
    user_id: str
    request_id: str
    scene: str
    provider: str
    model: str
    input_tokens: int
    max_output_tokens: int
    min_output_tokens: int
    ttl: timedelta
    request_fingerprint: bytes = b""
    skip_charge: bool = False
    origin: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    other_providers: tuple[str, ...] = ()
    """They may serve the call too: the hold is sized for the dearest."""


@dataclass(frozen=True, slots=True)
class HoldGranted:
    """The hold, and the prices that were quoted; None, or left out of the others, when no rule matches."""

    hold: Hold
    quote: Quote | None
    other_quotes: Mapping[str, Quote] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HoldRefused:
    """Why not: INSUFFICIENT_CREDIT, BUDGET_EXCEEDED, REQUEST_IN_FLIGHT, REQUEST_FINISHED or IDEMPOTENCY_CONFLICT.

    With BUDGET_EXCEEDED `budget` is the cap that binds, and `resets_at` when it counts from zero again; None = never.
    """

    reason: str
    needed_micros: int = 0
    available_micros: int = 0
    existing_call_id: str = ""
    budget: Budget | None = None
    resets_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ExtendHold:
    """Move the expiry of an open hold to now + ttl, never back."""

    user_id: str
    hold_id: UUID
    ttl: timedelta


@dataclass(frozen=True, slots=True)
class ReleaseHold:
    """Give an open hold back without a charge."""

    user_id: str
    hold_id: UUID


@dataclass(frozen=True, slots=True)
class ExpireHold:
    """Close an open hold whose time has run out."""

    user_id: str
    hold_id: UUID


@dataclass(frozen=True, slots=True)
class HoldChanged:
    """A hold's state now; None when there is no such hold."""

    hold_id: UUID
    state: HoldState | None
    at: datetime | None


@dataclass(frozen=True, slots=True)
class Units:
    """What another service used: an exact amount of seconds, characters, images, ..."""

    unit_type: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class RecordCharge:
    """Book what a call used. Without a quote it is priced at occurred_at.

    Either `usage` in tokens, or `units` of another service's product, which `model` then names.
    """

    event_id: str
    user_id: str
    call_id: UUID | None
    request_id: str
    scene: str
    provider: str
    model: str
    usage: Usage | None
    quote: Quote | None
    occurred_at: datetime
    skip_charge: bool = False
    conversation_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    units: Units | None = None
    details: str = ""

    @property
    def corrects(self) -> str:
        """The event id of the charge whose usage this replaces; empty = it is a charge of its own."""
        usage = self.usage
        if usage is None or usage.source is not UsageSource.CORRECTED or self.call_id is None:
            return ""
        return str(self.call_id)


class RecordStatus(IntEnum):
    """What became of a charge; numbers as on the wire."""

    APPLIED = 1
    DUPLICATE = 2
    CONFLICT = 3
    UNPRICED = 4
    REJECTED = 5


@dataclass(frozen=True, slots=True)
class ChargeRecorded:
    """The entry's number and micro-credits; 0 without an entry."""

    status: RecordStatus
    seq: int = 0
    credit_micros: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Reprice:
    """Charge usage that is in the books without a price, now that a rule matches."""

    user_id: str
    event_id: str
    actor: str


@dataclass(frozen=True, slots=True)
class AdjustBalance:
    """An operator's correction; the idempotency key is the entry's event id."""

    user_id: str
    amount_micros: int
    reason: str
    reference: str
    idempotency_key: str
    actor: str = ""
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReverseEntry:
    """Undo an entry by another one. `allow_negative`: even if what it gave was spent or is held."""

    user_id: str
    seq: int
    reason: str
    idempotency_key: str
    actor: str = ""
    allow_negative: bool = False


@dataclass(frozen=True, slots=True)
class GrantReward:
    """Give what the rule says for an event, once per event, whatever the rule says later."""

    user_id: str
    event_id: str
    rule: RewardRule
    source_ref_id: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class ExpireLots:
    """Book the end of credit whose validity is over."""

    user_id: str


@dataclass(frozen=True, slots=True)
class SetOverdraftLimit:
    """How far below zero holds may take an account, micro-credits >= 0."""

    user_id: str
    overdraft_limit_micros: int


@dataclass(frozen=True, slots=True)
class Booked:
    """An entry, and the account after it."""

    entry: Entry
    account: Account


@dataclass(frozen=True, slots=True)
class AccountChanged:
    """The account as it is now."""

    account: Account


@dataclass(frozen=True, slots=True)
class CreateOrder:
    """Order `quantity` of a product as it is now."""

    user_id: str
    order_id: UUID
    order_no: str
    idempotency_key: str
    product: Product
    quantity: int
    actor: str = ""


@dataclass(frozen=True, slots=True)
class PayOrder:
    """A provider's confirmed payment: paid and credited at once."""

    user_id: str
    order_id: UUID
    provider: str
    reference: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class CloseOrder:
    """End an order that was not paid."""

    user_id: str
    order_id: UUID
    actor: str
    note: str


@dataclass(frozen=True, slots=True)
class RefundOrder:
    """Take back credit of an order whose money is given back; 0 = all that was not refunded yet."""

    user_id: str
    order_id: UUID
    credit_micros: int
    reason: str
    idempotency_key: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class OrderChanged:
    """The order, the entry that this booked, and the account after it."""

    order: Order
    entry: Entry | None
    account: Account


@dataclass(frozen=True, slots=True)
class SetBudget:
    """Make or change the cap of a user, or of a user and label, in a period."""

    user_id: str
    budget_id: str
    label_key: str
    label_value: str
    period: Period
    limit_micros: int


@dataclass(frozen=True, slots=True)
class DeleteBudget:
    """Remove a cap."""

    user_id: str
    budget_id: str


@dataclass(frozen=True, slots=True)
class BudgetChanged:
    """The cap as it is now, or was."""

    budget: Budget


class IssueKind(IntEnum):
    """Why a charge is not simply applied; numbers as on the wire."""

    CONFLICT = 1
    UNPRICED = 2
    REJECTED = 3
    OVERRUN = 4
    LATE = 5
    UNDECODABLE = 6


@dataclass(frozen=True, slots=True)
class ChargeIssue:
    """Something about a charge for people to look at; `seq` is its entry, 0 without one."""

    user_id: str
    event_id: str
    kind: IssueKind
    detail: str
    seq: int
    original: RecordCharge


Command = (
    OpenHold | ExtendHold | ReleaseHold | ExpireHold | RecordCharge | Reprice | AdjustBalance | ReverseEntry
    | GrantReward | ExpireLots | SetOverdraftLimit | CreateOrder | PayOrder | CloseOrder | RefundOrder | SetBudget
    | DeleteBudget
)
Answer = (
    HoldGranted | HoldRefused | HoldChanged | ChargeRecorded | Booked | AccountChanged | OrderChanged | BudgetChanged
)
