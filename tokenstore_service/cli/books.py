"""An operator's commands; they use the gRPC API only."""

from __future__ import annotations

import argparse
from typing import Any

from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    balance_service_pb2_grpc,
    charge_service_pb2,
    charge_service_pb2_grpc,
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
    credits_text,
    fail,
    micros_from_text,
    show_json,
)
from servicekit.core.ids import RandomIdSource


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
    what = entry.description
    if entry.HasField("usage"):
        what = f"{entry.model} {entry.usage.input_tokens}+{entry.usage.output_tokens} tokens"
    elif entry.unit_type:
        what = f"{entry.model} {entry.unit_amount} {entry.unit_type}"
    when = entry.booked_at.ToDatetime().isoformat(sep=" ", timespec="seconds")
    return (
        f"{entry.seq:>5}  {when}  {source:<10}  {credits_text(entry.amount_micros):>14}"
        f"  {credits_text(entry.balance_after_micros):>14}  {entry.event_id}"
        f"  {what}"
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


async def _issues(client: Client, arguments: argparse.Namespace) -> None:
    stub = charge_service_pb2_grpc.ChargeServiceStub(client.channel)
    request = charge_service_pb2.ListChargeIssuesRequest(user_id=arguments.user or "", page_size=100)
    answer = await stub.ListChargeIssues(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for issue in answer.issues:
        kind = charge_service_pb2.ChargeIssueKind.Name(issue.kind).removeprefix("CHARGE_ISSUE_KIND_").lower()
        actions = [
            charge_service_pb2.ChargeIssueAction.Name(action).removeprefix("CHARGE_ISSUE_ACTION_").lower()
            for action in issue.actions
        ]
        what = f"{issue.user_id} {issue.event_id}: {issue.detail}"
        print(f"{issue.issue_id:>6}  {kind:<12} {what} [{', '.join(actions)}]")
    print(f"{len(answer.issues)} open{' (there are more)' if answer.next_page_token else ''}")


async def _resolve(client: Client, arguments: argparse.Namespace) -> None:
    stub = charge_service_pb2_grpc.ChargeServiceStub(client.channel)
    action = charge_service_pb2.ChargeIssueAction.Value(f"CHARGE_ISSUE_ACTION_{arguments.action.upper()}")
    request = charge_service_pb2.ResolveChargeIssueRequest(
        issue_id=arguments.issue, action=action, note=arguments.note
    )
    show_json(await stub.ResolveChargeIssue(request, metadata=client.metadata, timeout=client.timeout))


async def _watch(client: Client, arguments: argparse.Namespace) -> None:
    stub = balance_service_pb2_grpc.BalanceServiceStub(client.channel)
    request = balance_service_pb2.WatchBalanceRequest(user_id=arguments.user)
    async for answer in stub.WatchBalance(request, metadata=client.metadata):
        print(_balance_line(answer.balance), flush=True)


async def _usage(client: Client, arguments: argparse.Namespace) -> None:
    stub = ledger_service_pb2_grpc.LedgerServiceStub(client.channel)
    group = ledger_service_pb2.ConsumptionGroup.Value(f"CONSUMPTION_GROUP_{arguments.by.upper()}")
    request = ledger_service_pb2.GetConsumptionRequest(
        user_id=arguments.user, period=arguments.period, group_by=group
    )
    answer = await stub.GetConsumption(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for sums in [*answer.groups, answer.total]:
        print(f"{sums.key or 'total':<24} {sums.calls:>8} calls {sums.total_tokens:>12} tokens"
              f" {credits_text(sums.credit_micros):>16} credits")


def add_to(commands: Any, add_client: Any) -> None:
    def client_command(name: str, run: Any, text: str) -> Any:
        command = commands.add_parser(name, help=text)
        command.set_defaults(client=run)
        return command

    balance = client_command("balance", _balance, "what an account has")
    watch = client_command("watch", _watch, "an account's balance, again after every change")
    credit = client_command("credit", _credit, "give an account credit, or take it")
    credit.add_argument("user")
    credit.add_argument("credits", type=micros_from_text, help="credits, at most six decimals; negative takes")
    credit.add_argument("--reason", default="credit by command line")
    credit.add_argument("--reference", default="command line")
    credit.add_argument("--key", default="", help="idempotency key; made when absent")
    transactions = client_command("transactions", _transactions, "an account's newest entries")
    transactions.add_argument("--limit", type=int, default=20)
    explain = client_command("explain", _explain, "recompute a charge from the books")
    explain.add_argument("user")
    explain.add_argument("event", nargs="?", help="event id, for a call its call_id; else the newest charge")
    usage = client_command("usage", _usage, "what an account used, by hour's sums")
    usage.add_argument("--period", choices=["24h", "7d", "30d", "all"], default="24h")
    usage.add_argument("--by", choices=["none", "model", "scene", "hour", "day"], default="model")
    verify = client_command("verify", _verify, "check the books of one account, or of all")
    verify.add_argument("user", nargs="?")
    holds = client_command("holds", _holds, "an account's open holds")
    prices = client_command("prices", _prices, "the price rules")
    issues = client_command("issues", _issues, "charges that are not simply applied, and what can be done")
    issues.add_argument("user", nargs="?")
    resolve = client_command("resolve", _resolve, "retry, reprice or dismiss an issue")
    resolve.add_argument("issue", type=int)
    resolve.add_argument("action", choices=["retry", "reprice", "dismiss"])
    resolve.add_argument("--note", default="")
    for command in (balance, watch, transactions, usage, holds):
        command.add_argument("user")
    for command in (balance, watch, credit, transactions, explain, usage, verify, holds, prices, issues, resolve):
        add_client(command)
