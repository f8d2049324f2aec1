"""What the servicers work with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from servicekit.core.clock import Clock
from servicekit.core.ids import IdSource
from servicekit.rpc.call_info import current_call
from servicekit.rpc.validation import RequestValidator
from tokenstore_service.domain.commands import Answer
from tokenstore_service.usecases.balances import BalanceFeed, Balances
from tokenstore_service.usecases.ports import Catalog, Issues, LedgerReader, OrderReader, PriceRules, Prices
from tokenstore_service.usecases.sell_credit import PaymentSecrets
from tokenstore_service.usecases.write_books import BookWriter

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE_SIZE = 50


@dataclass(frozen=True, slots=True)
class Books:
    """Everything that is asked or told of the books."""

    writer: BookWriter
    reader: LedgerReader
    balances: Balances
    feed: BalanceFeed
    rules: PriceRules
    prices: Prices
    catalog: Catalog
    orders: OrderReader
    issues: Issues
    payment_secrets: PaymentSecrets
    allow_mock_payment: bool
    validator: RequestValidator
    clock: Clock
    ids: IdSource


def actor() -> str:
    """Who calls, as entries and histories keep it."""
    return current_call().principal.name[:64]


def raise_first(answers: Sequence[Answer | Exception]) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer


def size_of(request: Any) -> int:
    """Of a page."""
    return int(request.page_size) or DEFAULT_PAGE_SIZE


