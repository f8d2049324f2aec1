"""A thousand streams at once, and hundreds of clients that do not read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2_grpc

from benchmarks.processes import rss_megabytes
from tests.support.mesh import Mesh, stream_request
from tests.support.upstream import Upstream

STREAMS = 1000
STALLED = 500


def test_a_thousand_streams_are_open_at_once_and_each_is_charged_once(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    mesh.start()
    mesh.register_local("pro", default_params={"words": 12, "tokens_per_second": 2})
    users = [f"user-{number}" for number in range(20)]
    for user in users:
        mesh.credit(user, 10**10)
    open_now, most = 0, 0

    async def one(stub: llm_service_pb2_grpc.LLMServiceStub, number: int) -> tuple[str, int]:
        nonlocal open_now, most
        text, tokens = "", 0
        async for event in stub.Stream(stream_request(users[number % 20], max_output_tokens=50), timeout=120):
            if event.HasField("started"):
                open_now += 1
                most = max(most, open_now)
            elif event.HasField("delta"):
                text += event.delta.text
            else:
                open_now -= 1
                tokens = event.finished.usage.output_tokens
                assert event.finished.finish_reason == chat_pb2.FINISH_REASON_STOP
        return text, tokens

    async def all_of_them() -> list[tuple[str, int]]:
        async with grpc.aio.insecure_channel(mesh.llm_address) as channel:
            stub = llm_service_pb2_grpc.LLMServiceStub(channel)
            return await asyncio.gather(*(one(stub, number) for number in range(STREAMS)))

    answers = asyncio.run(all_of_them())
    assert answers == [(" word" * 12, 12)] * STREAMS
    assert most == STREAMS
    mesh.wait_for_rest()
    charged = [entry for user in users for entry in mesh.transactions(user) if entry.call_id]
    assert len({entry.call_id for entry in charged}) == len(charged) == STREAMS
    assert mesh.findings() == []


def test_clients_that_do_not_read_cost_no_memory_and_stop_their_model_servers(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh = new_mesh(LLM_HOLD_TTL_SECONDS="60")
    mesh.start()
    mesh.credit("alice", 10**13)
    mesh.register("pro", upstream.base_url, "ok,words=100000", max_output_tokens=200_000)
    # A first answer loads what is loaded lazily.
    mesh.register("small", upstream.base_url, "ok")
    list(mesh.calls.Stream(stream_request("alice", model="small"), timeout=20))
    before = rss_megabytes(mesh.llm.pid)

    async def stall() -> tuple[float, float, int]:
        async with grpc.aio.insecure_channel(mesh.llm_address) as channel:
            stub = llm_service_pb2_grpc.LLMServiceStub(channel)
            streams = [stub.Stream(stream_request("alice"), timeout=300) for _ in range(STALLED)]
            for stream in streams:
                await stream.read()
            sizes, quiet, last = [], 0, -1.0
            while quiet < 3 and len(sizes) < 120:
                await asyncio.sleep(0.5)
                busy = cpu_ticks(mesh.llm.pid)
                quiet = quiet + 1 if busy - last < 15 else 0  # under 0.3 of a core: nothing flows any more
                last = busy
                sizes.append(rss_megabytes(mesh.llm.pid))
            still_open = upstream.open_streams
            for stream in streams:
                stream.cancel()
            return sizes[-1], max(sizes), still_open

    settled, _, still_open = asyncio.run(stall())
    assert still_open == STALLED, "the model servers wait too"
    assert settled - before < STALLED * 0.6, f"{settled - before:.0f} MiB for {STALLED} streams"
    deadline = time.monotonic() + 20
    while upstream.open_streams:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    mesh.wait_for_rest()
    assert mesh.findings() == []


def cpu_ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return float(fields[11]) + float(fields[12])
