"""I3 under ten thousand parallel calls of one user whose credit pays for a thousand."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable

import grpc.aio
import psycopg
from creditmesh.llm.v1 import llm_service_pb2_grpc

from tests.support.errors import reason_of
from tests.support.mesh import Mesh, stream_request
from tests.support.upstream import Upstream

CALLS = 10_000
PAID_FOR = 1_000
WATCH = """
SELECT a.balance_micros, a.held_micros,
    (SELECT coalesce(sum(held_micros), 0)::bigint FROM tokenstore.hold AS h WHERE h.user_id = a.user_id AND state = 1)
FROM tokenstore.account AS a WHERE user_id = 'crowd'
"""


class Watcher(threading.Thread):
    """Looks at the account all the time, in one statement, so at one moment each time."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.done = threading.Event()
        self.looks = 0
        self.most_held = 0
        self.wrong: list[tuple[int, int, int]] = []

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self.done.wait(0.02):
                row = connection.execute(WATCH).fetchone()
                if row is None:
                    continue
                balance, held, open_holds = row
                self.looks += 1
                self.most_held = max(self.most_held, held)
                if held != open_holds or held > balance:
                    self.wrong.append(row)


async def crowd(address: str) -> Counter[str]:
    """All calls at once over a few connections; a granted one is cancelled when all have been decided."""
    outcomes: Counter[str] = Counter()
    decided = asyncio.Semaphore(0)
    everybody = asyncio.Event()
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)
    ]

    async def one(number: int) -> None:
        stub = llm_service_pb2_grpc.LLMServiceStub(channels[number % len(channels)])
        call = stub.Stream(
            stream_request("crowd", "the same for all", max_output_tokens=64, min_output_tokens=64), timeout=120
        )
        try:
            async for event in call:
                if event.HasField("started"):
                    outcomes["granted"] += 1
                    break
        except grpc.aio.AioRpcError as error:
            outcomes[reason_of(error) or f"{error.code().name}: {error.details()}"] += 1
        decided.release()
        await everybody.wait()
        call.cancel()

    tasks = [asyncio.create_task(one(number)) for number in range(CALLS)]
    for _ in range(CALLS):
        await decided.acquire()
    everybody.set()
    await asyncio.gather(*tasks)
    for channel in channels:
        await channel.close()
    return outcomes


def test_the_sum_of_holds_never_exceeds_the_credit(new_mesh: Callable[..., Mesh], upstream: Upstream) -> None:
    mesh = new_mesh(LLM_LOCAL_TOKENS_PER_SECOND="0.01", LLM_HOLD_TTL_SECONDS="60", LLM_ACCESS_LOG="errors")
    mesh.start()
    mesh.credit("probe", 10**9)
    stream = mesh.calls.Stream(
        stream_request("probe", "the same for all", max_output_tokens=64, min_output_tokens=64), timeout=20
    )
    hold_micros = next(stream).started.hold_micros
    stream.cancel()
    mesh.credit("crowd", hold_micros * PAID_FOR)
    watcher = Watcher(mesh.tokenstore_url)
    watcher.start()
    outcomes = asyncio.run(crowd(mesh.llm_address))
    watcher.done.set()
    watcher.join()
    assert outcomes == {"granted": PAID_FOR, "INSUFFICIENT_CREDIT": CALLS - PAID_FOR}
    assert watcher.wrong == []
    assert watcher.looks > 20
    assert watcher.most_held == hold_micros * PAID_FOR
    mesh.wait_for_rest(90)
    assert mesh.findings() == []
    assert mesh.balance("crowd").balance_micros >= 0
