"""creditmesh.tokenstore.v1.OrderService."""

from __future__ import annotations

from uuid import UUID

from creditmesh.tokenstore.v1 import order_service_pb2, order_service_pb2_grpc

from tokenstore_service.domain.order import OrderStatus, ProductStatus
from tokenstore_service.domain.payment import Confirmation
from tokenstore_service.transport.books import Books, Context, actor, size_of
from tokenstore_service.usecases import sell_credit
from tokenstore_service.wire.balances import balance_to_proto
from tokenstore_service.wire.orders import (
    order_step_to_proto,
    order_to_proto,
    product_changes_from_proto,
    product_from_proto,
    product_to_proto,
)
from tokenstore_service.wire.transactions import transaction_to_proto


class OrderServicer(order_service_pb2_grpc.OrderServiceServicer):
    """Selling credit."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def ListProducts(
        self, request: order_service_pb2.ListProductsRequest, context: Context
    ) -> order_service_pb2.ListProductsResponse:
        products, token = await sell_credit.list_products(
            self._books.catalog, ProductStatus(request.status or ProductStatus.ACTIVE), page_size=size_of(request),
            page_token=request.page_token,
        )
        return order_service_pb2.ListProductsResponse(
            products=[product_to_proto(product) for product in products], next_page_token=token
        )

    async def CreateProduct(
        self, request: order_service_pb2.CreateProductRequest, context: Context
    ) -> order_service_pb2.CreateProductResponse:
        product = product_from_proto(
            request.product, product_id=str(self._books.ids.new_id()), now=self._books.clock.now()
        )
        made = await sell_credit.create_product(self._books.catalog, product, idempotency_key=request.idempotency_key)
        return order_service_pb2.CreateProductResponse(product=product_to_proto(made))

    async def UpdateProduct(
        self, request: order_service_pb2.UpdateProductRequest, context: Context
    ) -> order_service_pb2.UpdateProductResponse:
        changes = product_changes_from_proto(request.product, list(request.update_mask.paths))
        changed = await sell_credit.change_product(
            self._books.catalog, request.product.product_id, changes, now=self._books.clock.now()
        )
        return order_service_pb2.UpdateProductResponse(product=product_to_proto(changed))

    async def CreateOrder(
        self, request: order_service_pb2.CreateOrderRequest, context: Context
    ) -> order_service_pb2.CreateOrderResponse:
        books = self._books
        order = await sell_credit.create_order(
            books.catalog, books.writer, user_id=request.user_id, product_id=request.product_id,
            quantity=request.quantity or 1, idempotency_key=request.idempotency_key, actor=actor(), ids=books.ids,
            clock=books.clock,
        )
        return order_service_pb2.CreateOrderResponse(order=order_to_proto(order))

    async def GetOrder(
        self, request: order_service_pb2.GetOrderRequest, context: Context
    ) -> order_service_pb2.GetOrderResponse:
        order = await sell_credit.get_order(self._books.orders, UUID(request.order_id), request.user_id)
        steps = await sell_credit.order_history(self._books.orders, order)
        return order_service_pb2.GetOrderResponse(
            order=order_to_proto(order), steps=[order_step_to_proto(step) for step in steps]
        )

    async def ListOrders(
        self, request: order_service_pb2.ListOrdersRequest, context: Context
    ) -> order_service_pb2.ListOrdersResponse:
        orders, token = await sell_credit.list_orders(
            self._books.orders, request.user_id, OrderStatus(request.status) if request.status else None,
            page_size=size_of(request), page_token=request.page_token,
        )
        return order_service_pb2.ListOrdersResponse(
            orders=[order_to_proto(order) for order in orders], next_page_token=token
        )

    async def ConfirmPayment(
        self, request: order_service_pb2.ConfirmPaymentRequest, context: Context
    ) -> order_service_pb2.ConfirmPaymentResponse:
        books = self._books
        done = await sell_credit.confirm_payment(
            books.orders, books.writer, books.payment_secrets, order_id=UUID(request.order_id),
            confirmation=Confirmation(request.provider, request.payload, request.signature, request.timestamp),
            allow_mock=books.allow_mock_payment, actor=actor(), clock=books.clock,
        )
        return order_service_pb2.ConfirmPaymentResponse(
            order=order_to_proto(done.order), balance=balance_to_proto(done.account)
        )

    async def CloseOrder(
        self, request: order_service_pb2.CloseOrderRequest, context: Context
    ) -> order_service_pb2.CloseOrderResponse:
        order = await sell_credit.close_order(
            self._books.orders, self._books.writer, order_id=UUID(request.order_id), user_id=request.user_id,
            reason=request.reason, actor=actor(),
        )
        return order_service_pb2.CloseOrderResponse(order=order_to_proto(order))

    async def RefundOrder(
        self, request: order_service_pb2.RefundOrderRequest, context: Context
    ) -> order_service_pb2.RefundOrderResponse:
        done = await sell_credit.refund_order(
            self._books.orders, self._books.writer, order_id=UUID(request.order_id),
            credit_micros=request.credit_micros, reason=request.reason, idempotency_key=request.idempotency_key,
            actor=actor(),
        )
        return order_service_pb2.RefundOrderResponse(
            order=order_to_proto(done.order), transaction=transaction_to_proto(done.entry) if done.entry else None,
            balance=balance_to_proto(done.account),
        )
