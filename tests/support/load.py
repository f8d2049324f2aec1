"""Load by many threads, and the question that every fault test ends with: was every call charged exactly once?"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from creditmesh.llm.v1 import call_pb2, llm_service_pb2

from tests.support.errors import reason_of
from tests.support.mesh import Mesh, generate_request, stream_request
from tests.support.upstream import Upstream

CREDIT = 10**12
THREADS = 16


@dataclass
class Load:
    """Calls of several users; each has a request_id of its own, which is also its prompt."""

    mesh: Mesh
    prefix: str
    users: int = 4
    model: str = "pro"
    outcomes: Counter[str] = field(default_factory=Counter)
    _numbers: Any = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def user(self, number: int) -> str:
        return f"{self.prefix}-user-{number % self.users}"

    @property
    def all_users(self) -> list[str]:
        return [self.user(number) for number in range(self.users)]

    def give_credit(self, micros: int = CREDIT) -> None:
        for user in self.all_users:
            self.mesh.credit(user, micros)

    def run(self, calls: int, *, threads: int = THREADS) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._one, [next(self._numbers) for _ in range(calls)]))

    def run_in_background(self, calls: int, *, threads: int = THREADS) -> threading.Thread:
        thread = threading.Thread(target=self.run, args=(calls,), kwargs={"threads": threads}, daemon=True)
        thread.start()
        return thread

    def _one(self, number: int) -> None:
        text = f"{self.prefix}-{number}"
        fields = {"request_id": text, "model": self.model, "max_output_tokens": 64}
        try:
            if number % 3 == 0:
                self.mesh.calls.Generate(generate_request(self.user(number), text, **fields), timeout=20)
            else:
                for _ in self.mesh.calls.Stream(stream_request(self.user(number), text, **fields), timeout=20):
                    pass
            outcome = "ok"
        except grpc.RpcError as error:
            outcome = reason_of(error) or error.code().name  # type: ignore[attr-defined]  # it is a call too
        with self._lock:
            self.outcomes[outcome] += 1


@dataclass
class Tally:
    """What became of the calls that reached the model."""

    reached: int = 0
    charged: int = 0
    unknown: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    charged_without_reaching: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"reached the model {self.reached}, charged {self.charged}, unknown {self.unknown}, lost {len(self.lost)},"
            f" doubled {len(self.doubled)}"
        )


def tally(load: Load, upstream: Upstream) -> Tally:
    """Compares what reached the model with the books and the journal."""
    entries: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for user in load.all_users:
        entries.update(entry.request_id for entry in load.mesh.transactions(user) if entry.call_id)
        request = llm_service_pb2.ListCallsRequest(
            user_id=user, state=call_pb2.CALL_STATE_UNKNOWN_OUTCOME, page_size=500
        )
        while True:
            answer = load.mesh.calls.ListCalls(request, timeout=10)
            unknown.update(call.request_id for call in answer.calls)
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
    result = Tally()
    for text in [text for text in upstream.reached if text.startswith(f"{load.prefix}-")]:
        result.reached += 1
        if entries[text] == 1:
            result.charged += 1
        elif entries[text] > 1:
            result.doubled.append(text)
        elif unknown[text]:
            result.unknown += 1
        else:
            result.lost.append(text)
    result.charged_without_reaching = [text for text in entries if not upstream.reached[text]]
    return result


def assert_exactly_once(load: Load, upstream: Upstream) -> Tally:
    """At rest: each call that reached the model is charged once or a visible unknown outcome; the books agree."""
    load.mesh.wait_for_rest()
    result = tally(load, upstream)
    assert (result.lost, result.doubled, result.charged_without_reaching) == ([], [], []), str(result)
    assert load.mesh.findings() == []
    assert all(load.mesh.balance(user).held_micros == 0 for user in load.all_users)
    return result


def wait_until(condition: Any, *, seconds: float = 30.0, what: str = "the condition") -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, f"{what} did not come in {seconds} s"
        time.sleep(0.02)
