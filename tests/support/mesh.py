"""A mesh of real processes, started with `python -m`, talked to over gRPC, killed at will."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import psycopg
from creditmesh.llm.v1 import (
    conversation_service_pb2_grpc,
    llm_service_pb2,
    llm_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    user_policy_service_pb2_grpc,
)
from creditmesh.memory.v1 import memory_service_pb2_grpc
from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    balance_service_pb2_grpc,
    budget_service_pb2_grpc,
    charge_service_pb2_grpc,
    hold_service_pb2,
    hold_service_pb2_grpc,
    ledger_service_pb2,
    ledger_service_pb2_grpc,
    order_service_pb2_grpc,
    pricing_service_pb2_grpc,
    reward_service_pb2_grpc,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.databases import Databases
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
READY_SECONDS = 30.0
REST_SECONDS = 60.0


MODULES = {"llm": "llm_service", "tokenstore": "tokenstore_service", "memory": "memory_worker"}


class ServiceProcess:
    """One service as a process."""

    def __init__(self, service: str, environ: dict[str, str], log: Path) -> None:
        self.service = service
        self.environ = environ
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **more: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_", "TOKENSTORE_", "MEMORY_"))}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULES[self.service]], cwd=ROOT, env={**clean, **self.environ, **more},
                stdout=log, stderr=log,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float = 30.0) -> int:
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if not self.is_alive():
            return 0 if self._process is None else self.wait()
        self.signal(signal.SIGTERM)
        return self.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Mesh:
    """TokenStore and llm_service on databases of their own, and memory_worker where a test starts it (`start_memory`).
    `settings` are environment variables on top."""

    def __init__(self, databases: Databases, logs: Path, *, name: str, settings: dict[str, str]) -> None:
        logs.mkdir(exist_ok=True)
        safe = "".join(letter if letter.isalnum() else "_" for letter in name)[:60]
        stamp = f"{safe}-{time.monotonic_ns()}"
        self.tokenstore_address = f"127.0.0.1:{free_port()}"
        self.llm_address = f"127.0.0.1:{free_port()}"
        self.tokenstore_url = databases.make("tokenstore")
        self.llm_url = databases.make("llm")
        common = {
            "LLM_AUTH": "none", "TOKENSTORE_AUTH": "none", "LLM_METRICS_LISTEN": "", "TOKENSTORE_METRICS_LISTEN": "",
            "LLM_LISTEN": self.llm_address, "TOKENSTORE_LISTEN": self.tokenstore_address,
            "LLM_DATABASE_URL": self.llm_url, "TOKENSTORE_DATABASE_URL": self.tokenstore_url,
            "LLM_TOKENSTORE_TARGET": self.tokenstore_address, "LLM_LOCAL_TOKENS_PER_SECOND": "0",
            "LLM_SECRET_KEY": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
            "LLM_HOLD_TTL_SECONDS": "5", "LLM_CALL_LEASE_SECONDS": "3",
            "LLM_DRAIN_SECONDS": "5", "TOKENSTORE_DRAIN_SECONDS": "5", **settings,
        }
        self.tokenstore = ServiceProcess("tokenstore", common, logs / f"{stamp}-tokenstore.log")
        self.llm = ServiceProcess("llm", common, logs / f"{stamp}-llm.log")
        self.memory_address = f"127.0.0.1:{free_port()}"
        self._databases = databases
        self._memory_log = logs / f"{stamp}-memory.log"
        self._settings = settings
        self.memory_url = ""
        self.memory: ServiceProcess | None = None
        self._channels: list[tuple[str, grpc.Channel]] = []
        self._stubs: dict[str, Any] = {}

    # Life

    def start(self) -> None:
        self.tokenstore.start()
        self.llm.start()
        self.wait_until_serving()

    def start_memory(self, **more: str) -> ServiceProcess:
        """The mesh of three: memory_worker beside the two, which llm_service is told of. Starts all of them."""
        self.memory_url = self._databases.make("memory")
        self.memory = self.new_memory(self.memory_address, **more)
        self.llm.environ["LLM_MEMORY_TARGET"] = self.memory_address
        self.start()
        self.memory.start()
        self.wait_for_memory()
        return self.memory

    def new_memory(self, address: str, **more: str) -> ServiceProcess:
        """One more worker on the same database."""
        return ServiceProcess("memory", {
            "MEMORY_AUTH": "none", "MEMORY_METRICS_LISTEN": "", "MEMORY_LISTEN": address,
            "MEMORY_DATABASE_URL": self.memory_url, "MEMORY_LLM_TARGET": self.llm_address,
            "MEMORY_DRAIN_SECONDS": "5", "MEMORY_CHORES_SECONDS": "0.5", **self._settings, **more,
        }, self._memory_log)

    def wait_for_memory(self) -> None:
        assert self.memory is not None
        self._wait_for(self.memory, self.memory_address)

    def wait_for_tokenstore(self) -> None:
        self._wait_for(self.tokenstore, self.tokenstore_address)

    def wait_until_serving(self) -> None:
        self.wait_for_tokenstore()
        self._wait_for(self.llm, self.llm_address)

    def stop(self) -> None:
        for _, channel in self._channels:
            channel.close()
        for process in filter(None, (self.memory, self.llm, self.tokenstore)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.stop()
            if process.is_alive():
                process.kill()

    def _wait_for(self, process: ServiceProcess, address: str) -> None:
        give_up_at = time.monotonic() + READY_SECONDS
        while time.monotonic() < give_up_at:
            assert process.is_alive(), f"{process.service} died: {process.text()[-2000:]}"
            with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(address) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    self._reconnect(address)
                    return
            time.sleep(0.05)
        raise AssertionError(f"{process.service} is not serving: {process.text()[-2000:]}")

    def _reconnect(self, address: str) -> None:
        """Channels whose server was gone have it again: none refuses the next call because it still backs off."""
        for at, channel in self._channels:
            if at == address:
                grpc.channel_ready_future(channel).result(READY_SECONDS)

    # Stubs: synchronous ones; the stubs' types describe asyncio, so they are Any here

    def _stub(self, kind: Any, address: str) -> Any:
        key = f"{kind.__name__}@{address}"
        if key not in self._stubs:
            channel = grpc.insecure_channel(address, options=[
                ("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50), ("grpc.use_local_subchannel_pool", 1),
            ])
            self._channels.append((address, channel))
            self._stubs[key] = kind(channel)
        return self._stubs[key]

    @property
    def calls(self) -> Any:
        return self._stub(llm_service_pb2_grpc.LLMServiceStub, self.llm_address)

    @property
    def models(self) -> Any:
        return self._stub(model_service_pb2_grpc.ModelServiceStub, self.llm_address)

    @property
    def policies(self) -> Any:
        return self._stub(user_policy_service_pb2_grpc.UserPolicyServiceStub, self.llm_address)

    @property
    def conversations(self) -> Any:
        return self._stub(conversation_service_pb2_grpc.ConversationServiceStub, self.llm_address)

    @property
    def memories(self) -> Any:
        return self._stub(memory_service_pb2_grpc.MemoryServiceStub, self.memory_address)

    @property
    def ledger(self) -> Any:
        return self._stub(ledger_service_pb2_grpc.LedgerServiceStub, self.tokenstore_address)

    @property
    def balances(self) -> Any:
        return self._stub(balance_service_pb2_grpc.BalanceServiceStub, self.tokenstore_address)

    @property
    def holds(self) -> Any:
        return self._stub(hold_service_pb2_grpc.HoldServiceStub, self.tokenstore_address)

    @property
    def charges(self) -> Any:
        return self._stub(charge_service_pb2_grpc.ChargeServiceStub, self.tokenstore_address)

    @property
    def prices(self) -> Any:
        return self._stub(pricing_service_pb2_grpc.PricingServiceStub, self.tokenstore_address)

    @property
    def orders(self) -> Any:
        return self._stub(order_service_pb2_grpc.OrderServiceStub, self.tokenstore_address)

    @property
    def budgets(self) -> Any:
        return self._stub(budget_service_pb2_grpc.BudgetServiceStub, self.tokenstore_address)

    @property
    def rewards(self) -> Any:
        return self._stub(reward_service_pb2_grpc.RewardServiceStub, self.tokenstore_address)

    # What tests do all the time

    @staticmethod
    def open_holds_request(requests: list[hold_service_pb2.HoldRequest]) -> hold_service_pb2.OpenHoldsRequest:
        return hold_service_pb2.OpenHoldsRequest(requests=requests)

    @staticmethod
    def release_request(user: str, hold_id: str) -> hold_service_pb2.ReleaseHoldsRequest:
        return hold_service_pb2.ReleaseHoldsRequest(holds=[{"user_id": user, "hold_id": hold_id}])

    def register(self, alias: str, base_url: str, behaviour: str, **fields: Any) -> str:
        model = model_service_pb2.Model(**{
            "alias": alias, "provider": model_service_pb2.PROVIDER_OPENAI_CHAT, "base_url": base_url,
            "upstream_model": behaviour, "active": True, **fields,
        })
        answer = self.models.RegisterModel(model_service_pb2.RegisterModelRequest(model=model), timeout=10)
        return str(answer.model.model_id)

    def register_local(self, alias: str, **fields: Any) -> str:
        """The built-in model; `default_params` say how it behaves."""
        return self.register(alias, "", "local", provider=model_service_pb2.PROVIDER_LOCAL, **fields)

    def credit(self, user: str, micros: int, *, key: str = "welcome") -> None:
        self.ledger.AdjustBalance(ledger_service_pb2.AdjustBalanceRequest(
            user_id=user, amount_micros=micros, reason="test", reference="test", idempotency_key=key
        ), timeout=10)

    def balance(self, user: str) -> balance_service_pb2.Balance:
        answer = self.balances.GetBalance(balance_service_pb2.GetBalanceRequest(user_id=user), timeout=10)
        return answer.balance  # type: ignore[no-any-return]

    def transactions(self, user: str, **fields: Any) -> list[Any]:
        request = ledger_service_pb2.ListTransactionsRequest(user_id=user, page_size=500, **fields)
        entries: list[Any] = []
        while True:
            answer = self.ledger.ListTransactions(request, timeout=10)
            entries += answer.transactions
            if not answer.next_page_token:
                return entries
            request.page_token = answer.next_page_token

    def findings(self, user: str = "") -> list[Any]:
        request = ledger_service_pb2.VerifyLedgerRequest(user_id=user, all=not user)
        return [each.finding for each in self.ledger.VerifyLedger(request, timeout=60) if each.HasField("finding")]

    def open_holds(self) -> int:
        return int(self._number(self.tokenstore_url, "SELECT count(*) FROM tokenstore.hold WHERE state = 1"))

    def outbox_size(self) -> int:
        return int(self._number(self.llm_url, "SELECT count(*) FROM llm.outbox_message"))

    def running_calls(self) -> int:
        return int(self._number(self.llm_url, "SELECT count(*) FROM llm.call WHERE state = 1"))

    def wait_for_rest(self, seconds: float = REST_SECONDS) -> None:
        """Until no call runs, the outbox is empty, no hold is open, each expired hold of ours has its record, each
        settled call is in the ledger, and no title or summary is to be made."""
        give_up_at = time.monotonic() + seconds
        left = {}
        while time.monotonic() < give_up_at:
            # What makes work is asked before what the work passes through.
            left = {"chores": self.conversation_tasks(), "running": self.running_calls(), "holds": self.open_holds(),
                    "outbox": self.outbox_size(), "unbooked": self.unbooked_calls(),
                    "orphans": self.orphaned_holds()}
            if not any(left.values()):
                return
            time.sleep(0.1)
        raise AssertionError(f"not at rest after {seconds} s: {left}")

    def conversation_tasks(self) -> int:
        """Titles and summaries that are still to be made."""
        return int(self._number(self.llm_url, "SELECT count(*) FROM llm.conversation_task"))

    def orphaned_holds(self) -> int:
        """Expired holds of calls that llm_service has no record of yet."""
        expired = self.rows(
            self.tokenstore_url, "SELECT hold_id FROM tokenstore.hold WHERE state = 4 AND origin = 'llm_service'"
        )
        known = {row[0] for row in self.rows(self.llm_url, "SELECT call_id FROM llm.call")} if expired else set()
        return sum(row[0] not in known for row in expired)

    def unbooked_calls(self) -> int:
        """Settled calls that have no ledger entry yet: their charge is on its way, perhaps in Kafka."""
        settled = {row[0] for row in self.rows(self.llm_url, "SELECT call_id FROM llm.call WHERE state = 2")}
        booked = self.rows(
            self.tokenstore_url, "SELECT call_id FROM tokenstore.ledger_entry WHERE call_id = ANY(%s)", (list(settled),)
        )
        return len(settled - {row[0] for row in booked})

    def rows(self, url: str, statement: str, arguments: Sequence[Any] = ()) -> list[Any]:
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(statement.encode(), arguments).fetchall()

    def execute(self, url: str, statement: str, arguments: Sequence[Any] = ()) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement.encode(), arguments)

    def _number(self, url: str, statement: str) -> Any:
        return self.rows(url, statement)[0][0]


def call_request(kind: Any, user: str, text: str = "hi", **fields: Any) -> Any:
    """A GenerateRequest or StreamRequest for `user`; `request_id` goes to the billing context."""
    billing = {"user_id": user, "scene": "chat", "request_id": fields.pop("request_id", "")}
    billing.update(fields.pop("billing", {}))
    messages = fields.pop("messages", [{"role": "ROLE_USER", "content": [{"text": text}]}])
    return kind(billing=billing, messages=messages, **fields)


def generate_request(user: str, text: str = "hi", **fields: Any) -> llm_service_pb2.GenerateRequest:
    return call_request(llm_service_pb2.GenerateRequest, user, text, **fields)  # type: ignore[no-any-return]


def stream_request(user: str, text: str = "hi", **fields: Any) -> llm_service_pb2.StreamRequest:
    return call_request(llm_service_pb2.StreamRequest, user, text, **fields)  # type: ignore[no-any-return]


def hold_request(user: str, call_id: str, **fields: Any) -> hold_service_pb2.HoldRequest:
    values = {
        "call_id": call_id, "user_id": user, "scene": "chat", "provider": "LOCAL", "model": "pro", "input_tokens": 10,
        "max_output_tokens": 100, "min_output_tokens": 1, **fields,
    }
    return hold_service_pb2.HoldRequest(**values)
