"""Products and orders: what is sold, and the states of a sale."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from uuid import UUID

from tokenstore_service.domain.period import Limit


class ProductStatus(IntEnum):
    """Whether a product can be ordered; numbers as on the wire."""

    ACTIVE = 1
    INACTIVE = 2


@dataclass(frozen=True, slots=True)
class Product:
    """What can be bought. `validity_days` 0 = the credit does not expire."""

    product_id: str
    sku: str
    name: str
    description: str
    credit_micros: int
    price_cent: int
    original_price_cent: int
    currency: str
    badge: str
    status: ProductStatus
    sort_order: int
    validity_days: int
    purchase_limit: Limit | None
    created_at: datetime
    updated_at: datetime


class OrderStatus(IntEnum):
    """Where an order stands; numbers as on the wire."""

    PENDING = 1
    PAID = 2
    CREDITED = 3
    CLOSED = 4
    REFUNDED = 5


ALLOWED = {
    (OrderStatus.PENDING, OrderStatus.PAID),
    (OrderStatus.PENDING, OrderStatus.CLOSED),
    (OrderStatus.PAID, OrderStatus.CREDITED),
    (OrderStatus.CLOSED, OrderStatus.PAID),  # a late payment, where the policy credits it
    (OrderStatus.CREDITED, OrderStatus.REFUNDED),
}


@dataclass(frozen=True, slots=True)
class OrderStep:
    """One line of an order's history."""

    user_id: str
    order_id: UUID
    number: int
    status: OrderStatus
    at: datetime
    actor: str
    note: str


@dataclass(slots=True)
class Order:
    """A sale. Credits in micro-credits, money in hundredths of the currency; `product` is as it was when ordered."""

    user_id: str
    order_id: UUID
    order_no: str
    idempotency_key: str
    status: OrderStatus
    product: Product
    quantity: int
    credit_micros: int
    amount_cent: int
    currency: str
    created_at: datetime
    payment_provider: str = ""
    payment_reference: str = ""
    paid_at: datetime | None = None
    credited_at: datetime | None = None
    closed_at: datetime | None = None
    refunded_at: datetime | None = None
    refunded_micros: int = 0
    refunded_cent: int = 0
    credit_seq: int = 0
    refund_due: bool = False
    steps: int = 0
