"""Proof: walks the books and finds what does not fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from tokenstore_service.domain.entry import Entry
from tokenstore_service.domain.verification import ChainCheck, Finding
from tokenstore_service.usecases.ports import AccountPart, LedgerReader


@dataclass(slots=True)
class Summary:
    """What was checked."""

    accounts: int = 0
    entries: int = 0
    findings: int = 0


async def verify_ledger(reader: LedgerReader, user_id: str | None) -> AsyncIterator[Finding | Summary]:
    """Findings as they are found, then the summary. `user_id` None = all accounts. Blocks no writer."""
    summary = Summary()
    part: AccountPart | None = None
    check: ChainCheck | None = None
    async for piece in reader.audit(None if user_id is None else [user_id]):
        if isinstance(piece, Entry):
            assert check is not None
            summary.entries += 1
            check.add(piece)
            continue
        for finding in _finish(part, check, summary):
            yield finding
        part, check = piece, ChainCheck(piece.user_id)
    for finding in _finish(part, check, summary):
        yield finding
    yield summary


def _finish(part: AccountPart | None, check: ChainCheck | None, summary: Summary) -> list[Finding]:
    if part is None or check is None:
        return []
    summary.accounts += 1
    if part.account is None:
        findings = [*check.findings, Finding(part.user_id, 0, "ORPHAN_ENTRIES", "entries without an account")]
    else:
        findings = check.finish(part.account, held_micros=part.held_micros)
    summary.findings += len(findings)
    return findings
