"""Commands about calls: run one, look at them, cancel one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import call_pb2, chat_pb2, llm_service_pb2, llm_service_pb2_grpc

from servicekit.cli import Client, add_client_options, credits_text, show_json


def _billing(arguments: argparse.Namespace) -> billing_pb2.BillingContext:
    return billing_pb2.BillingContext(user_id=arguments.user, request_id=arguments.request_id, scene="chat")


def _messages(arguments: argparse.Namespace) -> list[chat_pb2.Message]:
    return [chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.Content(text=arguments.text)])]


def end_lines(
    finish_reason: chat_pb2.FinishReason.ValueType, usage: billing_pb2.Usage, charge: billing_pb2.Charge
) -> str:
    reason = chat_pb2.FinishReason.Name(finish_reason).removeprefix("FINISH_REASON_")
    source = billing_pb2.UsageSource.Name(usage.source).removeprefix("USAGE_SOURCE_")
    status = billing_pb2.ChargeStatus.Name(charge.status).removeprefix("CHARGE_STATUS_")
    rule = f", rule {charge.price_rule_id} v{charge.price_rule_version}" if charge.price_rule_id else ""
    return (
        f"finished: {reason}\n"
        f"usage:    {usage.input_tokens} input + {usage.output_tokens} output tokens ({source})\n"
        f"charge:   {credits_text(charge.credit_micros)} credits ({status}{rule})"
    )


async def _stream(client: Client, arguments: argparse.Namespace) -> None:
    stub = llm_service_pb2_grpc.LLMServiceStub(client.channel)
    request = llm_service_pb2.StreamRequest(
        billing=_billing(arguments), model=arguments.model, messages=_messages(arguments),
        max_output_tokens=arguments.max_output_tokens,
    )
    async for answer in stub.Stream(request, metadata=client.metadata, timeout=client.timeout):
        if arguments.json:
            show_json(answer)
        elif answer.HasField("started"):
            started = answer.started
            print(f"call:     {started.call_id} by {started.provider}{' (replayed)' if started.replayed else ''}, "
                  f"{credits_text(started.hold_micros)} credits held")
        elif answer.HasField("delta"):
            sys.stdout.write(answer.delta.reasoning + answer.delta.text + answer.delta.tool_call_delta.arguments)
            sys.stdout.flush()
        else:
            print("\n" + end_lines(answer.finished.finish_reason, answer.finished.usage, answer.finished.charge))


async def _generate(client: Client, arguments: argparse.Namespace) -> None:
    stub = llm_service_pb2_grpc.LLMServiceStub(client.channel)
    request = llm_service_pb2.GenerateRequest(
        billing=_billing(arguments), model=arguments.model, messages=_messages(arguments),
        max_output_tokens=arguments.max_output_tokens,
    )
    answer = await stub.Generate(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for output in answer.outputs:
        print("".join(part.text for part in output.message.content))
        print(f"call:     {answer.call_id} by {answer.upstream_model}")
        print(end_lines(output.finish_reason, answer.usage, answer.charge))
    if answer.attempts > 1:
        print(f"attempts: {answer.attempts}{', another model than the first choice' if answer.fallback else ''}")


async def _call(client: Client, arguments: argparse.Namespace) -> None:
    stub = llm_service_pb2_grpc.LLMServiceStub(client.channel)
    request = llm_service_pb2.GetCallRequest(call_id=arguments.call_id)
    show_json(await stub.GetCall(request, metadata=client.metadata, timeout=client.timeout))


async def _calls(client: Client, arguments: argparse.Namespace) -> None:
    stub = llm_service_pb2_grpc.LLMServiceStub(client.channel)
    request = llm_service_pb2.ListCallsRequest(user_id=arguments.user, page_size=arguments.limit)
    answer = await stub.ListCalls(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for call in answer.calls:
        state = call_pb2.CallState.Name(call.state).removeprefix("CALL_STATE_")
        when = call.created_at.ToDatetime().isoformat(sep=" ", timespec="seconds")
        print(f"{when}  {call.call_id}  {state:<15}  {call.model}  {credits_text(call.charge.credit_micros)} credits"
              f"  {call.error_reason}")


async def _cancel(client: Client, arguments: argparse.Namespace) -> None:
    stub = llm_service_pb2_grpc.LLMServiceStub(client.channel)
    request = llm_service_pb2.CancelCallRequest(call_id=arguments.call_id)
    await stub.CancelCall(request, metadata=client.metadata, timeout=client.timeout)
    print("cancelling")


async def _embed(client: Client, arguments: argparse.Namespace) -> None:
    stub = llm_service_pb2_grpc.LLMServiceStub(client.channel)
    request = llm_service_pb2.EmbedRequest(
        billing=billing_pb2.BillingContext(user_id=arguments.user, request_id=arguments.request_id),
        model=arguments.model, inputs=arguments.text,
    )
    answer = await stub.Embed(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for each, text in zip(answer.embeddings, arguments.text, strict=True):
        first = ", ".join(f"{value:.4f}" for value in each.values[:6])
        print(f"{len(each.values)} dimensions: {first}, ...  {text[:40]!r}")
    print(f"usage:    {answer.usage.input_tokens} input tokens, {credits_text(answer.charge.credit_micros)} credits")


def add_to(commands: Any, target: str) -> None:
    """Adds stream, generate, embed, call, calls, cancel."""
    stream = commands.add_parser("stream", help="stream an answer and see usage and charge")
    generate = commands.add_parser("generate", help="get a whole answer")
    for command, work in ((stream, _stream), (generate, _generate)):
        command.add_argument("user")
        command.add_argument("text")
        command.add_argument("--model", default="", help="alias; empty = pro")
        command.add_argument("--request-id", default="", help="idempotency key; made when absent")
        command.add_argument("--max-output-tokens", type=int)
        command.set_defaults(client=work)
    embed = commands.add_parser("embed", help="turn texts into vectors")
    embed.add_argument("user")
    embed.add_argument("text", nargs="+")
    embed.add_argument("--model", default="", help="alias; empty = embedding")
    embed.add_argument("--request-id", default="", help="idempotency key; made when absent")
    embed.set_defaults(client=_embed)
    call = commands.add_parser("call", help="one call")
    call.add_argument("call_id")
    call.set_defaults(client=_call)
    calls = commands.add_parser("calls", help="a user's newest calls")
    calls.add_argument("user")
    calls.add_argument("--limit", type=int, default=20)
    calls.set_defaults(client=_calls)
    cancel = commands.add_parser("cancel", help="cancel a running call")
    cancel.add_argument("call_id")
    cancel.set_defaults(client=_cancel)
    for command in (stream, generate, embed, call, calls, cancel):
        add_client_options(command, target=target)
