"""Runs all measurements (or those named) on a fresh mesh and writes RESULTS.md.

    python -m benchmarks [--only unary streams ...] [--runs 3] [--seconds 5] [--no-write]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg

from benchmarks.charges import charges_by_kafka, charges_by_rpc
from benchmarks.growth import GROWTH, export_all, grow, measure_reads
from benchmarks.memories import memory_jobs, memory_reads
from benchmarks.peers import peers_table
from benchmarks.processes import Cpu, load, rss_megabytes, start
from deploy.local.kafka import Kafka
from deploy.local.postgres import Postgres
from tests.support.databases import Databases
from tests.support.mesh import Mesh
from tests.support.ports import free_port

RESULTS = Path(__file__).parent / "RESULTS.md"
USERS = 200
LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM booked - ended) * 1000)
FROM unnest(%s::timestamptz[], %s::timestamptz[]) AS pair (booked, ended)
"""


def quarter_of_memory() -> int:
    """Megabytes: what PostgreSQL's manual advises for shared_buffers."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 // 2**20


class Bench:
    """Everything that runs during the measurements."""

    def __init__(self, folder: Path, *, runs: int, seconds: float, most_entries: int = GROWTH[-1]) -> None:
        self.most_entries = most_entries
        self.runs = runs
        self.seconds = seconds
        self.folder = folder
        self.postgres = Postgres(
            folder / "postgres", settings={"shared_buffers": f"{quarter_of_memory()}MB", "max_wal_size": "8GB"}
        )
        self.postgres.start()
        self.databases = Databases(self.postgres)
        self.upstream_port, self.echo_port = free_port(), free_port()
        self.upstream = start("benchmarks.upstream", str(self.upstream_port))
        self.echo = start("benchmarks.echo", str(self.echo_port), str(self.upstream_port))
        self.echo_address = f"127.0.0.1:{self.echo_port}"
        self.mesh = self.new_mesh("bench")
        self.cold_start = self._start()
        for name in ("unary", "paced-200", "chunks-200", "burst-200"):
            self.mesh.register(name, f"http://127.0.0.1:{self.upstream_port}/v1", name)
        for number in range(USERS):
            self.mesh.credit(f"bench-{number}", 10**14)
        with grpc.insecure_channel(self.echo_address) as channel:
            grpc.channel_ready_future(channel).result(timeout=20)

    def new_mesh(self, name: str, **settings: str) -> Mesh:
        quiet = {"LLM_ACCESS_LOG": "errors", "TOKENSTORE_ACCESS_LOG": "errors", "LLM_HOLD_TTL_SECONDS": "60"}
        return Mesh(self.databases, self.folder / "logs", name=name, settings={**quiet, **settings})

    def _start(self) -> float:
        begun = time.monotonic()
        self.mesh.start()
        return time.monotonic() - begun

    @property
    def pids(self) -> dict[str, int]:
        return {
            "llm": self.mesh.llm.pid, "tokenstore": self.mesh.tokenstore.pid, "postgresql": self.postgres.pid,
            "upstream": self.upstream.pid,
        }

    @functools.cached_property
    def pace(self) -> float:
        """Bars are for a machine whose bare echo makes 6 000 calls/s, and scale with it: this one's share of that."""
        return float(self.median("echo", self.echo_address, concurrency=64)["rate"]) / 6000

    def most_ms(self, bar: float) -> str:
        return f"bar: {bar:g} ms, at this machine's pace {bar / self.pace:.0f}"

    def least(self, bar: float, what: str) -> str:
        return f"bar: {bar:g} {what}, at this machine's pace {bar * self.pace:.0f}"

    def median(self, kind: str, target: str, **options: Any) -> dict[str, Any]:
        """Medians over the runs, with CPU milliseconds per call by process."""
        figures = []
        pids = {"echo": self.echo.pid} if target == self.echo_address else self.pids
        for _ in range(self.runs):
            before = Cpu(pids)
            one = load(kind, target, seconds=self.seconds, **options)
            warm_share = 1 + 1.0 / self.seconds  # the warm-up second is work too
            one["cpu"] = before.milliseconds_per(int(one["calls"] * warm_share)) if one["calls"] else {}
            figures.append(one)
        result = {
            name: statistics.median(each[name] for each in figures)
            for name in figures[0] if name != "cpu" and figures[0][name] is not None
        }
        result["cpu"] = {name: statistics.median(each["cpu"][name] for each in figures) for name in figures[0]["cpu"]}
        return result

    def stop(self) -> None:
        self.mesh.stop()
        for process in (self.upstream, self.echo):
            process.terminate()
            process.wait()
        self.postgres.stop()


Table = list[tuple[str, str, str]]


def cpu_text(cpu: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in cpu.items())


def unary(bench: Bench) -> Table:
    rows: Table = []
    echo_one = bench.median("echo", bench.echo_address, concurrency=1)
    one = bench.median("generate", bench.mesh.llm_address, concurrency=1)
    rows.append((
        "unary, one at a time", f"p50 {one['p50']} ms, p99 {one['p99']} ms",
        f"{one['p50'] / echo_one['p50']:.1f} times the echo's p50 of {echo_one['p50']} ms (bar: 8)",
    ))
    peak = 0.0
    for concurrency in (16, 64):
        echo = bench.median("echo", bench.echo_address, concurrency=concurrency)
        got = bench.median("generate", bench.mesh.llm_address, concurrency=concurrency)
        ours = sum(got["cpu"][name] for name in ("llm", "tokenstore", "postgresql"))
        peak = max(peak, got["rate"])
        rows.append((
            f"unary, concurrency {concurrency}",
            f"{got['rate']:.0f} calls/s, p50 {got['p50']} ms, p99 {got['p99']} ms, errors {got['errors']:.0f}",
            f"{got['rate'] / echo['rate']:.3f} of the echo's {echo['rate']:.0f}/s (bar: 0.35 at 64); CPU ms/call:"
            f" {cpu_text(got['cpu'])}; ours {ours:.3f} = {ours / echo['cpu']['echo']:.1f} times the echo's"
            f" {echo['cpu']['echo']:.3f} (bar: 4)",
        ))
    bare = bench.median("gateway", bench.echo_address, concurrency=64)
    rows.append((
        "a bare gateway (grpc.aio and aiohttp; no limits, no holds, no ledger), concurrency 64",
        f"{bare['rate']:.0f} calls/s, p50 {bare['p50']} ms, p99 {bare['p99']} ms, errors {bare['errors']:.0f}",
        f"{bare['rate'] / echo['rate']:.3f} of the echo's rate; CPU ms/call: {bare['cpu']['echo']:.3f} ="
        f" {bare['cpu']['echo'] / echo['cpu']['echo']:.1f} times the echo's",
    ))
    half = bench.median("generate", bench.mesh.llm_address, rate=peak / 2)
    rows.append((
        f"unary, open loop at half the peak ({peak / 2:.0f}/s)",
        f"p50 {half['p50']} ms, p99 {half['p99']} ms, errors {half['errors']:.0f}", f"p99, {bench.most_ms(20)}",
    ))
    rows.append(call_to_ledger(bench))
    return rows


def call_to_ledger(bench: Bench) -> tuple[str, str, str]:
    """From the call's end in the journal to its entry in the ledger, for the calls of the last run."""
    bench.mesh.wait_for_rest()
    ended = dict(bench.mesh.rows(
        bench.mesh.llm_url, "SELECT call_id, ended_at FROM llm.call WHERE state = 2 ORDER BY ended_at DESC LIMIT 3000"
    ))
    booked = bench.mesh.rows(
        bench.mesh.tokenstore_url, "SELECT call_id, booked_at FROM tokenstore.ledger_entry WHERE call_id = ANY(%s)",
        (list(ended),),
    )
    pairs = [(moment, ended[call_id]) for call_id, moment in booked]
    (row,) = bench.mesh.rows(
        bench.mesh.llm_url, LATENCY, ([booked for booked, _ in pairs], [ended for _, ended in pairs])
    )
    p50, p99 = row[0]
    return (
        "call end to ledger, at half the peak rate", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms",
        f"{len(pairs)} calls; p50, {bench.most_ms(50)}; p99, {bench.most_ms(300)}",
    )


def streams(bench: Bench) -> Table:
    rows: Table = []
    bare = bench.median("upstream", f"127.0.0.1:{bench.upstream_port}", concurrency=1, model="chunks-200")
    one = bench.median("stream", bench.mesh.llm_address, concurrency=1, model="chunks-200")
    rows.append((
        "time to first token added, one at a time", f"{one['first_p50'] - bare['first_p50']:.2f} ms",
        f"p50 {one['first_p50']} ms through the mesh, {bare['first_p50']} ms straight; {bench.most_ms(3)}",
    ))
    echo = bench.median("echo-stream", bench.echo_address, concurrency=16)
    got = bench.median("stream", bench.mesh.llm_address, concurrency=16, model="chunks-200")
    rows.append((
        "streams of 200 chunks, concurrency 16",
        f"{got['rate']:.0f} streams/s, {got['messages_per_second']:.0f} messages/s,"
        f" {got['tokens_per_second']:.0f} tokens/s",
        f"bare grpc.aio: {echo['messages_per_second']:.0f} messages/s; CPU ms/stream: {cpu_text(got['cpu'])}",
    ))
    paced = bench.median("stream", bench.mesh.llm_address, concurrency=96, model="paced-200")
    rows.append((
        "streams of 200 single tokens, paced, concurrency 96",
        f"{paced['tokens_per_second']:.0f} tokens/s in {paced['messages_per_second']:.0f} messages/s,"
        f" {paced['rate']:.0f} streams/s",
        f"{bench.least(25_000, 'messages/s')}; bare grpc.aio {echo['messages_per_second']:.0f}; tokens that wait share"
        f" a message; CPU ms/stream: {cpu_text(paced['cpu'])}",
    ))
    burst = bench.median("stream", bench.mesh.llm_address, concurrency=16, model="burst-200")
    rows.append((
        "streams of 200 tokens in bursts, concurrency 16",
        f"{burst['rate']:.0f} streams/s, {burst['tokens_per_second']:.0f} tokens/s",
        f"{bench.least(100_000, 'tokens/s')}; CPU ms/stream: {cpu_text(burst['cpu'])}",
    ))
    half = bench.median("stream", bench.mesh.llm_address, rate=got["rate"] / 2, model="chunks-200")
    rows.append((
        f"time to first token, open loop at half the peak ({got['rate'] / 2:.0f} streams/s)",
        f"p50 {half['first_p50']} ms, p99 {half['first_p99']} ms",
        f"{half['first_p50'] - bare['first_p50']:.1f} ms added; {bench.most_ms(10)}",
    ))
    return rows


def conversations(bench: Bench) -> Table:
    rows: Table = []
    for concurrency in (1, 16):
        stream = bench.median("stream", bench.mesh.llm_address, concurrency=concurrency, model="unary")
        sent = bench.median("send", bench.mesh.llm_address, concurrency=concurrency, model="unary")
        rows.append((
            f"SendMessage beside Stream, concurrency {concurrency}",
            f"p50 {sent['p50'] - stream['p50']:+.2f} ms, first token {sent['first_p50'] - stream['first_p50']:+.2f} ms",
            f"{sent['rate']:.0f}/s, p50 {sent['p50']} ms, p99 {sent['p99']} ms, beside {stream['rate']:.0f}/s, p50"
            f" {stream['p50']} ms, p99 {stream['p99']} ms ({bench.most_ms(3)}, one at a time); few messages a"
            f" conversation; CPU ms/call: {cpu_text(sent['cpu'])}",
        ))
    return rows


def memory(bench: Bench) -> Table:
    """Jobs by the built-in model, which answers at once: one fact each, all new; and Retrieve, of users with 1 000."""
    mesh = bench.new_mesh("memory")
    mesh.start_memory(MEMORY_ACCESS_LOG="errors", MEMORY_CHORES_SECONDS="30")
    rows: Table = []
    try:
        rows += memory_jobs(bench, mesh)
        rows += memory_reads(bench, mesh)
    finally:
        mesh.stop()
    return rows


def reads(bench: Bench) -> Table:
    rows: Table = []
    balance = bench.median("balance", bench.mesh.tokenstore_address, concurrency=16)
    echo = bench.median("echo", bench.echo_address, concurrency=16)
    rows.append((
        "GetBalance, concurrency 16", f"{balance['rate']:.0f}/s, p50 {balance['p50']} ms, p99 {balance['p99']} ms",
        f"{balance['rate'] / echo['rate']:.2f} of the echo's {echo['rate']:.0f}/s (bar: 4 000/s, p99 <= 5 ms); CPU"
        f" ms/call: {cpu_text(balance['cpu'])}",
    ))
    hold = bench.median("hold", bench.mesh.tokenstore_address, concurrency=64)
    rows.append((
        "OpenHolds one by one, 64 callers", f"{hold['rate']:.0f} holds/s, p50 {hold['p50']} ms, p99 {hold['p99']} ms",
        f"CPU ms/call: {cpu_text(hold['cpu'])}",
    ))
    return rows


def charges(bench: Bench) -> Table:
    rows: Table = []
    for users, name in ((1000, "1 000 accounts"), (1, "one hot account")):
        for size in (1, 100, 500):
            mesh = bench.new_mesh(f"charges-{users}-{size}")
            mesh.start()
            count = {1: 3_000, 100: 20_000, 500: 40_000}[size]
            pids = {"tokenstore": mesh.tokenstore.pid, "postgresql": bench.postgres.pid}
            cpu = Cpu(pids)
            rates = [
                asyncio.run(charges_by_rpc(mesh.tokenstore_address, users=users, batch_size=size, count=count))
                for _ in range(bench.runs)
            ]
            rows.append((
                f"charges by RecordCharges, batches of {size}, {name}", f"{statistics.median(rates):.0f} charges/s",
                f"CPU ms/charge: {cpu_text(cpu.milliseconds_per(count * bench.runs))}",
            ))
            mesh.stop()
    broker = Kafka(bench.folder / "kafka", port=free_port())
    broker.start()
    for users, name in ((1000, "1 000 accounts"), (1, "one hot account")):
        rates = []
        for run in range(bench.runs):
            prefix = f"bench-{users}-{run}."
            mesh = bench.new_mesh(
                f"kafka-{users}", TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS=broker.bootstrap_servers,
                TOKENSTORE_KAFKA_TOPIC_PREFIX=prefix, TOKENSTORE_KAFKA_GROUP=prefix,
            )
            rates.append(charges_by_kafka(mesh, broker.bootstrap_servers, prefix=prefix, users=users, count=50_000))
            mesh.stop()
        rows.append((
            f"charges from real Kafka to committed ledger, {name}", f"{statistics.median(rates):.0f} charges/s",
            "50 000 events produced before, broker on the same cores (bar: 10 000)",
        ))
    broker.stop()
    return rows


def apply_alone(bench: Bench, url: str, *arguments: str) -> dict[str, float]:
    """Medians of benchmarks.apply in a process of its own."""
    figures = [
        json.loads(subprocess.run(
            [sys.executable, "-m", "benchmarks.apply", *arguments], env={**os.environ, "BENCH_DATABASE_URL": url},
            capture_output=True, check=True,
        ).stdout)
        for _ in range(bench.runs)
    ]
    return {name: statistics.median(each[name] for each in figures) for name in figures[0]}


def ledger(bench: Bench) -> Table:
    rows: Table = []
    for name, arguments in {
        "1 000 accounts": (), "one hot account": ("--users=1",), "1 000 accounts with 200 lots each": ("--lots=200",),
        "1 000 accounts with 200 lots, each for 9 charges": ("--lots=200", "--lot-micros=1000000"),
    }.items():
        got = apply_alone(bench, bench.databases.make("tokenstore"), *arguments)
        rows.append((
            f"charges applied alone, batches of 500, {name}", f"{got['rate']:.0f} charges/s",
            f"Python {got['cpu_ms']:.3f} ms/charge; {got['wal_bytes']:.0f} bytes of WAL and"
            f" {got['table_bytes']:.0f} bytes of tables and indexes per charge (bar: 20 000/s)",
        ))
    return rows


def growth(bench: Bench) -> Table:
    rows: Table = []
    mesh = bench.new_mesh("growth")
    for entries in (size for size in GROWTH if size <= bench.most_entries):
        seconds = grow(mesh.tokenstore_url, entries)
        got = apply_alone(bench, mesh.tokenstore_url, "--count=20000")
        mesh.tokenstore.start()
        mesh.wait_for_tokenstore()
        reads = asyncio.run(measure_reads(mesh.tokenstore_address))
        if entries == GROWTH[0]:
            before = rss_megabytes(mesh.tokenstore.pid)
            count, took = asyncio.run(export_all(mesh.tokenstore_address))
            rows.append((
                "ExportTransactions of everything", f"{count} entries in {took:.0f} s, {count / took:.0f}/s",
                f"RSS of tokenstore_service {before:.0f} MB before, {rss_megabytes(mesh.tokenstore.pid):.0f} MB after",
            ))
        mesh.tokenstore.stop()
        rows.append((
            f"{entries // 10**6} million entries of 10 000 accounts",
            f"apply {got['rate']:.0f} charges/s; page of 50 p50 {reads['page_p50']:.1f} p99 {reads['page_p99']:.1f} ms;"
            f" 30 days by model p50 {reads['sums_p50']:.1f} p99 {reads['sums_p99']:.1f} ms",
            f"filled in {seconds:.0f} s (bars: flat; page p99 <= 5 ms, dashboard <= 10 ms)",
        ))
    return rows


def footprint(bench: Bench) -> Table:
    cold = [bench.cold_start]
    for _ in range(bench.runs - 1):
        mesh = bench.new_mesh("cold")
        begun = time.monotonic()
        mesh.start()
        cold.append(time.monotonic() - begun)
        mesh.stop()
    return [
        ("RSS after the load above", f"llm_service {rss_megabytes(bench.mesh.llm.pid):.0f} MB, tokenstore_service"
         f" {rss_megabytes(bench.mesh.tokenstore.pid):.0f} MB", "bar: 250 MB each"),
        ("cold start of both to SERVING", f"{statistics.median(cold):.2f} s", "started together (bar: 3 s)"),
    ]


def workers(bench: Bench) -> Table:
    """One llm_service process against two that share the port; both cores are shared with everything else."""
    rows: Table = []
    for count in (1, 2):
        mesh = bench.new_mesh(f"workers-{count}", LLM_WORKERS=str(count))
        mesh.start()
        try:
            for name in ("unary", "chunks-200"):
                mesh.register(name, f"http://127.0.0.1:{bench.upstream_port}/v1", name)
            for number in range(USERS):
                mesh.credit(f"bench-{number}", 10**14)
            time.sleep(2.5)  # every worker has the models
            calls = load("generate", mesh.llm_address, concurrency=64, seconds=bench.seconds, model="unary", channels=8)
            got = load(
                "stream", mesh.llm_address, concurrency=16, seconds=bench.seconds, model="chunks-200", channels=8
            )
        finally:
            mesh.stop()
        rows.append((
            f"LLM_WORKERS={count}", f"unary at 64: {calls['rate']:.0f} calls/s, p50 {calls['p50']} ms;"
            f" streams at 16: {got['tokens_per_second']:.0f} tokens/s",
            f"errors {calls['errors'] + got['errors']}; 8 client channels, spread by the kernel",
        ))
    return rows


def peers(bench: Bench) -> Table:
    rows = peers_table(bench.upstream_port, seconds=bench.seconds)
    told = []
    for concurrency in (1, 16, 64):
        got = load("generate", bench.mesh.llm_address, concurrency=concurrency, seconds=bench.seconds, model="unary")
        told.append(
            f"c={concurrency}: {got['rate']:.0f}/s, p50 {got['p50']} ms, p99 {got['p99']} ms, errors {got['errors']}"
        )
    memory = sum(rss_megabytes(process.pid) for process in (bench.mesh.llm, bench.mesh.tokenstore))
    return [*rows, ("creditmesh, ledger on, one worker", "; ".join(told), f"RSS of both services {memory:.0f} MB")]


MEASUREMENTS: dict[str, Callable[[Bench], Table]] = {
    "unary": unary, "streams": streams, "conversations": conversations, "memory": memory, "workers": workers,
    "peers": peers, "reads": reads, "footprint": footprint, "charges": charges, "ledger": ledger, "growth": growth,
}
DEFAULT = [name for name in MEASUREMENTS if name not in ("growth", "peers")]
"""`growth` fills tens of gigabytes and takes long, `peers` needs other gateways installed: ask for them by --only."""


def conditions(bench: Bench) -> list[str]:
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), "unknown CPU",
    )
    with psycopg.connect(bench.postgres.url("postgres")) as connection:
        version = connection.info.server_version
    return [
        f"- {os.cpu_count()} cores ({cpu}) shared by servers, database, upstream stand-in and load generator;"
        f" {platform.system()} {platform.release()}, Python {platform.python_version()}, grpcio {grpc.__version__},"
        f" PostgreSQL {version // 10000}.{version % 100} embedded, fsync on, shared_buffers a quarter of the memory,"
        " over a Unix socket.",
        f"- One worker process per service, one at a time, load generator in its own process, {bench.runs} runs of"
        f" {bench.seconds:.0f} s each after 1 s of warm-up, medians. Hold, journal, outbox, ledger with hash chain and"
        " direct delivery are on; every call has a request_id of its own. 200 users.",
        "- Machines like this are shared and differ from day to day: compare ratios to the bare grpc.aio echo of the"
        " same run, and CPU milliseconds per call.",
    ]


def write(tables: dict[str, Table], text: list[str]) -> str:
    lines = ["# Results", "", "Written by `make bench`. Conditions:", "", *text]
    for name, rows in tables.items():
        lines += ["", f"## {name}", "", "| what | measured | beside |", "|---|---|---|"]
        lines += [f"| {what} | {measured} | {beside} |" for what, measured, beside in rows]
    return "\n".join(lines) + "\n"


def merged(old: str, new: str) -> str:
    """The new file, with the sections of the old one that were not measured this time, and its notes."""
    measured = {part.partition("\n")[0] for part in new.split("\n## ")[1:]}
    kept = [part for part in old.split("\n## ")[1:] if part.partition("\n")[0] not in measured]
    return "\n## ".join([new.rstrip("\n") + "\n", *kept])


@contextlib.contextmanager
def running(runs: int, seconds: float, most_entries: int = GROWTH[-1]) -> Iterator[Bench]:
    folder = Path(tempfile.mkdtemp(prefix="creditmesh-bench-"))
    folder.chmod(0o755)
    bench = Bench(folder, runs=runs, seconds=seconds, most_entries=most_entries)
    try:
        yield bench
    finally:
        bench.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(MEASUREMENTS), default=DEFAULT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--most-entries", type=int, default=GROWTH[-1], help="where growth ends")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with running(arguments.runs, arguments.seconds, arguments.most_entries) as bench:
        tables = {name: MEASUREMENTS[name](bench) for name in arguments.only}
        text = write(tables, conditions(bench))
    print(text)
    if not arguments.no_write:
        RESULTS.write_text(merged(RESULTS.read_text() if RESULTS.exists() else "", text))


if __name__ == "__main__":
    main()
