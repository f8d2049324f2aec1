"""Orders: PENDING -> PAID -> CREDITED -> REFUNDED, or PENDING -> CLOSED; payment and credit are one step."""

from __future__ import annotations

import copy
from datetime import timedelta

from servicekit.core.errors import IdempotencyConflict
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, limited_slot, order_event, snapshot
from tokenstore_service.domain.commands import CloseOrder, CreateOrder, OrderChanged, PayOrder, RefundOrder
from tokenstore_service.domain.credit_rules import require_free
from tokenstore_service.domain.entry import Entry, EntrySource
from tokenstore_service.domain.errors import (
    OrderNotFound,
    OrderNotPayable,
    OrderNotRefundable,
    ProductNotAvailable,
    PurchaseLimitReached,
)
from tokenstore_service.domain.lot import LotPriority
from tokenstore_service.domain.order import Order, OrderStatus, ProductStatus
from tokenstore_service.domain.period import period_end


def create_order(book: Book, command: CreateOrder) -> OrderChanged:
    """An order that costs nothing is credited at once: there is nothing to confirm."""
    account = book.account(command.user_id)
    product = command.product
    earlier = next((
        order for order in book.orders.values()
        if order.user_id == command.user_id and order.idempotency_key == command.idempotency_key
    ), None)
    if earlier is not None:
        if (earlier.product.product_id, earlier.quantity) != (product.product_id, command.quantity):
            raise IdempotencyConflict("the idempotency key was used for another order", order_id=str(earlier.order_id))
        return OrderChanged(copy.copy(earlier), None, snapshot(account))
    if product.status is not ProductStatus.ACTIVE:
        raise ProductNotAvailable("the product is no longer sold", product_id=product.product_id)
    credit = product.credit_micros * command.quantity
    book.require_range(account, credit)
    limit, slot = product.purchase_limit, limited_slot(command, book.now)
    if limit is not None and slot is not None and not book.take_slots(
        slot, command.quantity, limit.count, str(command.order_id)
    ):
        resets_at = period_end(limit.period, book.now)
        raise PurchaseLimitReached(
            f"at most {limit.count} of this product in a period", user_id=command.user_id,
            resets_at=resets_at.isoformat() if resets_at else "never",
        )
    order = Order(
        user_id=command.user_id, order_id=command.order_id, order_no=command.order_no,
        idempotency_key=command.idempotency_key, status=OrderStatus.PENDING, product=product,
        quantity=command.quantity, credit_micros=credit, amount_cent=product.price_cent * command.quantity,
        currency=product.currency, created_at=book.now,
    )
    book.new_orders[(order.user_id, order.order_id)] = order
    book.step_order(order, OrderStatus.PENDING, actor=command.actor, note="")
    entry = None
    if order.amount_cent == 0:
        entry = _credit(book, account, order, provider="", reference="", actor=command.actor)
    return OrderChanged(copy.copy(order), entry, snapshot(account))


def _order(book: Book, command: PayOrder | CloseOrder | RefundOrder) -> Order:
    order = book.orders.get((command.user_id, command.order_id))
    if order is None:
        raise OrderNotFound("there is no such order")
    return order


def _credit(book: Book, account: Account, order: Order, *, provider: str, reference: str, actor: str) -> Entry:
    days = order.product.validity_days
    order.payment_provider, order.payment_reference = provider, reference
    order.paid_at = order.credited_at = book.now
    book.step_order(order, OrderStatus.PAID, actor=actor, note=f"{provider} {reference}".strip())
    entry = book.book_income(
        account, order.credit_micros, lot_source=EntrySource.PURCHASE, lot_priority=LotPriority.PURCHASE,
        lot_expires_at=book.now + timedelta(days=days) if days else None, source=EntrySource.PURCHASE,
        event_id=order_event(order.order_id), order_id=str(order.order_id), reference=order.order_no,
        description=order.product.name, actor=actor,
    )
    order.credit_seq = entry.seq
    book.step_order(order, OrderStatus.CREDITED, actor=actor, note=f"entry {entry.seq}")
    return entry


def pay_order(book: Book, command: PayOrder) -> OrderChanged:
    """The same payment again is the same answer; another payment of a paid order is kept and flagged for refund."""
    order = _order(book, command)
    account = book.account(command.user_id)
    payment = (command.provider, command.reference)
    known = (order.payment_provider, order.payment_reference)
    if order.status is OrderStatus.PENDING:
        book.require_range(account, order.credit_micros)
        entry = _credit(
            book, account, order, provider=command.provider, reference=command.reference, actor=command.actor
        )
        return OrderChanged(copy.copy(order), entry, snapshot(account))
    if payment == known or (order.status is not OrderStatus.CLOSED and order.amount_cent == 0):
        return OrderChanged(copy.copy(order), None, snapshot(account))
    if order.status is OrderStatus.CLOSED and not order.payment_reference and book.policy.credit_late_payments:
        book.require_range(account, order.credit_micros)
        entry = _credit(
            book, account, order, provider=command.provider, reference=command.reference, actor=command.actor
        )
        return OrderChanged(copy.copy(order), entry, snapshot(account))
    if not order.payment_reference:
        order.payment_provider, order.payment_reference = payment
        order.paid_at = book.now
    order.refund_due = True
    book.step_order(
        order, order.status, actor=command.actor,
        note=f"{command.provider} {command.reference}: paid when {order.status.name}, to be refunded",
    )
    return OrderChanged(copy.copy(order), None, snapshot(account))


def close_order(book: Book, command: CloseOrder) -> OrderChanged:
    order = _order(book, command)
    account = book.account(command.user_id)
    if order.status is OrderStatus.CLOSED:
        return OrderChanged(copy.copy(order), None, snapshot(account))
    if order.status is not OrderStatus.PENDING:
        raise OrderNotPayable(f"the order is {order.status.name}, only a pending one can be closed")
    order.closed_at = book.now
    book.freed_holders.append((order.user_id, str(order.order_id)))
    book.step_order(order, OrderStatus.CLOSED, actor=command.actor, note=command.note)
    return OrderChanged(copy.copy(order), None, snapshot(account))


def refund_order(book: Book, command: RefundOrder) -> OrderChanged:
    """Takes credit back, out of the order's own lot first. What was spent is refused, or taken down to the overdraft
    limit where the policy allows it; what a running call holds is never taken."""
    order = _order(book, command)
    account = book.account(command.user_id)
    earlier = book.entries.get((command.user_id, command.idempotency_key))
    if earlier is not None:
        asked = command.credit_micros or -earlier.amount_micros
        same = (
            earlier.source is EntrySource.REFUND and earlier.order_id == str(order.order_id)
            and earlier.amount_micros == -asked and earlier.description == command.reason
        )
        if not same:
            raise IdempotencyConflict("the idempotency key was used for another entry of this account", seq=earlier.seq)
        return OrderChanged(copy.copy(order), earlier, snapshot(account))
    if order.status is not OrderStatus.CREDITED:
        raise OrderNotRefundable(f"the order is {order.status.name}, only a credited one can be refunded")
    left = order.credit_micros - order.refunded_micros
    micros = command.credit_micros or left
    lot = book.lot(account.user_id, order.credit_seq)
    unspent = lot.remaining_micros if lot else 0
    refundable = left if book.policy.refund_spent else min(left, unspent)
    if micros > refundable:
        raise OrderNotRefundable(
            "not so much of the order can be given back", refundable_micros=refundable, unspent_micros=unspent
        )
    require_free(account, micros, allow_overdraft=book.policy.refund_spent)
    is_whole = micros == left
    cents = order.amount_cent * micros // order.credit_micros
    cents = order.amount_cent - order.refunded_cent if is_whole else min(cents, order.amount_cent - order.refunded_cent)
    entry = book.book_expense(
        account, micros, first=(order.credit_seq,), source=EntrySource.REFUND, event_id=command.idempotency_key,
        order_id=str(order.order_id), reference=order.order_no, description=command.reason, actor=command.actor,
    )
    order.refunded_micros += micros
    order.refunded_cent += cents
    order.refunded_at = book.now
    book.step_order(
        order, OrderStatus.REFUNDED if is_whole else order.status, actor=command.actor,
        note=f"{micros} micro-credits, {cents} cents: entry {entry.seq}",
    )
    return OrderChanged(copy.copy(order), entry, snapshot(account))
