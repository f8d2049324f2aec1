"""creditmesh.tokenstore.v1.ChargeService."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import charge_service_pb2, charge_service_pb2_grpc

from servicekit.core.errors import InvalidField
from servicekit.telemetry.tracing import SpanKind
from tokenstore_service.domain.commands import ChargeRecorded, IssueKind, RecordCharge, RecordStatus
from tokenstore_service.domain.errors import ChargeIssueNotResolvable
from tokenstore_service.transport.books import Books, Context, actor, raise_first, size_of
from tokenstore_service.transport.charge_spans import applying
from tokenstore_service.usecases import resolve_issues
from tokenstore_service.usecases.ports import IssueState, StoredIssue
from tokenstore_service.wire.charges import (
    UndecodableEvent,
    charge_from_original,
    charge_from_proto,
    record_result_to_proto,
)
from tokenstore_service.wire.issues import issue_to_proto, rejected_usage
from tokenstore_service.wire.usage_events import usage_charge_from_proto


class ChargeServicer(charge_service_pb2_grpc.ChargeServiceServicer):
    """Where charges come in, and what is not simply applied."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def RecordCharges(
        self, request: charge_service_pb2.RecordChargesRequest, context: Context
    ) -> charge_service_pb2.RecordChargesResponse:
        now = self._books.clock.now()
        commands = [
            charge_from_proto(each, now=now, field=f"charges[{index}].") for index, each in enumerate(request.charges)
        ]
        with applying(request.traceparents, kind=SpanKind.INTERNAL):
            answers = await self._books.writer.apply_all(commands)
        raise_first(answers)
        return charge_service_pb2.RecordChargesResponse(results=[
            record_result_to_proto(answer) for answer in answers if isinstance(answer, ChargeRecorded)
        ])

    async def RecordUsage(
        self, request: charge_service_pb2.RecordUsageRequest, context: Context
    ) -> charge_service_pb2.RecordUsageResponse:
        results: list[ChargeRecorded | None] = []
        commands: list[RecordCharge] = []
        refused: list[StoredIssue] = []
        now = self._books.clock.now()
        for usage in request.usages:
            try:
                commands.append(usage_charge_from_proto(usage, now=now))
                results.append(None)
            except InvalidField as error:
                refused.append(rejected_usage(usage, str(error), now=now))
                results.append(ChargeRecorded(RecordStatus.REJECTED, detail=str(error)))
        if refused:
            await self._books.issues.add(refused)
        answers = await self._books.writer.apply_all(commands) if commands else []
        raise_first(answers)
        booked = (answer for answer in answers if isinstance(answer, ChargeRecorded))
        return charge_service_pb2.RecordUsageResponse(
            results=[record_result_to_proto(result or next(booked)) for result in results]
        )

    async def ListChargeIssues(
        self, request: charge_service_pb2.ListChargeIssuesRequest, context: Context
    ) -> charge_service_pb2.ListChargeIssuesResponse:
        issues, token = await resolve_issues.list_issues(
            self._books.issues, user_id=request.user_id, kind=IssueKind(request.kind) if request.kind else None,
            state=IssueState(request.state or IssueState.OPEN), page_size=size_of(request),
            page_token=request.page_token,
        )
        return charge_service_pb2.ListChargeIssuesResponse(
            issues=[issue_to_proto(issue) for issue in issues], next_page_token=token
        )

    async def ResolveChargeIssue(
        self, request: charge_service_pb2.ResolveChargeIssueRequest, context: Context
    ) -> charge_service_pb2.ResolveChargeIssueResponse:
        done = await resolve_issues.resolve_issue(
            self._books.issues, self._books.writer, self._decode, issue_id=request.issue_id, action=request.action,
            actor=actor(), note=request.note,
        )
        return charge_service_pb2.ResolveChargeIssueResponse(
            issue=issue_to_proto(done.issue), result=record_result_to_proto(done.recorded) if done.recorded else None
        )

    def _decode(self, issue: StoredIssue) -> RecordCharge:
        try:
            return charge_from_original(
                issue.content_type, issue.origin, issue.original, validator=self._books.validator, now=issue.noticed_at
            )
        except UndecodableEvent as error:
            raise ChargeIssueNotResolvable(f"the original can still not be read: {error}", state="OPEN") from None
