"""Exports of the books, and their proof without a database."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from creditmesh.tokenstore.v1 import ledger_service_pb2, ledger_service_pb2_grpc, transaction_pb2
from google.protobuf import json_format

from servicekit.cli import Client, credits_text, fail
from servicekit.core.errors import InvalidField
from tokenstore_service.domain.account import GENESIS_HASH
from tokenstore_service.domain.verification import ChainCheck
from tokenstore_service.wire.transactions import transaction_from_proto

CSV_COLUMNS = (
    "user_id", "seq", "booked_at", "occurred_at", "source", "status", "credits", "balance_after", "event_id", "scene",
    "model", "provider", "input_tokens", "output_tokens", "unit_type", "unit_amount", "price_rule", "call_id",
    "conversation_id", "order_id", "reference", "description", "actor", "entry_hash",
)
MOST_SHOWN = 20


@contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    if path == "-":
        yield sys.stdout
    else:
        with Path(path).open("w", newline="") as file:
            yield file


def _csv_row(entry: transaction_pb2.Transaction) -> list[object]:
    quote = entry.quote
    return [
        entry.user_id, entry.seq, entry.booked_at.ToJsonString(), entry.occurred_at.ToJsonString(),
        transaction_pb2.TransactionSource.Name(entry.source).removeprefix("TRANSACTION_SOURCE_").lower(),
        transaction_pb2.TransactionStatus.Name(entry.status).removeprefix("TRANSACTION_STATUS_").lower(),
        credits_text(entry.amount_micros), credits_text(entry.balance_after_micros), entry.event_id, entry.scene,
        entry.model, entry.provider, entry.usage.input_tokens, entry.usage.output_tokens, entry.unit_type,
        entry.unit_amount, f"{quote.price_rule_id} v{quote.price_rule_version}" if quote.price_rule_id else "",
        entry.call_id, entry.conversation_id, entry.order_id, entry.reference, entry.description, entry.actor,
        entry.entry_hash.hex(),
    ]


async def export(client: Client, arguments: argparse.Namespace) -> None:
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    request = ledger_service_pb2.ExportTransactionsRequest(user_id=arguments.user or "", all=not arguments.user)
    answers = stub.ExportTransactions(request, metadata=client.metadata, timeout=arguments.seconds)
    with _output(arguments.output) as file:
        if arguments.format == "csv":
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            async for answer in answers:
                writer.writerow(_csv_row(answer.transaction))
            return
        async for answer in answers:
            document = json_format.MessageToDict(answer, preserving_proto_field_name=True)
            file.write(json.dumps(document, separators=(",", ":")) + "\n")


def verify_export(arguments: argparse.Namespace) -> None:
    """Every account's chain, sums and lots, from the file alone."""
    entries = accounts = 0
    problems: list[str] = []
    check: ChainCheck | None = None
    with Path(arguments.file).open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            answer = _parsed(line, number)
            entry = transaction_from_proto(answer.transaction)
            if check is None or check.user_id != entry.user_id:
                problems += _found(check)
                check, accounts = ChainCheck(entry.user_id), accounts + 1
                if answer.previous_hash != GENESIS_HASH:
                    fail(f"line {number}: {entry.user_id} begins at entry {entry.seq}, not at its first")
            check.add(entry)
            entries += 1
    problems += _found(check)
    for problem in problems[:MOST_SHOWN]:
        print(problem)
    if problems:
        fail(f"{len(problems)} problems in {entries} entries of {accounts} accounts")
    print(f"{entries} entries of {accounts} accounts: every hash, sum and lot agrees")


def _parsed(line: str, number: int) -> ledger_service_pb2.ExportTransactionsResponse:
    try:
        answer = ledger_service_pb2.ExportTransactionsResponse()
        json_format.Parse(line, answer)
        transaction_from_proto(answer.transaction)
    except (json_format.ParseError, InvalidField, ValueError) as error:
        fail(f"line {number} is no exported entry: {error}")
    return answer


def _found(check: ChainCheck | None) -> list[str]:
    if check is None:
        return []
    return [f"{each.user_id} entry {each.seq}: {each.kind}, {each.detail}" for each in check.findings]


def add_to(commands: Any, add_client: Any) -> None:
    command = commands.add_parser("export", help="an account's entries, or all, as JSON Lines or CSV")
    command.add_argument("user", nargs="?")
    command.add_argument("--format", choices=["jsonl", "csv"], default="jsonl")
    command.add_argument("--output", default="-", help="a file; - = standard output")
    command.add_argument("--seconds", type=float, default=3600.0, help="give up after this")
    command.set_defaults(client=export)
    add_client(command)
    check = commands.add_parser("verify-export", help="prove an export in JSON Lines, without a server or a database")
    check.add_argument("file")
    check.set_defaults(run=verify_export)
