"""`make run`: a whole mesh in the foreground. Data live under .run/ and survive; Ctrl-C stops everything in order."""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, NoReturn

# Starting PostgreSQL as another user forks; gRPC's own fork handlers crash the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local.kafka import Kafka, KafkaProblem
from deploy.local.postgres import Postgres, PostgresProblem

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = Path(os.environ.get("CREDITMESH_RUN_DIR", ROOT / ".run"))
LEAST_FREE_BYTES = 512 * 1024 * 1024
READY_SECONDS = 60.0
STOP_SECONDS = 45.0
KAFKA_PORT = 19092
COLOURS = {"tokenstore": "\033[36m", "llm": "\033[35m", "memory": "\033[33m"}
MODULES = {"tokenstore": "tokenstore_service", "llm": "llm_service", "memory": "memory_worker"}
HIDDEN_FIELDS = {"at", "level", "service", "event", "trace"}

BANNER = """
creditmesh is running{how}. Ctrl-C stops it; what it stored stays in {run}.

  llm_service         {llm}   (metrics http://{llm_metrics}/metrics)
  tokenstore_service  {tokenstore}   (metrics http://{tokenstore_metrics}/metrics)
  memory_worker       {memory}   (metrics http://{memory_metrics}/metrics)
  PostgreSQL          {postgres}{kafka}

No service token is asked for on this machine's loopback addresses (LLM_AUTH=none, TOKENSTORE_AUTH=none, MEMORY_AUTH=none).
Payments by the provider "mock" are taken without a signature (TOKENSTORE_ALLOW_MOCK_PAYMENT=true): for trying only.
While no model is registered, the aliases pro, embedding and those of the memory are served by the built-in LOCAL model; it
remembers by a few rules over English sentences. Try, in another terminal:

  .venv/bin/tokenstore-service credit alice 100{ts}
  .venv/bin/llm-service stream alice "Hello, what are you?"{ll}
  .venv/bin/tokenstore-service transactions alice{ts}
  .venv/bin/tokenstore-service explain alice{ts}
  .venv/bin/llm-service register-model --base-url http://127.0.0.1:3030/v1 --upstream-model NAME --key sk-...{ll}

the same with grpcurl:

  grpcurl -plaintext -d '{{"user_id":"alice","amount_micros":"100000000","reason":"welcome","reference":"t-1","idempotency_key":"k1"}}' \\
    {tokenstore} creditmesh.tokenstore.v1.LedgerService/AdjustBalance
  grpcurl -plaintext -d '{{"user_id":"alice","product_id":"free_100","idempotency_key":"o-1"}}' {tokenstore} creditmesh.tokenstore.v1.OrderService/CreateOrder
  grpcurl -plaintext -d '{{"billing":{{"user_id":"alice","scene":"chat"}},"messages":[{{"role":"ROLE_USER","content":[{{"text":"hi"}}]}}]}}' \\
    {llm} creditmesh.llm.v1.LLMService/Stream
  grpcurl -plaintext -d '{{"user_id":"alice","model":"pro","use_memories":true}}' {llm} creditmesh.llm.v1.ConversationService/CreateConversation
  grpcurl -plaintext -d '{{"user_id":"alice","conversation_id":"ID","request_id":"m1","content":[{{"text":"I live in Lisbon."}}]}}' \\
    {llm} creditmesh.llm.v1.ConversationService/SendMessage
  grpcurl -plaintext -d '{{"user_id":"alice","page_size":5}}' {tokenstore} creditmesh.tokenstore.v1.LedgerService/ListTransactions
  grpcurl -plaintext -d '{{"user_id":"alice","event_id":"CALL_ID"}}' {tokenstore} creditmesh.tokenstore.v1.LedgerService/ExplainCharge
  grpcurl -plaintext -d '{{"model":{{"alias":"pro","provider":"PROVIDER_OPENAI_CHAT","base_url":"http://127.0.0.1:3030/v1","upstream_model":"NAME","api_key":"sk-...","active":true}}}}' \\
    {llm} creditmesh.llm.v1.ModelService/RegisterModel
"""


def fail(message: str) -> NoReturn:
    print(f"creditmesh: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


class Server:
    """One service as a child process, its log lines prefixed and readable."""

    def __init__(self, name: str, environ: dict[str, str]) -> None:
        self.name = name
        self._environ = {**os.environ, **environ}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULES[self.name]], cwd=ROOT, env=self._environ, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )
        assert self._process.stdout is not None
        threading.Thread(target=self._show, args=(self._process.stdout,), daemon=True).start()

    def died(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _show(self, lines: IO[bytes]) -> None:
        colour, plain = (COLOURS[self.name], "\033[0m") if sys.stdout.isatty() else ("", "")
        for line in lines:
            text = readable(line.decode(errors="replace").rstrip())
            print(f"{colour}{self.name:<10} |{plain} {text}", flush=True)


def readable(line: str) -> str:
    """A JSON log line as `time LEVEL event field=value ...`; anything else as it is."""
    try:
        record = json.loads(line)
        clock, level, event = record["at"][11:23], record["level"], record["event"]
    except (ValueError, KeyError, TypeError):
        return line
    if event == "starting":
        return f"{clock} {level:<7} starting on {record.get('listen')}"
    facts = " ".join(f"{name}={value}" for name, value in record.items() if name not in HIDDEN_FIELDS and value != "")
    trace = f"\n{record['trace']}" if "trace" in record else ""
    return f"{clock} {level:<7} {event} {facts}{trace}"


def addresses() -> dict[str, str]:
    """Where everything listens; each may be changed by its environment variable."""
    return {
        "LLM_LISTEN": os.environ.get("LLM_LISTEN", "127.0.0.1:50051"),
        "LLM_METRICS_LISTEN": os.environ.get("LLM_METRICS_LISTEN", "127.0.0.1:9091"),
        "TOKENSTORE_LISTEN": os.environ.get("TOKENSTORE_LISTEN", "127.0.0.1:50052"),
        "TOKENSTORE_METRICS_LISTEN": os.environ.get("TOKENSTORE_METRICS_LISTEN", "127.0.0.1:9092"),
        "MEMORY_LISTEN": os.environ.get("MEMORY_LISTEN", "127.0.0.1:50053"),
        "MEMORY_METRICS_LISTEN": os.environ.get("MEMORY_METRICS_LISTEN", "127.0.0.1:9093"),
    }


def require_free_ports(listens: dict[str, str], *, with_kafka: bool) -> None:
    wanted = {name: address for name, address in listens.items() if address}
    if with_kafka:
        wanted["the Kafka broker"] = f"127.0.0.1:{KAFKA_PORT}"
    for name, address in wanted.items():
        host, _, port = address.rpartition(":")
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except (OSError, ValueError) as error:
                fail(f"{address} can not be listened on ({error}): stop what uses it, or set {name} to another address")


def require_space() -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(RUN).free
    if free < LEAST_FREE_BYTES:
        fail(f"only {free // 2**20} MB are free on the disk of {RUN}: free some space, 512 MB are needed")


def lock_run_folder() -> IO[str]:
    """One mesh a folder. The lock is the kernel's, so that a crash leaves nothing behind."""
    lock = (RUN / "mesh.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        print(f"creditmesh is already running: {lock.read().strip()}\nStop it with Ctrl-C there, or: kill "
              f"{(RUN / 'mesh.pid').read_text().strip()}")
        sys.exit(0)
    return lock


def secret_key_file() -> Path:
    """Made once; losing it means registering the models' keys again."""
    path = RUN / "secret_key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(base64.b64encode(secrets.token_bytes(32)).decode())
    return path


def migrate(name: str, url: str) -> None:
    environ = {**os.environ, f"{name.upper()}_DATABASE_URL": url}
    done = subprocess.run(
        [sys.executable, "-m", MODULES[name], "migrate"], cwd=ROOT, env=environ, capture_output=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.decode().strip().splitlines() or ["no output"]
        fail(f"the migration of {name} failed: {lines[-1]}")


def wait_until_serving(address: str, server: Server) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        give_up_at = time.monotonic() + READY_SECONDS
        while time.monotonic() < give_up_at:
            if server.died():
                fail(f"{server.name} stopped; its last lines above say why")
            with contextlib.suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.05)
    fail(f"{server.name} is not ready after {READY_SECONDS:.0f} s")


def run(*, with_kafka: bool) -> None:
    require_space()
    lock = lock_run_folder()
    listens = addresses()
    require_free_ports(listens, with_kafka=with_kafka)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    with contextlib.ExitStack() as stack:
        postgres = Postgres(RUN / "postgres")
        postgres.start()
        stack.callback(postgres.stop)
        for name in MODULES:
            postgres.create_database(name)
        migrations = [
            threading.Thread(target=migrate, args=(name, postgres.url(name))) for name in MODULES
        ]
        for thread in migrations:
            thread.start()
        kafka_servers = ""
        if with_kafka:
            kafka = Kafka(RUN / "kafka", port=KAFKA_PORT)
            kafka.start()
            stack.callback(kafka.stop)
            kafka_servers = kafka.bootstrap_servers
        for thread in migrations:
            thread.join()
        shared = {
            **listens, "LLM_AUTH": os.environ.get("LLM_AUTH", "none"),
            "TOKENSTORE_AUTH": os.environ.get("TOKENSTORE_AUTH", "none"),
            "TOKENSTORE_ACCESS_LOG": os.environ.get("TOKENSTORE_ACCESS_LOG", "errors"),
            "TOKENSTORE_ALLOW_MOCK_PAYMENT": os.environ.get("TOKENSTORE_ALLOW_MOCK_PAYMENT", "true"),
            "LLM_KAFKA_BOOTSTRAP_SERVERS": kafka_servers, "TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS": kafka_servers,
            "LLM_TOKENSTORE_TARGET": listens["TOKENSTORE_LISTEN"], "LLM_DATABASE_URL": postgres.url("llm"),
            "LLM_MEMORY_TARGET": listens["MEMORY_LISTEN"], "MEMORY_LLM_TARGET": listens["LLM_LISTEN"],
            "MEMORY_AUTH": os.environ.get("MEMORY_AUTH", "none"), "MEMORY_DATABASE_URL": postgres.url("memory"),
            "MEMORY_KAFKA_BOOTSTRAP_SERVERS": kafka_servers,
            "TOKENSTORE_DATABASE_URL": postgres.url("tokenstore"), "LLM_SECRET_KEY_FILE": str(secret_key_file()),
        }
        shared = {
            name: value for name, value in shared.items() if name != "LLM_SECRET_KEY_FILE" or not os.environ.get("LLM_SECRET_KEY")
        }
        servers = [Server(name, shared) for name in MODULES]
        for server in servers:
            server.start()
            stack.callback(server.stop)
        wait_until_serving(listens["TOKENSTORE_LISTEN"], servers[0])
        wait_until_serving(listens["LLM_LISTEN"], servers[1])
        wait_until_serving(listens["MEMORY_LISTEN"], servers[2])
        show_banner(listens, postgres, kafka_servers)
        (RUN / "mesh.pid").write_text(str(os.getpid()))
        lock.truncate(0)
        lock.write(f"llm_service on {listens['LLM_LISTEN']}, tokenstore_service on {listens['TOKENSTORE_LISTEN']}, "
                   f"memory_worker on {listens['MEMORY_LISTEN']}, process {os.getpid()}")
        lock.flush()
        while not stopping.wait(0.2):
            for server in servers:
                if server.died():
                    fail(f"{server.name} stopped; its last lines above say why")
        print("\ncreditmesh: stopping", flush=True)
    print("creditmesh: stopped", flush=True)


def show_banner(listens: dict[str, str], postgres: Postgres, kafka_servers: str) -> None:
    llm, tokenstore = listens["LLM_LISTEN"], listens["TOKENSTORE_LISTEN"]
    print(BANNER.format(
        how=" with Kafka between the services" if kafka_servers else "", run=RUN, llm=llm, tokenstore=tokenstore,
        memory=listens["MEMORY_LISTEN"], memory_metrics=listens["MEMORY_METRICS_LISTEN"] or "off",
        llm_metrics=listens["LLM_METRICS_LISTEN"] or "off",
        tokenstore_metrics=listens["TOKENSTORE_METRICS_LISTEN"] or "off", postgres=postgres.url("tokenstore"),
        kafka=f"\n  Kafka               {kafka_servers}" if kafka_servers else "",
        ts="" if tokenstore == "127.0.0.1:50052" else f" --target {tokenstore}",
        ll="" if llm == "127.0.0.1:50051" else f" --target {llm}",
    ), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kafka", action="store_true", help="put a real Kafka broker between the services")
    arguments = parser.parse_args()
    try:
        run(with_kafka=arguments.kafka)
    except (PostgresProblem, KafkaProblem) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


if __name__ == "__main__":
    main()
