"""What this server serves, with the scope of each RPC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from creditmesh.tokenstore.v1 import (
    balance_service_pb2_grpc,
    budget_service_pb2_grpc,
    charge_service_pb2_grpc,
    hold_service_pb2_grpc,
    ledger_service_pb2_grpc,
    order_service_pb2_grpc,
    pricing_service_pb2_grpc,
    reward_service_pb2_grpc,
)

from servicekit.rpc.server import Service
from tokenstore_service.transport.balance_servicer import BalanceServicer
from tokenstore_service.transport.books import Books
from tokenstore_service.transport.budget_servicer import BudgetServicer
from tokenstore_service.transport.charge_servicer import ChargeServicer
from tokenstore_service.transport.hold_servicer import HoldServicer
from tokenstore_service.transport.ledger_servicer import LedgerServicer
from tokenstore_service.transport.order_servicer import OrderServicer
from tokenstore_service.transport.pricing_servicer import PricingServicer
from tokenstore_service.transport.reward_servicer import RewardServicer

PACKAGE = "creditmesh.tokenstore.v1"

SCOPES: dict[str, dict[str, str | None]] = {
    "BalanceService": {
        "GetBalance": "balance.read", "BatchGetBalances": "balance.read", "WatchBalance": "balance.read",
    },
    "HoldService": {
        "OpenHolds": "holds.write", "ExtendHolds": "holds.write", "ReleaseHolds": "holds.write",
        "GetHold": "balance.read", "ListHolds": "balance.read",
    },
    "ChargeService": {
        "RecordCharges": "charges.write", "RecordUsage": "charges.write", "ListChargeIssues": "ledger.read",
        "ResolveChargeIssue": "ledger.adjust",
    },
    "LedgerService": {
        "ListTransactions": "ledger.read", "GetTransaction": "ledger.read", "AdjustBalance": "ledger.adjust",
        "ExplainCharge": "ledger.read", "VerifyLedger": "ledger.read", "ReverseTransaction": "ledger.adjust",
        "ExportTransactions": "ledger.read", "GetBalanceAt": "ledger.read", "GetConsumption": "ledger.read",
        "SetOverdraftLimit": "ledger.adjust", "ListLots": "ledger.read",
    },
    "OrderService": {
        "ListProducts": "orders.write", "CreateProduct": "orders.admin", "UpdateProduct": "orders.admin",
        "CreateOrder": "orders.write", "GetOrder": "orders.write", "ListOrders": "orders.write",
        "ConfirmPayment": "orders.write", "CloseOrder": "orders.write", "RefundOrder": "orders.admin",
    },
    "PricingService": {
        "CreatePriceRule": "prices.admin", "UpdatePriceRule": "prices.admin", "ListPriceRules": "ledger.read",
        "GetPriceRule": "ledger.read", "Quote": "ledger.read", "SimulatePricing": "ledger.read",
    },
    "BudgetService": {"SetBudget": "ledger.adjust", "ListBudgets": "balance.read", "DeleteBudget": "ledger.adjust"},
    "RewardService": {
        "SetRewardRule": "prices.admin", "ListRewardRules": "ledger.read", "GrantReward": "charges.write",
    },
}


def services(books: Books) -> list[Service]:
    """Every service of this server."""

    def service(name: str, add: Callable[[Any, Any], None], servicer: type) -> Service:
        return Service(f"{PACKAGE}.{name}", SCOPES[name], lambda server: add(servicer(books), server))

    return [
        service("BalanceService", balance_service_pb2_grpc.add_BalanceServiceServicer_to_server, BalanceServicer),
        service("HoldService", hold_service_pb2_grpc.add_HoldServiceServicer_to_server, HoldServicer),
        service("ChargeService", charge_service_pb2_grpc.add_ChargeServiceServicer_to_server, ChargeServicer),
        service("LedgerService", ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server, LedgerServicer),
        service("OrderService", order_service_pb2_grpc.add_OrderServiceServicer_to_server, OrderServicer),
        service("PricingService", pricing_service_pb2_grpc.add_PricingServiceServicer_to_server, PricingServicer),
        service("BudgetService", budget_service_pb2_grpc.add_BudgetServiceServicer_to_server, BudgetServicer),
        service("RewardService", reward_service_pb2_grpc.add_RewardServiceServicer_to_server, RewardServicer),
    ]
