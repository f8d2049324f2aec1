"""creditmesh.tokenstore.v1.BudgetService."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import budget_service_pb2, budget_service_pb2_grpc

from tokenstore_service.domain.commands import BudgetChanged, DeleteBudget
from tokenstore_service.transport.books import Books, Context, size_of
from tokenstore_service.usecases import read_books
from tokenstore_service.wire.budgets import budget_to_proto, set_budget_from_proto


class BudgetServicer(budget_service_pb2_grpc.BudgetServiceServicer):
    """Spend caps beyond the balance."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def SetBudget(
        self, request: budget_service_pb2.SetBudgetRequest, context: Context
    ) -> budget_service_pb2.SetBudgetResponse:
        command = set_budget_from_proto(request, budget_id=str(self._books.ids.new_id()))
        done = await self._books.writer.apply(command, BudgetChanged)
        return budget_service_pb2.SetBudgetResponse(budget=budget_to_proto(done.budget))

    async def ListBudgets(
        self, request: budget_service_pb2.ListBudgetsRequest, context: Context
    ) -> budget_service_pb2.ListBudgetsResponse:
        budgets, token = await read_books.list_budgets(
            self._books.reader, request.user_id, page_size=size_of(request), page_token=request.page_token,
            now=self._books.clock.now(),
        )
        return budget_service_pb2.ListBudgetsResponse(
            budgets=[budget_to_proto(budget) for budget in budgets], next_page_token=token
        )

    async def DeleteBudget(
        self, request: budget_service_pb2.DeleteBudgetRequest, context: Context
    ) -> budget_service_pb2.DeleteBudgetResponse:
        command = DeleteBudget(request.user_id, request.budget_id)
        done = await self._books.writer.apply(command, BudgetChanged)
        return budget_service_pb2.DeleteBudgetResponse(budget=budget_to_proto(done.budget))
