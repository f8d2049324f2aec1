"""The load generator, a process of its own. Prints one JSON object.

    python -m benchmarks.load --kind generate --target HOST:PORT --concurrency 64 --seconds 5 [--rate 500]

Without --rate it is a closed loop of --concurrency callers; with it an open loop: calls begin when they are due,
however late the earlier ones are, and latency counts from when a call was due (no coordinated omission).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc.aio
from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import (
    chat_pb2,
    conversation_service_pb2,
    conversation_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
)
from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    balance_service_pb2_grpc,
    hold_service_pb2,
    hold_service_pb2_grpc,
)

from servicekit.core.ids import RandomIdSource

PROMPT = "Tell me in a few words what a prepaid ledger is, please."
USERS = 200


@dataclass
class Figures:
    """What one run measured; seconds."""

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    messages: int = 0
    tokens: int = 0
    errors: int = 0


Work = Callable[[int, Figures], Awaitable[None]]


def messages() -> list[Any]:
    return [{"role": "ROLE_USER", "content": [{"text": PROMPT}]}]


def user_of(number: int) -> str:
    return f"bench-{number % USERS}"


async def nothing() -> None:
    """To prepare."""


def make_work(
    kind: str, channel: grpc.aio.Channel, target: str, model: str
) -> tuple[Work, Callable[[], Awaitable[None]]]:
    """What is done again and again, and what is done once before."""
    calls = llm_service_pb2_grpc.LLMServiceStub(channel)
    echo = channel.unary_unary(
        "/bench.Echo/Unary", request_serializer=llm_service_pb2.GenerateRequest.SerializeToString,
        response_deserializer=llm_service_pb2.GenerateResponse.FromString,
    )
    gateway = channel.unary_unary(
        "/bench.Echo/Gateway", request_serializer=llm_service_pb2.GenerateRequest.SerializeToString,
        response_deserializer=llm_service_pb2.GenerateResponse.FromString,
    )
    echo_stream = channel.unary_stream(
        "/bench.Echo/Stream", request_serializer=llm_service_pb2.StreamRequest.SerializeToString,
        response_deserializer=llm_service_pb2.StreamResponse.FromString,
    )
    balances = balance_service_pb2_grpc.BalanceServiceStub(channel)
    holds = hold_service_pb2_grpc.HoldServiceStub(channel)
    ids = RandomIdSource()

    def generate_request(number: int) -> Any:
        return llm_service_pb2.GenerateRequest(
            billing=billing_pb2.BillingContext(user_id=user_of(number), request_id=str(ids.new_id()), scene="chat"),
            model=model, messages=messages(), max_output_tokens=64,
        )

    async def do_generate(number: int, figures: Figures) -> None:
        await calls.Generate(generate_request(number), timeout=30)

    async def do_gateway(number: int, figures: Figures) -> None:
        await gateway(generate_request(number))

    async def do_echo(number: int, figures: Figures) -> None:
        await echo(generate_request(number))

    async def read(stream: Any, figures: Figures, begun: float) -> None:
        first = True
        async for event in stream:
            figures.messages += 1
            if event.HasField("delta") and first:
                figures.first_tokens.append(time.perf_counter() - begun)
                first = False
            if event.HasField("finished"):
                figures.tokens += event.finished.usage.output_tokens

    async def do_stream(number: int, figures: Figures) -> None:
        begun = time.perf_counter()
        request = llm_service_pb2.StreamRequest(
            billing=billing_pb2.BillingContext(user_id=user_of(number), scene="chat"), model=model, messages=messages(),
            max_output_tokens=256,
        )
        await read(calls.Stream(request, timeout=30), figures, begun)

    chats = conversation_service_pb2_grpc.ConversationServiceStub(channel)
    open_chats: dict[int, str] = {}

    async def do_send(number: int, figures: Figures) -> None:
        """A message in a conversation of its user; they are made before."""
        user = user_of(number)
        begun = time.perf_counter()
        request = conversation_service_pb2.SendMessageRequest(
            user_id=user, conversation_id=open_chats[number % USERS], content=[chat_pb2.Content(text=PROMPT)],
            max_output_tokens=256,
        )
        await read(chats.SendMessage(request, timeout=30), figures, begun)

    async def open_all() -> None:
        for number in range(USERS):
            made = await chats.CreateConversation(conversation_service_pb2.CreateConversationRequest(
                user_id=user_of(number), model=model, title="bench"
            ), timeout=30)
            open_chats[number] = made.conversation.conversation_id

    async def do_echo_stream(number: int, figures: Figures) -> None:
        billing = billing_pb2.BillingContext(user_id=user_of(number))
        request = llm_service_pb2.StreamRequest(billing=billing, messages=messages())
        await read(echo_stream(request), figures, time.perf_counter())

    async def do_balance(number: int, figures: Figures) -> None:
        await balances.GetBalance(balance_service_pb2.GetBalanceRequest(user_id=user_of(number)), timeout=30)

    async def do_hold(number: int, figures: Figures) -> None:
        request = hold_service_pb2.OpenHoldsRequest(requests=[hold_service_pb2.HoldRequest(
            call_id=str(ids.new_id()), user_id=user_of(number), scene="chat", provider="LOCAL", model="pro",
            input_tokens=10, max_output_tokens=10, min_output_tokens=1,
        )])
        await holds.OpenHolds(request, timeout=30)

    session: list[aiohttp.ClientSession] = []
    portkey = os.environ.get("BENCH_PORTKEY_CONFIG", "")

    async def do_upstream(number: int, figures: Figures) -> None:
        """Straight to the stand-in: what the time to first token is without us."""
        if not session:
            session.append(aiohttp.ClientSession())
        begun = time.perf_counter()
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
        async with session[0].post(f"http://{target}/v1/chat/completions", json=body) as response:
            first = True
            async for data in response.content.iter_any():
                if first and b"content" in data:
                    figures.first_tokens.append(time.perf_counter() - begun)
                    first = False

    async def do_http(number: int, figures: Figures) -> None:
        """A whole answer by HTTP: the stand-in itself, or another gateway before it."""
        if not session:
            session.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 64}
        headers = {"Authorization": "Bearer sk-bench"}
        if portkey:
            headers["x-portkey-config"] = portkey
        async with session[0].post(f"http://{target}/v1/chat/completions", json=body, headers=headers) as response:
            await response.read()
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}")

    return {
        "http": do_http, "generate": do_generate, "echo": do_echo, "gateway": do_gateway, "stream": do_stream,
        "send": do_send, "echo-stream": do_echo_stream, "balance": do_balance, "hold": do_hold, "upstream": do_upstream,
    }[kind], open_all if kind == "send" else nothing


async def closed_loop(work: Work, figures: Figures, *, concurrency: int, seconds: float) -> float:
    stop_at = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        while time.perf_counter() < stop_at:
            await timed(work, figures, number, time.perf_counter())
            number += concurrency

    begun = time.perf_counter()
    await asyncio.gather(*map(caller, range(concurrency)))
    return time.perf_counter() - begun


async def open_loop(work: Work, figures: Figures, *, rate: float, seconds: float) -> float:
    begun = time.perf_counter()
    tasks = []
    for number in range(int(rate * seconds)):
        due = begun + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(timed(work, figures, number, due)))
    await asyncio.gather(*tasks)
    return time.perf_counter() - begun


async def timed(work: Work, figures: Figures, number: int, due: float) -> None:
    try:
        await work(number, figures)
    except (grpc.aio.AioRpcError, aiohttp.ClientError, RuntimeError):
        figures.errors += 1
    else:
        figures.latencies.append(time.perf_counter() - due)


def percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        works = []
        for _ in range(arguments.channels):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(arguments.target, options=options))
            made, prepare = make_work(arguments.kind, channel, arguments.target, arguments.model)
            await prepare()
            works.append(made)

        async def work(number: int, figures: Figures) -> None:
            await works[number % len(works)](number, figures)

        await closed_loop(work, Figures(), concurrency=min(8, arguments.concurrency), seconds=arguments.warm_up)
        figures = Figures()
        if arguments.rate:
            took = await open_loop(work, figures, rate=arguments.rate, seconds=arguments.seconds)
        else:
            took = await closed_loop(
                work, figures, concurrency=arguments.concurrency, seconds=arguments.seconds
            )
    return {
        "calls": len(figures.latencies), "errors": figures.errors, "seconds": round(took, 3),
        "rate": round(len(figures.latencies) / took, 1), "messages_per_second": round(figures.messages / took),
        "tokens_per_second": round(figures.tokens / took),
        "p50": percentile(figures.latencies, 0.5), "p99": percentile(figures.latencies, 0.99),
        "first_p50": percentile(figures.first_tokens, 0.5), "first_p99": percentile(figures.first_tokens, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--model", default="unary")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--channels", type=int, default=1, help="connections; several workers need several")
    parser.add_argument("--warm-up", type=float, default=1.0)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
