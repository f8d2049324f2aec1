"""Do the conversations' totals agree with the ledger? The two books are kept by two services in two databases."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from creditmesh.tokenstore.v1 import ledger_service_pb2, ledger_service_pb2_grpc

from llm_service.config import load
from llm_service.storage.tables import SCHEMA
from servicekit.cli import Client, add_client_options, credits_text, fail
from servicekit.db.database import Database
from servicekit.settings import ConfigurationError

PAGE_SIZE = 500
TOTALS = """
SELECT conversation_id::text, tokens_total, credit_micros_total FROM conversation WHERE user_id = %s
"""
USERS = "SELECT DISTINCT user_id FROM conversation WHERE user_id > %s ORDER BY user_id LIMIT 1000"


async def _ledger_totals(client: Client, user: str) -> dict[str, tuple[int, int]]:
    """Tokens and micro-credits by conversation."""
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    request = ledger_service_pb2.ListTransactionsRequest(user_id=user, page_size=PAGE_SIZE)
    totals: dict[str, tuple[int, int]] = {}
    while True:
        answer = await stub.ListTransactions(request, metadata=client.metadata, timeout=client.timeout)
        for entry in answer.transactions:
            if entry.conversation_id and entry.call_id:
                tokens, micros = totals.get(entry.conversation_id, (0, 0))
                # A correction books the difference in credit, and has the whole usage.
                if not entry.event_id.startswith("correct:"):
                    tokens += entry.usage.input_tokens + entry.usage.output_tokens
                totals[entry.conversation_id] = (tokens, micros - entry.amount_micros)
        if not answer.next_page_token:
            return totals
        request.page_token = answer.next_page_token


async def _users(database: Database, user: str) -> AsyncIterator[str]:
    if user:
        yield user
        return
    after = ""
    while True:
        async with database.connection() as connection:
            rows = await (await connection.execute(USERS, (after,))).fetchall()
        for (each,) in rows:
            yield each
        if not rows:
            return
        after = rows[-1][0]


async def _reconcile(client: Client, arguments: argparse.Namespace) -> None:
    try:
        settings = load(os.environ)
    except ConfigurationError as error:
        fail(*error.problems, code=2)
    database = Database(
        settings.full_database_url(), schema=SCHEMA, application_name="llm_service-reconcile", pool_size=2
    )
    await database.open()
    compared = different = 0
    try:
        async for user in _users(database, arguments.user):
            booked = await _ledger_totals(client, user)
            async with database.connection() as connection:
                rows = await (await connection.execute(TOTALS, (user,))).fetchall()
            for conversation_id, tokens, micros in rows:
                in_ledger = booked.get(conversation_id, (0, 0))
                compared += 1
                if in_ledger[1] != micros:
                    different += 1
                    print(f"{user}  {conversation_id}  conversation: {credits_text(micros)} credits, {tokens} tokens"
                          f"  ledger: {credits_text(in_ledger[1])} credits, {in_ledger[0]} tokens")
    finally:
        await database.close()
    print(f"{compared} conversations compared with the ledger, {different} differ")
    if different:
        print("calls that still run, charges on their way, and usage that was priced later make a difference, too;"
              " see README, Conversations", file=sys.stderr)
        sys.exit(1)


def add_to(commands: Any, target: str) -> None:
    """Adds reconcile."""
    command = commands.add_parser(
        "reconcile", help="compare the totals of conversations (LLM_DATABASE_URL) with the ledger (--target)"
    )
    command.add_argument("user", nargs="?", default="", help="one account; absent = all")
    command.set_defaults(client=_reconcile)
    add_client_options(command, target=target)
