"""Command line of llm_service: the server's commands, and a user's, which use the gRPC API and nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import (
    call_pb2,
    chat_pb2,
    llm_service_pb2,
    llm_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

from llm_service.app import MIGRATIONS, serve
from llm_service.config import PREFIX, load
from llm_service.storage.tables import SCHEMA
from servicekit.cli import Client, ServiceCommands, add_client_options, credits_text, run_client, show_json

TARGET = "127.0.0.1:50051"


def _billing(arguments: argparse.Namespace) -> billing_pb2.BillingContext:
    return billing_pb2.BillingContext(user_id=arguments.user, request_id=arguments.request_id, scene="chat")


def _messages(arguments: argparse.Namespace) -> list[chat_pb2.Message]:
    return [chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.Content(text=arguments.text)])]


def _end_lines(
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
            print("\n" + _end_lines(answer.finished.finish_reason, answer.finished.usage, answer.finished.charge))


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
        print(_end_lines(output.finish_reason, answer.usage, answer.charge))


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


async def _register(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    key = arguments.key_file.read_text().strip() if arguments.key_file else os.environ.get("MODEL_API_KEY", "")
    request = model_service_pb2.RegisterModelRequest(model=model_service_pb2.Model(
        alias=arguments.alias, provider=model_service_pb2.PROVIDER_OPENAI_CHAT, base_url=arguments.base_url,
        upstream_model=arguments.upstream_model, api_key=arguments.key or key, active=True,
        context_window=arguments.context_window, max_output_tokens=arguments.max_output_tokens,
    ))
    show_json(await stub.RegisterModel(request, metadata=client.metadata, timeout=client.timeout))


async def _models(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    request = model_service_pb2.ListModelsRequest(page_size=500)
    show_json(await stub.ListModels(request, metadata=client.metadata, timeout=client.timeout))


async def _delete(client: Client, arguments: argparse.Namespace) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(client.channel)
    request = model_service_pb2.DeleteModelRequest(model_id=arguments.model_id)
    await stub.DeleteModel(request, metadata=client.metadata, timeout=client.timeout)
    print("deleted")


def main() -> None:
    parser = argparse.ArgumentParser(prog="llm-service", description=__doc__)
    commands = parser.add_subparsers()
    service = ServiceCommands(
        module="llm_service", prefix=PREFIX, load=load, serve=serve, schema=SCHEMA, migrations_folder=MIGRATIONS
    )
    service.add_to(commands)
    parser.set_defaults(run=service.serve)

    stream = commands.add_parser("stream", help="stream an answer and see usage and charge")
    generate = commands.add_parser("generate", help="get a whole answer")
    for command, work in ((stream, _stream), (generate, _generate)):
        command.add_argument("user")
        command.add_argument("text")
        command.add_argument("--model", default="", help="alias; empty = pro")
        command.add_argument("--request-id", default="", help="idempotency key; made when absent")
        command.add_argument("--max-output-tokens", type=int)
        command.set_defaults(client=work)
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
    register = commands.add_parser("register-model", help="register an OpenAI-compatible model server")
    register.add_argument("--alias", default="pro")
    register.add_argument("--base-url", required=True, help="e.g. http://127.0.0.1:3030/v1")
    register.add_argument("--upstream-model", required=True, help="name that the model server knows the model by")
    register.add_argument("--key", default="", help="its key; better --key-file or $MODEL_API_KEY")
    register.add_argument("--key-file", type=Path)
    register.add_argument("--context-window", type=int, default=0)
    register.add_argument("--max-output-tokens", type=int, default=0)
    register.set_defaults(client=_register)
    models = commands.add_parser("models", help="the registered models")
    models.set_defaults(client=_models)
    delete = commands.add_parser("delete-model", help="remove a model")
    delete.add_argument("model_id")
    delete.set_defaults(client=_delete)
    for command in (stream, generate, call, calls, cancel, register, models, delete):
        add_client_options(command, target=TARGET)

    arguments = parser.parse_args()
    if hasattr(arguments, "client"):
        run_client(arguments, arguments.client)
    else:
        arguments.run(arguments)
