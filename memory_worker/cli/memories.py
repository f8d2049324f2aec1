"""Commands about memories: look at them, ask why, undo, erase."""

from __future__ import annotations

import argparse
from typing import Any

from creditmesh.memory.v1 import memory_pb2, memory_service_pb2, memory_service_pb2_grpc

from servicekit.cli import Client, add_client_options, credits_text, show_json


def _line(item: memory_pb2.MemoryItem) -> str:
    kind = memory_pb2.MemoryType.Name(item.type).removeprefix("MEMORY_TYPE_").lower()
    return f"{item.item_id}  {kind:<10}  {item.content}"


async def _items(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.ListItemsRequest(user_id=arguments.user, page_size=arguments.limit)
    answer = await stub.ListItems(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for item in answer.items:
        print(_line(item))


async def _retrieve(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.RetrieveRequest(user_id=arguments.user, query=arguments.query, explain=True)
    answer = await stub.Retrieve(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for each in answer.items:
        parts = " + ".join(f"{name} {value:.2f}" for name, value in sorted(each.parts.items()))
        print(f"{each.score:.2f}{' pinned' if each.pinned else ''}  {_line(each.item)}\n      {parts}")


async def _jobs(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.ListJobsRequest(user_id=arguments.user, page_size=arguments.limit)
    answer = await stub.ListJobs(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
        return
    for job in answer.jobs:
        state = memory_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
        print(f"{job.job_id}  {state:<18}  {job.calls} calls, {credits_text(job.credit_micros)} credits  {job.reason}")


async def _why(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.ExplainDecisionRequest(user_id=arguments.user, item_id=arguments.item_id)
    answer = await stub.ExplainDecision(request, metadata=client.metadata, timeout=client.timeout)
    if arguments.json:
        show_json(answer)
    else:
        print(answer.explanation)


async def _forget(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.DeleteItemRequest(user_id=arguments.user, item_id=arguments.item_id)
    answer = await stub.DeleteItem(request, metadata=client.metadata, timeout=client.timeout)
    print(f"deleted: {_line(answer.item)}")


async def _restore(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.RestoreItemRequest(user_id=arguments.user, item_id=arguments.item_id)
    answer = await stub.RestoreItem(request, metadata=client.metadata, timeout=client.timeout)
    print(f"restored: {_line(answer.item)}")


async def _erase(client: Client, arguments: argparse.Namespace) -> None:
    stub = memory_service_pb2_grpc.MemoryServiceStub(client.channel)
    request = memory_service_pb2.EraseUserRequest(user_id=arguments.user)
    answer = await stub.EraseUser(request, metadata=client.metadata, timeout=client.timeout)
    rows = ", ".join(f"{count} {table}" for table, count in sorted(answer.erased.items()))
    print(f"erased of {arguments.user}: {rows}")
    if answer.index_pending:
        print("the vector database did not answer: its vectors of this user are removed as soon as it does")


def add_to(commands: Any, target: str) -> None:
    """Adds items, retrieve, jobs, why, forget, restore, erase."""
    made = []
    for name, work, help_text in (
        ("items", _items, "what is remembered of a user"), ("retrieve", _retrieve, "what is worth knowing for a query"),
        ("jobs", _jobs, "the work on a user's turns"), ("why", _why, "why a memory is what it is"),
        ("forget", _forget, "delete a memory"), ("restore", _restore, "bring a memory back"),
        ("erase", _erase, "erase everything of a user for good"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("user")
        if name in ("why", "forget", "restore"):
            command.add_argument("item_id")
        if name == "retrieve":
            command.add_argument("query")
        if name in ("items", "jobs"):
            command.add_argument("--limit", type=int, default=50)
        command.set_defaults(client=work)
        made.append(command)
    for command in made:
        add_client_options(command, target=target)
