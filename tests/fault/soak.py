"""Everything at once for a long time: memory stays flat, and nothing is left behind. `make soak` runs ten minutes of it.

    python -m tests.fault.soak --seconds 600
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from creditmesh.llm.v1 import llm_service_pb2

from benchmarks.processes import rss_megabytes
from deploy.local.postgres import Postgres
from tests.support.databases import Databases
from tests.support.mesh import Mesh, generate_request, stream_request
from tests.support.ports import free_port
from tests.support.upstream import Upstream

THREADS = 12
USERS = 20
SAMPLE_SECONDS = 1.0
MOST_GROWTH = 1.10
"""Of resident memory, from the end of the first third to the end."""
SCHEMA = {"json_schema": {"name": "s", "schema": '{"type":"object","required":["a"]}'}}


@dataclass
class Soak:
    """A load of all kinds, and what was seen."""

    mesh: Mesh
    metrics: str
    outcomes: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, list[float]] = field(default_factory=lambda: {"llm": [], "tokenstore": []})

    def prepare(self, upstream: Upstream) -> None:
        for number in range(USERS):
            self.mesh.credit(f"user-{number}", 10**12)
        self.mesh.register("pro", upstream.base_url, "ok,words=30")
        self.mesh.register("slow", upstream.base_url, "ok,words=200,pause=0.01")
        self.mesh.register("cut", upstream.base_url, "close-after-3")
        self.mesh.register("mixed", upstream.base_url, "http-503", max_retries=0)
        self.mesh.register("mixed", upstream.base_url, "ok", priority=1, limits={"max_concurrency": 4})
        self.mesh.register("hedged", upstream.base_url, "ok,first=0.3", hedge_after={"nanos": 50_000_000})
        self.mesh.register("hedged", upstream.base_url, "ok", priority=1)
        self.mesh.register_local("json", default_params={"replies": ["{}", '{"a": 1}']})
        self.mesh.register_local("embedding")

    def one(self, chance: random.Random) -> str:
        user = f"user-{chance.randrange(USERS)}"
        kind = chance.choice(["generate", "stream", "leave", "cut", "mixed", "hedged", "json", "embed", "deadline", "refused"])
        calls = self.mesh.calls
        match kind:
            case "generate":
                calls.Generate(generate_request(user, request_id=str(chance.getrandbits(64))), timeout=30)
            case "stream" | "cut" | "mixed" | "hedged":
                list(calls.Stream(stream_request(user, model="pro" if kind == "stream" else kind), timeout=30))
            case "leave":
                stream = calls.Stream(stream_request(user, model="slow"), timeout=30)
                for _ in range(chance.randrange(1, 8)):
                    next(stream)
                stream.cancel()
            case "json":
                calls.Generate(generate_request(user, model="json", response_format=SCHEMA), timeout=30)
            case "embed":
                calls.Embed(llm_service_pb2.EmbedRequest(billing={"user_id": user}, inputs=["a", "b"]), timeout=30)
            case "deadline":
                list(calls.Stream(stream_request(user, model="slow"), timeout=0.3))
            case _:
                calls.Generate(generate_request("nobody-with-credit"), timeout=30)
        return kind

    def run(self, seconds: float) -> None:
        stop_at = time.monotonic() + seconds

        def work(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < stop_at:
                try:
                    self.outcomes[self.one(chance)] += 1
                except grpc.RpcError as error:
                    self.outcomes[error.code().name] += 1  # type: ignore[attr-defined]  # it is a call too

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < stop_at:
            time.sleep(SAMPLE_SECONDS)
            for name, process in (("llm", self.mesh.llm), ("tokenstore", self.mesh.tokenstore)):
                self.sizes[name].append(rss_megabytes(process.pid))
        for thread in threads:
            thread.join()

    def at_rest(self) -> dict[str, float]:
        """What the idle service still has."""
        self.mesh.wait_for_rest()
        time.sleep(1.5)  # a heartbeat shows the gauges
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        values = {name: float(value) for name, value in re.findall(r"^(llm_tasks|llm_running_calls|llm_held_micros) (\S+)$", text, re.MULTILINE)}
        return {**values, "files": float(len(list(Path(f"/proc/{self.mesh.llm.pid}/fd").iterdir())))}

    def growth(self, name: str) -> float:
        """The mean of the last tenth over that of the tenth after the first third."""
        sizes = self.sizes[name]
        tenth = max(1, len(sizes) // 10)
        first = sizes[len(sizes) // 3:len(sizes) // 3 + tenth]
        return (sum(sizes[-tenth:]) / tenth) / (sum(first) / len(first))


def soak(mesh: Mesh, upstream: Upstream, metrics: str, *, seconds: float, is_long: bool) -> dict[str, Any]:
    """Runs, checks that nothing is left, and tells. Memory is judged when there was time to see it."""
    load = Soak(mesh, metrics)
    load.prepare(upstream)
    load.run(max(2.0, seconds / 20))  # what is made lazily is there
    before = load.at_rest()
    load.sizes = {"llm": [], "tokenstore": []}
    load.run(seconds)
    after = load.at_rest()
    told = {
        "calls": sum(load.outcomes.values()), "outcomes": dict(load.outcomes), "before": before, "after": after,
        "growth": {name: round(load.growth(name), 3) for name in load.sizes},
        "megabytes": {name: round(sizes[-1]) for name, sizes in load.sizes.items()},
    }
    print(told)
    assert after["llm_running_calls"] == after["llm_held_micros"] == 0
    assert after["llm_tasks"] <= before["llm_tasks"] + 2, "a task was left behind"
    assert after["files"] <= before["files"] + 40, "a connection was left behind"  # kept-alive ones come and go
    assert load.outcomes["INTERNAL"] == load.outcomes["UNKNOWN"] == 0
    assert mesh.findings() == []
    if is_long:
        assert max(told["growth"].values()) <= MOST_GROWTH, told["growth"]
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="creditmesh-soak-"))
    folder.chmod(0o755)
    postgres = Postgres(folder / "postgres", settings={"max_connections": "200"})
    postgres.start()
    upstream = Upstream()
    upstream.start()
    metrics = f"127.0.0.1:{free_port()}"
    mesh = Mesh(Databases(postgres), folder / "logs", name="soak", settings={"LLM_METRICS_LISTEN": metrics, "LLM_ACCESS_LOG": "errors", "TOKENSTORE_ACCESS_LOG": "errors"})
    try:
        mesh.start()
        soak(mesh, upstream, metrics, seconds=arguments.seconds, is_long=arguments.seconds >= 120)
    finally:
        mesh.stop()
        upstream.stop()
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
