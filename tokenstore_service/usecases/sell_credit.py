"""Products, orders, payments, refunds."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol
from uuid import UUID

from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict, InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_page_token, encode_page_token
from tokenstore_service.domain.commands import CloseOrder, CreateOrder, OrderChanged, PayOrder, RefundOrder
from tokenstore_service.domain.errors import OrderNotFound, PaymentRefused, ProductNotFound
from tokenstore_service.domain.order import Order, OrderStatus, OrderStep, Product, ProductStatus
from tokenstore_service.domain.payment import MOCK, Confirmation, check_signature, payment_reference
from tokenstore_service.usecases.ports import Catalog, OrderReader
from tokenstore_service.usecases.write_books import BookWriter


class PaymentSecrets(Protocol):
    """The providers' secrets as they are configured now; several while they are rotated, none = not known."""

    def of(self, provider: str) -> Sequence[str]: ...


async def create_product(catalog: Catalog, product: Product, *, idempotency_key: str) -> Product:
    """Raises IdempotencyConflict for another product under the key, InvalidField for a taken sku."""
    stored = await catalog.add_product(product, idempotency_key=idempotency_key)
    if stored is None:
        raise InvalidField.of("product.sku", "is taken by another product")
    alike = replace(
        product, product_id=stored.product_id, created_at=stored.created_at, updated_at=stored.updated_at
    )
    if alike != stored:
        raise IdempotencyConflict("the idempotency key was used for another product", product_id=stored.product_id)
    return stored


async def change_product(
    catalog: Catalog, product_id: str, changes: Mapping[str, object], *, now: datetime
) -> Product:
    """Raises ProductNotFound."""
    changed = await catalog.change_product(product_id, changes, now=now)
    if changed is None:
        raise ProductNotFound("there is no such product")
    return changed


async def list_products(
    catalog: Catalog, status: ProductStatus, *, page_size: int, page_token: str
) -> tuple[list[Product], str]:
    """By sort_order, then id."""
    question = ("products", int(status))
    key = decode_page_token(page_token, question=question, types=(int, str))
    after = (int(key[0]), str(key[1])) if key else None
    found = await catalog.products(status, after=after, limit=page_size + 1)
    if len(found) <= page_size:
        return found, ""
    last = found[page_size - 1]
    return found[:page_size], encode_page_token([last.sort_order, last.product_id], question=question)


def order_number(order_id: UUID, at: datetime) -> str:
    """Readable and as unique as the id: its date, and the id's 80 random and time bits that vary, in base 32."""
    return f"CM{at:%Y%m%d}-{base64.b32encode(order_id.bytes[6:]).decode()}"


async def create_order(
    catalog: Catalog, writer: BookWriter, *, user_id: str, product_id: str, quantity: int, idempotency_key: str,
    actor: str, ids: IdSource, clock: Clock,
) -> Order:
    """Raises ProductNotFound, ProductNotAvailable, PurchaseLimitReached, IdempotencyConflict."""
    product = await catalog.product(product_id)
    if product is None:
        raise ProductNotFound("there is no such product")
    order_id = ids.new_id()
    done = await writer.apply(CreateOrder(
        user_id=user_id, order_id=order_id, order_no=order_number(order_id, clock.now()),
        idempotency_key=idempotency_key, product=product, quantity=quantity, actor=actor,
    ), OrderChanged)
    return done.order


async def get_order(orders: OrderReader, order_id: UUID, user_id: str = "") -> Order:
    """An empty user_id = any. Raises OrderNotFound, for another user's too."""
    order = await orders.order(order_id)
    if order is None or (user_id and order.user_id != user_id):
        raise OrderNotFound("there is no such order")
    return order


async def order_history(orders: OrderReader, order: Order) -> list[OrderStep]:
    return await orders.steps(order.user_id, order.order_id)


async def list_orders(
    orders: OrderReader, user_id: str, status: OrderStatus | None, *, page_size: int, page_token: str
) -> tuple[list[Order], str]:
    """Newest first; an empty user_id = those whose payment is to be given back."""
    question = ("orders", user_id, status)
    key = decode_page_token(page_token, question=question, types=(str,))
    try:
        before = UUID(str(key[0])) if key else None
    except ValueError:
        raise InvalidField.of("page_token", "is not a token of this list") from None
    if user_id:
        found = await orders.orders_of_user(user_id, status, before=before, limit=page_size + 1)
    else:
        found = await orders.orders_to_refund(before=before, limit=page_size + 1)
    if len(found) <= page_size:
        return found, ""
    return found[:page_size], encode_page_token([str(found[page_size - 1].order_id)], question=question)


async def confirm_payment(
    orders: OrderReader, writer: BookWriter, secrets: PaymentSecrets, *, order_id: UUID, confirmation: Confirmation,
    allow_mock: bool, actor: str, clock: Clock,
) -> OrderChanged:
    """Raises PaymentRefused before it says whether the order exists, then OrderNotFound."""
    if confirmation.provider == MOCK:
        if not allow_mock:
            raise PaymentRefused("the provider is not known")
    else:
        known = secrets.of(confirmation.provider)
        if not known:
            raise PaymentRefused("the provider is not known")
        check_signature(confirmation, known, now_seconds=clock.now().timestamp())
    order = await get_order(orders, order_id)
    return await writer.apply(PayOrder(
        user_id=order.user_id, order_id=order_id, provider=confirmation.provider,
        reference=payment_reference(confirmation, order), actor=actor,
    ), OrderChanged)


async def close_order(
    orders: OrderReader, writer: BookWriter, *, order_id: UUID, user_id: str, reason: str, actor: str
) -> Order:
    """Raises OrderNotFound, OrderNotPayable."""
    order = await get_order(orders, order_id, user_id)
    done = await writer.apply(CloseOrder(order.user_id, order_id, actor, reason), OrderChanged)
    return done.order


async def refund_order(
    orders: OrderReader, writer: BookWriter, *, order_id: UUID, credit_micros: int, reason: str, idempotency_key: str,
    actor: str,
) -> OrderChanged:
    """Raises OrderNotFound, OrderNotRefundable, InsufficientCredit, IdempotencyConflict."""
    order = await get_order(orders, order_id)
    return await writer.apply(RefundOrder(
        order.user_id, order_id, credit_micros, reason, idempotency_key, actor
    ), OrderChanged)
