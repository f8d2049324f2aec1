"""How the books behave with many entries: filled by SQL, then measured through the real interface."""

from __future__ import annotations

import asyncio
import random
import statistics
import time

import grpc.aio
import psycopg
from creditmesh.tokenstore.v1 import ledger_service_pb2, ledger_service_pb2_grpc

GROWTH = (1_000_000, 10_000_000, 30_000_000)
ACCOUNTS = 10_000
READS = 1_500
CALLERS = 2

KEYS = ("ledger_entry_pkey", "ledger_entry_event")
# Entries of one account lie scattered over the table, as they do when they come in; only the hashes are made up.
FILL = """
INSERT INTO ledger_entry (user_id, seq, event_id, source, amount_micros, balance_after_micros, status, occurred_at,
    booked_at, scene, model, provider, input_tokens, cached_input_tokens, cache_write_tokens, output_tokens,
    reasoning_tokens, input_audio_tokens, output_audio_tokens, usage_source, price_rule_id, price_rule_version,
    input_pico, cached_input_pico, cache_write_pico, output_pico, reasoning_pico, input_audio_pico, output_audio_pico,
    per_call_pico, call_id, request_id, conversation_id, reference, description, flags, entry_hash, form, lots)
SELECT 'bench-' || n %% 10000, n / 10000 + 1, '01900000-0000-7000-8000-' || lpad(n::text, 12, '0'), 2, -112000, 10^15,
    1, at, at, 'chat', 'model-' || n %% 7, 'LOCAL', 100, 0, 0, 50, 0, 0, 0, 1, 'default', 1, 320000000, 80000000,
    320000000, 1600000000, 1600000000, 320000000, 1600000000, 0, NULL, '', '', '', '', 8, sha256(n::text::bytea), 2,
    '1:112000'
FROM (SELECT n, now() - ((%(total)s - n) * interval '30 days' / %(total)s) AS at
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n) AS numbers
"""
ACCOUNTS_OF = """
INSERT INTO account SELECT user_id, 10^15, 0, 0, 0, 10^15, 0, max(seq), sha256('x'), now(), max(seq), 1, 10^15, NULL,
    false, 0
FROM ledger_entry GROUP BY user_id
ON CONFLICT (user_id) DO UPDATE SET seq = excluded.seq, version = account.version + 1
"""
SUMS_OF = """
INSERT INTO consumption_hour SELECT user_id, date_trunc('hour', occurred_at, 'UTC'), scene, model, count(*),
    sum(input_tokens), 0, sum(output_tokens), 0, -sum(amount_micros) FROM ledger_entry GROUP BY 1, 2, 3, 4
"""


def grow(url: str, entries: int) -> float:
    """Fills the ledger up to so many entries. Returns the seconds it took."""
    begun = time.perf_counter()
    options = "-c search_path=tokenstore -c synchronous_commit=off"
    with psycopg.connect(url, autocommit=True, options=options) as connection:
        row = connection.execute("SELECT count(*) FROM ledger_entry WHERE event_id LIKE '01900000%'").fetchone()
        first = int(row[0]) if row else 0
        connection.execute("DELETE FROM ledger_entry WHERE NOT event_id LIKE '01900000%'")
        for key in KEYS:
            connection.execute(f"ALTER TABLE ledger_entry DROP CONSTRAINT {key}".encode())
        for begin in range(first, entries, 1_000_000):
            connection.execute(FILL, {
                "first": begin, "last": min(begin + 1_000_000, entries) - 1, "total": GROWTH[-1],
            })
        connection.execute("SET maintenance_work_mem = '1GB'")
        connection.execute("ALTER TABLE ledger_entry ADD PRIMARY KEY (user_id, seq)")
        connection.execute("ALTER TABLE ledger_entry ADD CONSTRAINT ledger_entry_event UNIQUE (user_id, event_id)")
        connection.execute("TRUNCATE consumption_hour, account, lot")
        connection.execute("SET work_mem = '512MB'")
        connection.execute(ACCOUNTS_OF)
        connection.execute(SUMS_OF)
        connection.execute("INSERT INTO lot SELECT user_id, 1, 4, 20, 10^15, 10^15, NULL, '', now(), true FROM account")
        connection.execute("VACUUM (ANALYZE) ledger_entry, consumption_hour, account, lot")
        connection.execute("CHECKPOINT")
    return time.perf_counter() - begun


async def export_all(address: str) -> tuple[int, float]:
    """Reads every entry. Returns how many, and the seconds it took."""
    count, begun = 0, time.perf_counter()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = ledger_service_pb2_grpc.LedgerServiceStub(channel)
        async for _ in stub.ExportTransactions(ledger_service_pb2.ExportTransactionsRequest(all=True), timeout=600):
            count += 1
    return count, time.perf_counter() - begun


async def measure_reads(address: str) -> dict[str, float]:
    """Milliseconds of pages of 50 entries, anywhere in an account, and of 30 days by model; two callers."""
    chance = random.Random(1)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = ledger_service_pb2_grpc.LedgerServiceStub(channel)

        async def page() -> None:
            user = f"bench-{chance.randrange(ACCOUNTS)}"
            request = ledger_service_pb2.ListTransactionsRequest(user_id=user, page_size=50)
            await stub.ListTransactions(request, timeout=10)

        async def sums() -> None:
            user = f"bench-{chance.randrange(ACCOUNTS)}"
            await stub.GetConsumption(ledger_service_pb2.GetConsumptionRequest(
                user_id=user, period="30d", group_by=ledger_service_pb2.CONSUMPTION_GROUP_MODEL
            ), timeout=10)

        figures: dict[str, float] = {}
        for name, read in (("page", page), ("sums", sums)):
            for _ in range(100):
                await read()
            times: list[float] = []

            async def caller(read: object = read, times: list[float] = times) -> None:
                assert callable(read)
                for _ in range(READS // CALLERS):
                    begun = time.perf_counter()
                    await read()
                    times.append((time.perf_counter() - begun) * 1000)

            await asyncio.gather(*[caller() for _ in range(CALLERS)])
            figures[f"{name}_p50"] = statistics.median(times)
            figures[f"{name}_p99"] = statistics.quantiles(times, n=100)[98]
        return figures
