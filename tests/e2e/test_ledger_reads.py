"""Reading the books over a socket: balances and watches, sums, history, exports and their proof."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from creditmesh.tokenstore.v1 import (
    balance_service_pb2,
    balance_service_pb2_grpc,
    charge_service_pb2,
    ledger_service_pb2,
)
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.load import wait_until
from tests.support.mesh import ROOT, Mesh, hold_request
from tests.support.redis import Redis

B, C, T = balance_service_pb2, charge_service_pb2, ledger_service_pb2


@pytest.fixture
def user(mesh: Mesh) -> str:
    name = f"reader-{uuid4()}"
    mesh.credit(name, 10**9)
    return name


def record(mesh: Mesh, user: str, *events: str, **fields: Any) -> Any:
    charges = [{
        "event_id": event, "user_id": user, "scene": "chat", "provider": "LOCAL", "model": "pro",
        "usage": {"input_tokens": 10, "output_tokens": 20}, **fields,
    } for event in events]
    return mesh.charges.RecordCharges(C.RecordChargesRequest(charges=charges), timeout=10).results


class Watch(threading.Thread):
    """What one caller of WatchBalance is told, and when."""

    def __init__(self, mesh: Mesh, user: str, *, from_seq: int = 0, address: str = "") -> None:
        super().__init__(daemon=True)
        self._channel = grpc.insecure_channel(address or mesh.tokenstore_address)
        stub: Any = balance_service_pb2_grpc.BalanceServiceStub(self._channel)
        self.stream = stub.WatchBalance(B.WatchBalanceRequest(user_id=user, from_seq=from_seq), timeout=60)
        self.seen: list[tuple[float, Any]] = []
        self.code: Any = None
        self.start()

    def run(self) -> None:
        try:
            for answer in self.stream:
                self.seen.append((time.monotonic(), answer.balance))
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            self.code = error.code()  # type: ignore[attr-defined]  # it is a call too

    def close(self) -> None:
        self.stream.cancel()
        self.join(5)
        self._channel.close()


def test_a_watch_tells_the_state_and_every_change(mesh: Mesh, user: str) -> None:
    watch, later = Watch(mesh, user), Watch(mesh, user, from_seq=1)
    wait_until(lambda: len(watch.seen) == 1, what="the state")
    assert watch.seen[0][1].balance_micros == 10**9
    record(mesh, user, "a")
    wait_until(lambda: watch.seen[-1][1].seq == 2 and later.seen, what="the charge")
    assert later.seen[0][1].seq == 2, "nothing before an entry after from_seq"
    hold = hold_request(user, str(uuid4()))
    mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5)
    wait_until(lambda: watch.seen[-1][1].held_micros > 0, what="the hold")
    versions = [balance.version for _, balance in watch.seen]
    assert versions == sorted(set(versions))
    for each in (watch, later):
        each.close()


def test_a_watch_sees_other_replicas_soon_and_ends_cleanly_on_drain(new_mesh: Callable[..., Mesh]) -> None:
    mesh, twin = new_mesh(), new_mesh()
    twin.tokenstore.environ["TOKENSTORE_DATABASE_URL"] = mesh.tokenstore_url
    for each in (mesh, twin):
        each.tokenstore.start()
        each.wait_for_tokenstore()
    mesh.credit("w", 10**9)
    watch = Watch(twin, "w")
    wait_until(lambda: len(watch.seen) == 1, what="the state")
    delays = []
    for number in range(10):
        record(mesh, "w", f"e{number}")
        committed = time.monotonic()
        wait_until(lambda wanted=number + 2: watch.seen[-1][1].seq == wanted, what="the change")  # type: ignore[misc]
        delays.append(watch.seen[-1][0] - committed)
    assert sorted(delays)[5] < 0.3
    begun = time.monotonic()
    assert twin.tokenstore.stop() == 0
    watch.join(5)
    assert watch.code is grpc.StatusCode.OK
    assert time.monotonic() - begun < 4, "a watch does not hold the drain up"
    watch.close()


def test_many_watchers_share_their_queries(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    mesh.tokenstore.start()
    mesh.wait_for_tokenstore()
    mesh.credit("crowd", 10**9)
    channel = grpc.insecure_channel(mesh.tokenstore_address)
    stub: Any = balance_service_pb2_grpc.BalanceServiceStub(channel)
    streams = [stub.WatchBalance(B.WatchBalanceRequest(user_id="crowd"), timeout=60) for _ in range(500)]
    for stream in streams:
        next(stream)
    queries = "SELECT coalesce(sum(xact_commit), 0) FROM pg_stat_database WHERE datname = current_database()"
    mesh.execute(mesh.tokenstore_url, "SELECT pg_stat_force_next_flush()")
    time.sleep(1.5)
    before = mesh.rows(mesh.tokenstore_url, queries)[0][0]
    begun = time.monotonic()
    for number in range(20):
        record(mesh, "crowd", f"e{number}")
        for stream in streams:
            while next(stream).balance.seq < number + 2:
                pass
    seconds = time.monotonic() - begun
    time.sleep(1.5)
    after = mesh.rows(mesh.tokenstore_url, queries)[0][0]
    polls_and_sweeps = 20 * (seconds + 3)
    assert after - before < 20 * 3 + polls_and_sweeps + 50, "not a query for each of 500 watchers"
    for stream in streams:
        stream.cancel()
    channel.close()


def test_reads_say_where_they_come_from_and_read_your_writes(mesh: Mesh, user: str) -> None:
    def get(min_seq: int = 0) -> Any:
        return mesh.balances.GetBalance(B.GetBalanceRequest(user_id=user, min_seq=min_seq), timeout=10).balance

    assert [get().source for _ in range(3)][-1] == "cache"
    record(mesh, user, "a")
    assert get(min_seq=2).seq == 2
    assert get().seq == 2
    unknown = mesh.balances.GetBalance(B.GetBalanceRequest(user_id=f"never-{user}"), timeout=5).balance
    assert (unknown.seq, unknown.version, unknown.source) == (0, 0, "db")


def test_redis_holds_snapshots_that_never_go_back_and_may_go_away(
    new_mesh: Callable[..., Mesh], scratch: Path
) -> None:
    redis = Redis(scratch / f"redis-{uuid4()}")
    redis.start()
    try:
        mesh, twin = (new_mesh(TOKENSTORE_REDIS_URL=redis.url) for _ in range(2))
        twin.tokenstore.environ["TOKENSTORE_DATABASE_URL"] = mesh.tokenstore_url
        for each in (mesh, twin):
            each.tokenstore.start()
            each.wait_for_tokenstore()
        mesh.credit("r", 10**9)
        wait_until(lambda: twin.balance("r").source == "cache", what="the snapshot")
        for number in range(5):
            record(mesh, "r", f"e{number}")
            wait_until(lambda wanted=number + 2: twin.balance("r").seq == wanted, what="the change")  # type: ignore[misc]
        assert twin.balance("r").source == "cache"
        # An older snapshot does not replace a newer one, whoever writes it.
        redis.command("EVAL", redis.script(), "1", "creditmesh:balance:{r}", "1", "[]")
        assert twin.balance("r").seq == 6
        redis.command("FLUSHALL")
        assert twin.balance("r").seq == 6
        redis.stop()
        record(mesh, "r", "without")
        gone = twin.balance("r")
        assert (gone.source, gone.seq) == ("db", 7)
        redis.start()
        record(mesh, "r", "with")
        wait_until(lambda: (twin.balance("r").source, twin.balance("r").seq) == ("cache", 8), what="Redis again")
    finally:
        redis.stop()


def test_the_balance_at_a_moment(mesh: Mesh, user: str) -> None:
    moments = [Timestamp()]
    moments[0].FromMilliseconds(1)
    for number in range(6):
        record(mesh, user, f"e{number}")
        moments.append(mesh.transactions(user)[0].booked_at)
        time.sleep(0.01)

    def at(moment: Timestamp) -> Any:
        return mesh.ledger.GetBalanceAt(T.GetBalanceAtRequest(user_id=user, time=moment), timeout=5)

    assert (at(moments[0]).seq, at(moments[0]).balance_micros) == (0, 0)
    assert [at(moment).seq for moment in moments[1:]] == [2, 3, 4, 5, 6, 7]
    assert at(moments[3]).balance_micros == 10**9 - 3 * 35_200
    just_before = Timestamp(seconds=moments[3].seconds, nanos=moments[3].nanos)
    just_before.FromMicroseconds(just_before.ToMicroseconds() - 1)
    assert at(just_before).seq == 3


def test_sums_by_hour_agree_with_the_ledger(mesh: Mesh, user: str) -> None:
    now = int(time.time())
    record(mesh, user, "now-1", "now-2", model="pro", conversation_id="c-1")
    record(mesh, user, "now-3", model="max", scene="course")
    record(mesh, user, "old", occurred_at={"seconds": now - 3 * 86400})
    record(mesh, user, "older", occurred_at={"seconds": now - 60 * 86400})
    record(mesh, user, "skipped", skip_charge=True)

    def read(period: str, group: int = 0) -> Any:
        return mesh.ledger.GetConsumption(
            T.GetConsumptionRequest(user_id=user, period=period, group_by=group), timeout=5  # type: ignore[arg-type]
        )

    calls = {period: read(period).total.calls for period in ("24h", "7d", "30d", "all")}
    assert calls == {"24h": 4, "7d": 5, "30d": 5, "all": 6}
    everything = read("all").total
    entries = mesh.transactions(user)
    assert everything.credit_micros == -sum(entry.amount_micros for entry in entries if entry.amount_micros < 0)
    assert everything.total_tokens == 6 * 30, "what was skipped counts its tokens"
    models = read("all", T.CONSUMPTION_GROUP_MODEL).groups
    assert {each.key: each.calls for each in models} == {"pro": 5, "max": 1}
    assert [each.key for each in read("24h", T.CONSUMPTION_GROUP_SCENE).groups] == ["chat", "course"]
    days = [each.key for each in read("all", T.CONSUMPTION_GROUP_DAY).groups]
    assert days == sorted(days)
    assert len(days) == 3
    assert all(key.endswith("00:00Z") for key in [each.key for each in read("7d", T.CONSUMPTION_GROUP_HOUR).groups])
    assert getattr(read("24h"), "from").seconds % 3600 == 0
    # The filters of the list, too.
    assert [entry.event_id for entry in mesh.transactions(user, conversation_id="c-1")] == ["now-2", "now-1"]
    assert [entry.event_id for entry in mesh.transactions(user, scene="course")] == ["now-3"]
    assert [entry.event_id for entry in mesh.transactions(user, model="max")] == ["now-3"]


def export(mesh: Mesh, **fields: Any) -> list[Any]:
    return list(mesh.ledger.ExportTransactions(T.ExportTransactionsRequest(**fields), timeout=60))


def canonical(entry: Any) -> str:
    """A second implementation, from docs/ledger-hash.md alone."""
    def micros(moment: Any) -> str:
        return str(moment.seconds * 10**6 + moment.nanos // 1000)

    usage, rates = [""] * 8, [""] * 8
    if entry.HasField("usage"):
        usage = [str(getattr(entry.usage, name)) for name in (
            "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens",
            "input_audio_tokens", "output_audio_tokens", "source",
        )]
    rule, version = "", "0"
    if entry.HasField("quote"):
        rule, version = entry.quote.price_rule_id, str(entry.quote.price_rule_version)
        rates = [str(getattr(entry.quote.rates, f"{name}_pico")) for name in (
            "input", "cached_input", "cache_write", "output", "reasoning", "input_audio", "output_audio", "per_call",
        )]
    if entry.unit_type:
        rates = [""] * 8
    flags = sum(1 << flag for flag in entry.flags)
    fields = [
        f"creditmesh-ledger-{entry.form}", entry.user_id, entry.seq, entry.event_id, entry.source, entry.amount_micros,
        entry.balance_after_micros, entry.status, micros(entry.occurred_at), micros(entry.booked_at), entry.scene,
        entry.model, entry.provider, *usage, rule, version, *rates, entry.call_id, entry.request_id,
        entry.conversation_id, entry.reference, entry.description, flags,
    ]
    if entry.form > 1:
        lot = entry.granted_lot if entry.HasField("granted_lot") else None
        fields += [
            ",".join(f"{use.lot_seq}:{use.micros}" for use in entry.lots),
            lot.source if lot and lot.source else "", lot.priority if lot and lot.source else "",
            micros(lot.expires_at) if lot and lot.HasField("expires_at") else "", entry.order_id, entry.actor,
            entry.reverses_seq or "", entry.unit_type, entry.unit_amount,
            entry.unit_pico if entry.HasField("quote") and entry.unit_type else "", entry.details,
        ]
    return "\n".join(map(str, fields))


def test_an_export_is_proved_from_the_documentation_alone(mesh: Mesh, user: str) -> None:
    record(mesh, user, "a", "b", request_id="r", conversation_id="c")
    mesh.charges.RecordUsage(C.RecordUsageRequest(usages=[{
        "event_id": "u", "user_id": user, "product_id": "p", "usage_amount": "1.5", "unit_type": "second",
        "usage_details": {"voice": "ä"},
    }]), timeout=5)
    mesh.ledger.ReverseTransaction(
        T.ReverseTransactionRequest(user_id=user, seq=2, reason="x", idempotency_key="rev"), timeout=5
    )
    exported = export(mesh, user_id=user)
    assert [each.transaction.seq for each in exported] == [1, 2, 3, 4, 5]
    previous = bytes(32)
    for each in exported:
        assert each.previous_hash == previous
        previous = hashlib.sha256(previous + canonical(each.transaction).encode()).digest()
        assert each.transaction.entry_hash == previous
    rest = export(mesh, user_id=user, after_seq=3)
    assert rest == exported[3:]
    everything = export(mesh, all=True, after_user_id="reader-")
    assert everything
    assert all(each.transaction.user_id > "reader-" for each in everything)


def run_cli(mesh: Mesh, *arguments: str, code: int = 0) -> str:
    program = "from tokenstore_service.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_line_exports_and_an_export_is_verified_without_a_database(
    mesh: Mesh, user: str, tmp_path: Path
) -> None:
    record(mesh, user, "a", "b")
    target = ("--target", mesh.tokenstore_address)
    lines, table = tmp_path / "books.jsonl", tmp_path / "books.csv"
    run_cli(mesh, "export", user, "--output", str(lines), *target)
    run_cli(mesh, "export", user, "--output", str(table), "--format", "csv", *target)
    assert "3 entries of 1 accounts" in run_cli(mesh, "verify-export", str(lines))
    rows = table.read_text().splitlines()
    assert len(rows) == 4
    assert rows[0].startswith("user_id,seq,")
    documents = [json.loads(line) for line in lines.read_text().splitlines()]
    documents[1]["transaction"]["amount_micros"] = "-1"
    lines.write_text("\n".join(map(json.dumps, documents)))
    assert "entry 2" in run_cli(mesh, "verify-export", str(lines), code=1)
    del documents[1]
    lines.write_text("\n".join(map(json.dumps, documents)))
    run_cli(mesh, "verify-export", str(lines), code=1)


def test_a_check_of_everything_goes_on_where_it_stopped(mesh: Mesh) -> None:
    for name in ("za", "zb", "zc"):
        mesh.credit(name, 5)
    answers = list(mesh.ledger.VerifyLedger(T.VerifyLedgerRequest(all=True, after_user_id="za"), timeout=60))
    assert (answers[-1].summary.accounts, answers[-1].summary.last_user_id) == (2, "zc")


def test_the_books_are_checked_in_the_background(new_mesh: Callable[..., Mesh], free_port: int) -> None:
    mesh = new_mesh(TOKENSTORE_VERIFY_SECONDS="1", TOKENSTORE_METRICS_LISTEN=f"127.0.0.1:{free_port}")
    mesh.tokenstore.start()
    mesh.wait_for_tokenstore()
    mesh.credit("checked", 10)
    mesh.credit("changed", 10)

    def metric(name: str) -> float:
        import urllib.request

        text = urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=5).read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    wait_until(lambda: metric("ledger_last_round_accounts") == 2, seconds=30, what="a round")
    assert metric("ledger_last_round_findings") == 0
    mesh.execute(mesh.tokenstore_url, "UPDATE tokenstore.lot SET granted_micros = 9 WHERE user_id = 'changed'")
    mesh.execute(
        mesh.tokenstore_url, "UPDATE tokenstore.account SET head_lot_micros = 9 WHERE user_id = 'changed'"
    )
    wait_until(lambda: metric("ledger_last_round_findings") > 0, seconds=30, what="the finding")
