"""What people, and the server itself, do about charges that are not simply applied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from servicekit.core.errors import DomainError
from servicekit.core.page_token import decode_page_token, encode_page_token
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.commands import Booked, ChargeRecorded, IssueKind, RecordCharge, RecordStatus, Reprice
from tokenstore_service.domain.errors import ChargeIssueNotFound, ChargeIssueNotResolvable, NoPrice
from tokenstore_service.usecases.ports import Issues, IssueState, Lease, Prices, StoredIssue
from tokenstore_service.usecases.write_books import BookWriter

log = EventLogger(__name__)

RETRY, REPRICE, DISMISS = 1, 2, 3
"""Actions; numbers as on the wire."""

ACTIONS = {
    IssueKind.CONFLICT: (DISMISS,),
    IssueKind.UNPRICED: (REPRICE, DISMISS),
    IssueKind.REJECTED: (RETRY, DISMISS),
    IssueKind.OVERRUN: (DISMISS,),
    IssueKind.LATE: (DISMISS,),
    IssueKind.UNDECODABLE: (RETRY, DISMISS),
}
JOB = "reprice"
REPRICE_SECONDS = 2.0
LEASE_SECONDS = 30.0
MOST_AT_ONCE = 500
ACTOR = "tokenstore_service"


@dataclass(frozen=True, slots=True)
class Resolution:
    """The issue as it is now, and what became of the charge."""

    issue: StoredIssue
    recorded: ChargeRecorded | None


async def list_issues(
    issues: Issues, *, user_id: str, kind: IssueKind | None, state: IssueState, page_size: int, page_token: str
) -> tuple[list[StoredIssue], str]:
    """Newest first."""
    question = ("issues", user_id, kind, int(state))
    key = decode_page_token(page_token, question=question, types=(int,))
    found = await issues.issues(
        user_id=user_id, kind=kind, state=state, before=int(key[0]) if key else None, limit=page_size + 1
    )
    if len(found) <= page_size:
        return found, ""
    return found[:page_size], encode_page_token([found[page_size - 1].issue_id], question=question)


async def resolve_issue(
    issues: Issues, writer: BookWriter, decode: Callable[[StoredIssue], RecordCharge], *, issue_id: int, action: int,
    actor: str, note: str,
) -> Resolution:
    """Raises ChargeIssueNotFound, ChargeIssueNotResolvable, NoPrice. A retry that is refused again leaves it open."""
    issue = await issues.issue(issue_id)
    if issue is None:
        raise ChargeIssueNotFound("there is no such issue")
    if issue.state is not IssueState.OPEN or action not in ACTIONS[issue.kind]:
        raise ChargeIssueNotResolvable(
            f"a {issue.kind.name} issue that is {issue.state.name} can not be treated so", state=issue.state.name
        )
    recorded = None
    if action == RETRY:
        recorded = await writer.apply(decode(issue), ChargeRecorded)
        if recorded.status in (RecordStatus.REJECTED, RecordStatus.CONFLICT):
            return Resolution(issue, recorded)
    elif action == REPRICE:
        booked = await writer.apply(Reprice(issue.user_id, issue.event_id, actor), Booked)
        recorded = ChargeRecorded(RecordStatus.APPLIED, booked.entry.seq, -booked.entry.amount_micros)
    state = IssueState.DISMISSED if action == DISMISS else IssueState.RESOLVED
    closed = await issues.close(issue_id, state, actor=actor, note=note)
    return Resolution(closed or issue, recorded)


async def reprice_once(issues: Issues, writer: BookWriter) -> int:
    """Prices what a rule matches by now. Returns how many were priced."""
    priced = 0
    before: int | None = None
    while True:
        found = await issues.issues(
            user_id="", kind=IssueKind.UNPRICED, state=IssueState.OPEN, before=before, limit=MOST_AT_ONCE
        )
        answers = await writer.apply_all([Reprice(issue.user_id, issue.event_id, ACTOR) for issue in found])
        for issue, answer in zip(found, answers, strict=True):
            if isinstance(answer, Booked):
                priced += 1
                await issues.close(issue.issue_id, IssueState.RESOLVED, actor=ACTOR, note="a rule matches now")
            elif not isinstance(answer, NoPrice):
                log.error("not_repriced", event_id=issue.event_id, reason=str(answer))
        if len(found) < MOST_AT_ONCE:
            return priced
        before = found[-1].issue_id


async def reprice_when_rules_change(issues: Issues, writer: BookWriter, prices: Prices, leases: Lease) -> None:
    """After every change of the price book, on one replica. Runs until it is cancelled."""
    tried = None
    while True:
        await asyncio.sleep(REPRICE_SECONDS)
        if prices.book is tried or await leases.claim(JOB, seconds=LEASE_SECONDS) is None:
            continue
        tried = prices.book
        try:
            priced = await reprice_once(issues, writer)
        except DomainError:
            tried = None
            continue
        if priced:
            log.info("repriced", issues=priced)
