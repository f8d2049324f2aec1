"""Command line of tokenstore_service: the server's commands, and an operator's, which use the gRPC API only."""

from __future__ import annotations

import argparse

from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    balance_service_pb2_grpc,
    hold_service_pb2,
    hold_service_pb2_grpc,
    ledger_service_pb2,
    ledger_service_pb2_grpc,
    pricing_service_pb2,
    pricing_service_pb2_grpc,
    transaction_pb2,
)

from servicekit.cli import (
    Client,
    ServiceCommands,
    add_client_options,
    credits_text,
    fail,
    micros_from_text,
    run_client,
    show_json,
)
from servicekit.core.ids import RandomIdSource
from tokenstore_service.app import MIGRATIONS, serve
from tokenstore_service.config import PREFIX, load
from tokenstore_service.storage.tables import SCHEMA

TARGET = "127.0.0.1:50052"


def _balance_line(balance: balance_service_pb2.Balance) -> str:
    return (
        f"{balance.user_id}: {credits_text(balance.balance_micros)} credits"
        f" ({credits_text(balance.held_micros)} held, {credits_text(balance.available_micros)} available)"
    )


async def _balance(client: Client, arguments: argparse.Namespace) -> None:
    stub = balance_service_pb2_grpc.BalanceServiceStub(client.channel)
    request = balance_service_pb2.GetBalanceRequest(user_id=arguments.user)
    answer = await stub.GetBalance(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
    else:
        print(_balance_line(answer.balance))


async def _credit(client: Client, arguments: argparse.Namespace) -> None:
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    answer = await stub.AdjustBalance(
        ledger_service_pb2.AdjustBalanceRequest(
            user_id=arguments.user, amount_micros=arguments.credits, reason=arguments.reason,
            reference=arguments.reference, idempotency_key=arguments.key or str(RandomIdSource().new_id()),
        ),
        metadata=client.metadata, timeout=client.timeout,
    )
    if arguments.json:
        show_json(answer)
    else:
        print(f"entry {answer.transaction.seq}: {credits_text(answer.transaction.amount_micros)} credits")
        print(_balance_line(answer.balance))


def _transaction_line(entry: transaction_pb2.Transaction) -> str:
    source = transaction_pb2.TransactionSource.Name(entry.source).removeprefix("TRANSACTION_SOURCE_").lower()
    what = f"{entry.model} {entry.usage.input_tokens}+{entry.usage.output_tokens} tokens"
    when = entry.booked_at.ToDatetime().isoformat(sep=" ", timespec="seconds")
    return (
        f"{entry.seq:>5}  {when}  {source:<10}  {credits_text(entry.amount_micros):>14}"
        f"  {credits_text(entry.balance_after_micros):>14}  {entry.event_id}"
        f"  {entry.description if not entry.HasField('usage') else what}"
    )


async def _transactions(client: Client, arguments: argparse.Namespace) -> None:
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    request = ledger_service_pb2.ListTransactionsRequest(user_id=arguments.user, page_size=arguments.limit)
    answer = await stub.ListTransactions(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    print(f"{'seq':>5}  {'booked at (UTC)':<19}  {'source':<10}  {'credits':>14}  {'balance':>14}  event")
    for entry in answer.transactions:
        print(_transaction_line(entry))


async def _explain(client: Client, arguments: argparse.Namespace) -> None:
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    event_id = arguments.event
    if not event_id:
        newest = await stub.ListTransactions(
            ledger_service_pb2.ListTransactionsRequest(
                user_id=arguments.user, source=transaction_pb2.TRANSACTION_SOURCE_CHARGE, page_size=1
            ),
            metadata=client.metadata, timeout=client.timeout,
        )
        if not newest.transactions:
            fail(f"{arguments.user} has no charge yet")
        event_id = newest.transactions[0].event_id
    request = ledger_service_pb2.ExplainChargeRequest(user_id=arguments.user, event_id=event_id)
    answer = await stub.ExplainCharge(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    quote = answer.transaction.quote
    print(f"charge {event_id}, entry {answer.transaction.seq}, rule {quote.price_rule_id} v{quote.price_rule_version}")
    for line in answer.lines:
        print(f"  {line.component:<14} {line.tokens:>8} x {line.rate_pico:>14} pico = {line.amount_pico:>18} pico")
    print(f"  recomputed {credits_text(answer.recomputed_micros)} credits, booked "
          f"{credits_text(-answer.transaction.amount_micros)}: {'agrees' if answer.agrees else 'DISAGREES'}")


async def _verify(client: Client, arguments: argparse.Namespace) -> None:
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    request = ledger_service_pb2.VerifyLedgerRequest(user_id=arguments.user or "", all=not arguments.user)
    findings = 0
    async for answer in stub.VerifyLedger(request, metadata=client.metadata, timeout=client.timeout):
        if arguments.json:
            show_json(answer)
        elif answer.HasField("finding"):
            finding = answer.finding
            print(f"{finding.kind} {finding.user_id} entry {finding.seq}: {finding.detail}")
        else:
            summary = answer.summary
            print(f"{summary.accounts} accounts, {summary.entries} entries, {summary.findings} findings")
        findings = answer.summary.findings
    if findings:
        fail(f"{findings} findings")


async def _holds(client: Client, arguments: argparse.Namespace) -> None:
    stub = hold_service_pb2_grpc.HoldServiceStub(client.channel)
    request = hold_service_pb2.ListHoldsRequest(user_id=arguments.user)
    show_json(await stub.ListHolds(request, metadata=client.metadata, timeout=client.timeout))


async def _prices(client: Client, arguments: argparse.Namespace) -> None:
    stub = pricing_service_pb2_grpc.PricingServiceStub(client.channel)
    request = pricing_service_pb2.ListPriceRulesRequest(page_size=500)
    show_json(await stub.ListPriceRules(request, metadata=client.metadata, timeout=client.timeout))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tokenstore-service", description=__doc__)
    commands = parser.add_subparsers()
    service = ServiceCommands(
        module="tokenstore_service", prefix=PREFIX, load=load, serve=serve, schema=SCHEMA, migrations_folder=MIGRATIONS
    )
    service.add_to(commands)
    parser.set_defaults(run=service.serve)

    balance = commands.add_parser("balance", help="what an account has")
    balance.set_defaults(client=_balance)
    credit = commands.add_parser("credit", help="give an account credit, or take it")
    credit.add_argument("user")
    credit.add_argument("credits", type=micros_from_text, help="credits, at most six decimals; negative takes")
    credit.add_argument("--reason", default="credit by command line")
    credit.add_argument("--reference", default="")
    credit.add_argument("--key", default="", help="idempotency key; made when absent")
    credit.set_defaults(client=_credit)
    transactions = commands.add_parser("transactions", help="an account's newest entries")
    transactions.add_argument("--limit", type=int, default=20)
    transactions.set_defaults(client=_transactions)
    explain = commands.add_parser("explain", help="recompute a charge from the books")
    explain.add_argument("user")
    explain.add_argument("event", nargs="?", help="event id, for a call its call_id; else the newest charge")
    explain.set_defaults(client=_explain)
    verify = commands.add_parser("verify", help="check the books of one account, or of all")
    verify.add_argument("user", nargs="?")
    verify.set_defaults(client=_verify)
    holds = commands.add_parser("holds", help="an account's open holds")
    holds.set_defaults(client=_holds)
    prices = commands.add_parser("prices", help="the price rules")
    prices.set_defaults(client=_prices)
    for command in (balance, transactions, holds):
        command.add_argument("user")
    for command in (balance, credit, transactions, explain, verify, holds, prices):
        add_client_options(command, target=TARGET)

    arguments = parser.parse_args()
    if hasattr(arguments, "client"):
        run_client(arguments, arguments.client)
    else:
        arguments.run(arguments)
