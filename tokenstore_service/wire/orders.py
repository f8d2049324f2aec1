"""Products, orders and rewards as they travel."""

from __future__ import annotations

from datetime import datetime

from creditmesh.tokenstore.v1 import budget_service_pb2, order_service_pb2, reward_service_pb2

from servicekit.core.errors import InvalidField
from servicekit.rpc.times import optional_timestamp_to_proto, timestamp_to_proto
from tokenstore_service.domain.order import Order, OrderStep, Product, ProductStatus
from tokenstore_service.domain.period import Limit, Period
from tokenstore_service.domain.reward import RewardRule

DEFAULT_CURRENCY = "CNY"


def limit_from_proto(message: order_service_pb2.PurchaseLimit) -> Limit:
    return Limit(message.count, Period(message.period))


def limit_to_proto(limit: Limit | None) -> order_service_pb2.PurchaseLimit | None:
    if limit is None:
        return None
    return order_service_pb2.PurchaseLimit(
        count=limit.count, period=budget_service_pb2.Period.ValueType(limit.period)
    )


def product_from_proto(message: order_service_pb2.Product, *, product_id: str, now: datetime) -> Product:
    """A new product. Raises InvalidField."""
    if not message.sku:
        raise InvalidField.of("product.sku", "must have 1 to 64 characters")
    if message.credit_micros < 1:
        raise InvalidField.of("product.credit_micros", "must be at least 1")
    return Product(
        product_id=product_id, sku=message.sku, name=message.name or message.sku, description=message.description,
        credit_micros=message.credit_micros, price_cent=message.price_cent,
        original_price_cent=message.original_price_cent or message.price_cent,
        currency=message.currency or DEFAULT_CURRENCY, badge=message.badge,
        status=ProductStatus(message.status or ProductStatus.ACTIVE), sort_order=message.sort_order,
        validity_days=message.validity_days,
        purchase_limit=limit_from_proto(message.purchase_limit) if message.HasField("purchase_limit") else None,
        created_at=now, updated_at=now,
    )


CHANGEABLE = {
    "name", "description", "credit_micros", "price_cent", "original_price_cent", "badge", "status", "sort_order",
    "validity_days", "purchase_limit",
}


def product_changes_from_proto(message: order_service_pb2.Product, paths: list[str]) -> dict[str, object]:
    """The fields that the mask names, with their new values. Raises InvalidField."""
    if not paths or not set(paths) <= CHANGEABLE:
        raise InvalidField.of("update_mask", f"must name at least one of {', '.join(sorted(CHANGEABLE))}")
    changes: dict[str, object] = {path: getattr(message, path) for path in paths}
    if "status" in changes:
        changes["status"] = ProductStatus(message.status or ProductStatus.ACTIVE)
    if "purchase_limit" in changes:
        changes["purchase_limit"] = (
            limit_from_proto(message.purchase_limit) if message.HasField("purchase_limit") else None
        )
    if "credit_micros" in changes and message.credit_micros < 1:
        raise InvalidField.of("product.credit_micros", "must be at least 1")
    return changes


def product_to_proto(product: Product) -> order_service_pb2.Product:
    return order_service_pb2.Product(
        product_id=product.product_id, sku=product.sku, name=product.name, description=product.description,
        credit_micros=product.credit_micros, price_cent=product.price_cent,
        original_price_cent=product.original_price_cent, currency=product.currency, badge=product.badge,
        status=order_service_pb2.ProductStatus.ValueType(product.status), sort_order=product.sort_order,
        validity_days=product.validity_days, purchase_limit=limit_to_proto(product.purchase_limit),
        created_at=timestamp_to_proto(product.created_at), updated_at=timestamp_to_proto(product.updated_at),
    )


def order_to_proto(order: Order) -> order_service_pb2.Order:
    payment = None
    if order.payment_provider:
        payment = order_service_pb2.Payment(provider=order.payment_provider, reference=order.payment_reference)
    return order_service_pb2.Order(
        order_id=str(order.order_id), order_no=order.order_no, user_id=order.user_id,
        status=order_service_pb2.OrderStatus.ValueType(order.status), product=product_to_proto(order.product),
        quantity=order.quantity, credit_micros=order.credit_micros, amount_cent=order.amount_cent,
        currency=order.currency, payment=payment, created_at=timestamp_to_proto(order.created_at),
        paid_at=optional_timestamp_to_proto(order.paid_at),
        credited_at=optional_timestamp_to_proto(order.credited_at),
        closed_at=optional_timestamp_to_proto(order.closed_at),
        refunded_at=optional_timestamp_to_proto(order.refunded_at), refunded_micros=order.refunded_micros,
        refunded_cent=order.refunded_cent, credit_seq=order.credit_seq, refund_due=order.refund_due,
    )


def order_step_to_proto(step: OrderStep) -> order_service_pb2.OrderStep:
    return order_service_pb2.OrderStep(
        status=order_service_pb2.OrderStatus.ValueType(step.status), at=timestamp_to_proto(step.at), actor=step.actor,
        note=step.note,
    )


def reward_rule_from_proto(message: reward_service_pb2.RewardRule, *, now: datetime) -> RewardRule:
    """A draft: the version is made by the use case."""
    return RewardRule(
        source=message.source, version=0, name=message.name or message.source, amount_micros=message.amount_micros,
        is_active=message.active, limit=limit_from_proto(message.limit) if message.HasField("limit") else None,
        validity_days=message.validity_days, description=message.description, created_at=now,
    )


def reward_rule_to_proto(rule: RewardRule) -> reward_service_pb2.RewardRule:
    return reward_service_pb2.RewardRule(
        source=rule.source, version=rule.version, name=rule.name, amount_micros=rule.amount_micros,
        active=rule.is_active, limit=limit_to_proto(rule.limit), validity_days=rule.validity_days,
        description=rule.description, created_at=timestamp_to_proto(rule.created_at),
    )
