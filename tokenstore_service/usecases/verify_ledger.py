"""Proof: walks the books and finds what does not fit; on demand, and all the time in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Protocol

from servicekit.core.clock import Clock
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.verification import ChainCheck, Finding
from tokenstore_service.usecases.ports import AccountPart, Lease, LedgerReader

log = EventLogger(__name__)

PROGRESS_EVERY = 1_000
JOB = "verify-ledger"
LEASE_SECONDS = 60.0
LOOK_SECONDS = 5.0
MOST_LOGGED = 20


@dataclass(slots=True)
class Summary:
    """What was checked so far; `is_last` when that is all."""

    accounts: int = 0
    entries: int = 0
    findings: int = 0
    last_user_id: str = ""
    is_last: bool = False


async def verify_ledger(
    reader: LedgerReader, user_id: str | None, *, after_user_id: str = ""
) -> AsyncIterator[Finding | Summary]:
    """Findings as they are found, the sums every thousand accounts, and last of all. `user_id` None = all accounts
    after `after_user_id`. Blocks no writer."""
    summary = Summary()
    part: AccountPart | None = None
    check: ChainCheck | None = None
    async for piece in reader.audit(None if user_id is None else [user_id], after_user_id=after_user_id):
        if isinstance(piece, Entry):
            assert check is not None
            summary.entries += 1
            check.add(piece)
            continue
        for finding in _finish(part, check, summary):
            yield finding
        if part is not None and summary.accounts % PROGRESS_EVERY == 0:
            yield replace(summary)
        part, check = piece, ChainCheck(piece.user_id)
    for finding in _finish(part, check, summary):
        yield finding
    summary.is_last = True
    yield summary


def _finish(part: AccountPart | None, check: ChainCheck | None, summary: Summary) -> list[Finding]:
    if part is None or check is None:
        return []
    summary.accounts += 1
    summary.last_user_id = part.user_id
    if part.account is None:
        findings = [*check.findings, Finding(part.user_id, 0, "ORPHAN_ENTRIES", "entries without an account")]
    else:
        findings = check.finish(
            part.account, held_micros=part.held_micros, lots=part.lots, consumption=part.consumption
        )
    summary.findings += len(findings)
    return findings


class VerifyMetrics(Protocol):
    """Told what the background check found."""

    def round_finished(self, summary: Summary, *, seconds: float) -> None: ...

    def found(self, finding: Finding) -> None: ...


async def verify_in_background(
    reader: LedgerReader, leases: Lease, metrics: VerifyMetrics, *, every_seconds: float, clock: Clock
) -> None:
    """Checks all books again and again, on one replica at a time; another goes on where one died. The cursor is the
    last account of the round, or `done:TIME` between two rounds. Runs until it is cancelled."""
    while True:
        cursor = await leases.claim(JOB, seconds=LEASE_SECONDS)
        if cursor is None or not _is_time(cursor, every_seconds, clock):
            await asyncio.sleep(LOOK_SECONDS)
            continue
        await _verify_round(reader, leases, metrics, after="" if cursor.startswith("done:") else cursor, clock=clock)


def _is_time(cursor: str, every_seconds: float, clock: Clock) -> bool:
    if not cursor.startswith("done:"):
        return True
    return clock.now().timestamp() - float(cursor.removeprefix("done:")) >= every_seconds


async def _verify_round(
    reader: LedgerReader, leases: Lease, metrics: VerifyMetrics, *, after: str, clock: Clock
) -> None:
    begun = clock.monotonic()
    logged = 0
    async for piece in verify_ledger(reader, None, after_user_id=after):
        if isinstance(piece, Finding):
            metrics.found(piece)
            if logged < MOST_LOGGED:
                logged += 1
                log.error("ledger_finding", user_id=piece.user_id, seq=piece.seq, kind=piece.kind, detail=piece.detail)
            continue
        cursor = f"done:{clock.now().timestamp():.0f}" if piece.is_last else piece.last_user_id
        if await leases.claim(JOB, seconds=LEASE_SECONDS) is None or not await leases.move(JOB, cursor):
            return
        if piece.is_last:
            metrics.round_finished(piece, seconds=clock.monotonic() - begun)
