"""Several TokenStores on one database: no deadlock, nothing done twice, whoever dies; PostgreSQL and Redis away."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import psycopg
import pytest
from creditmesh.tokenstore.v1 import (
    charge_service_pb2,
    ledger_service_pb2,
    order_service_pb2,
    reward_service_pb2,
    transaction_pb2,
)
from google.protobuf.timestamp_pb2 import Timestamp

from deploy.local.postgres import Postgres
from servicekit.core.faults import FaultPoint
from servicekit.db import migrations
from tests.support.databases import SCHEMAS
from tests.support.load import wait_until
from tests.support.mesh import ROOT, Mesh, hold_request

C, S, R, T = charge_service_pb2, order_service_pb2, reward_service_pb2, ledger_service_pb2
OLD_VERSION = "20261121_0000"


def replicas(new_mesh: Callable[..., Mesh], count: int = 2, **settings: str) -> list[Mesh]:
    """TokenStores that share one database."""
    meshes = [new_mesh(TOKENSTORE_ALLOW_MOCK_PAYMENT="true", TOKENSTORE_ACCESS_LOG="errors", **settings)
              for _ in range(count)]
    for mesh in meshes:
        mesh.tokenstore.environ["TOKENSTORE_DATABASE_URL"] = meshes[0].tokenstore_url
        mesh.tokenstore_url = meshes[0].tokenstore_url
        mesh.tokenstore.start()
    for mesh in meshes:
        mesh.wait_for_tokenstore()
    return meshes


def charge(user: str, event: str, call_id: str = "") -> Any:
    return {
        "event_id": event, "user_id": user, "call_id": call_id, "scene": "chat", "provider": "LOCAL", "model": "pro",
        "usage": {"input_tokens": 10, "output_tokens": 20},
    }


def business(meshes: list[Mesh], seed: int) -> None:
    """A little of everything, on accounts that all callers share; errors of the rules are answers too."""
    chance = random.Random(seed)
    users = [f"shared-{number}" for number in range(6)]
    for step in range(40):
        mesh, user, key = chance.choice(meshes), chance.choice(users), f"{seed}-{step}"
        batch = [charge(each, f"{key}-{each}") for each in chance.sample(users, 4)]
        until = Timestamp()
        until.FromMilliseconds(int(time.time() * 1000) + chance.randrange(200, 2000))
        try:
            match chance.randrange(7):
                case 0:
                    mesh.charges.RecordCharges(C.RecordChargesRequest(charges=batch), timeout=30)
                case 1:
                    holds = [hold_request(each, str(uuid4()), ttl={"seconds": 1}) for each in chance.sample(users, 4)]
                    mesh.holds.OpenHolds(Mesh.open_holds_request(holds), timeout=30)
                case 2:
                    mesh.ledger.AdjustBalance(T.AdjustBalanceRequest(
                        user_id=user, amount_micros=chance.randrange(1, 10**6), reason="r", reference="f",
                        idempotency_key=key, expires_at=until,
                    ), timeout=30)
                case 3:
                    order = mesh.orders.CreateOrder(S.CreateOrderRequest(
                        user_id=user, product_id="starter_1000", idempotency_key=key
                    ), timeout=30).order
                    chance.choice(meshes).orders.ConfirmPayment(
                        S.ConfirmPaymentRequest(order_id=order.order_id, provider="mock"), timeout=30
                    )
                    chance.choice(meshes).orders.RefundOrder(S.RefundOrderRequest(
                        order_id=order.order_id, credit_micros=chance.choice([0, 10**6]), reason="r",
                        idempotency_key=f"refund-{key}",
                    ), timeout=30)
                case 4:
                    mesh.rewards.GrantReward(R.GrantRewardRequest(
                        event_id=f"like-{step}", user_id=user, source="forum_like", source_ref_id="p"
                    ), timeout=30)
                case 5:
                    mesh.ledger.ReverseTransaction(T.ReverseTransactionRequest(
                        user_id=user, seq=chance.randrange(1, 30), reason="r", idempotency_key=f"rev-{key}"
                    ), timeout=30)
                case _:
                    mesh.charges.RecordCharges(
                        C.RecordChargesRequest(charges=[charge(user, f"same-{step}")]), timeout=30
                    )
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]  # it is a call too
            assert code in (
                grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.ALREADY_EXISTS,
            ), error


def test_replicas_share_everything_without_a_deadlock(new_mesh: Callable[..., Mesh]) -> None:
    meshes = replicas(new_mesh, 3)
    for number in range(6):
        meshes[0].credit(f"shared-{number}", 10**7)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(business, meshes, seed) for seed in range(8)]:
            done.result(timeout=120)
    wait_until(lambda: meshes[0].open_holds() == 0, seconds=20, what="the sweep")
    time.sleep(2.5)  # what expires last, and PostgreSQL's own statistics
    (deadlocks,) = meshes[0].rows(
        meshes[0].tokenstore_url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert deadlocks == (0,)
    assert meshes[0].findings() == []
    expiries = meshes[0].rows(
        meshes[0].tokenstore_url,
        "SELECT count(*), count(DISTINCT (user_id, lots)) FROM tokenstore.ledger_entry WHERE source = 6",
    )
    assert expiries[0][0] > 0
    assert expiries[0][0] == expiries[0][1], "each lot ended once"


@pytest.mark.parametrize("point", [
    FaultPoint.APPLY_LOADED, FaultPoint.APPLY_WRITTEN, FaultPoint.BEFORE_APPLY_COMMIT, FaultPoint.AFTER_APPLY_COMMIT,
])
def test_a_payment_is_credited_once_wherever_its_replica_dies(
    new_mesh: Callable[..., Mesh], point: FaultPoint
) -> None:
    first, second = replicas(new_mesh)
    first.tokenstore.kill()
    first.tokenstore.start(TOKENSTORE_FAULT=f"{point}:2")
    first.wait_for_tokenstore()
    order = first.orders.CreateOrder(
        S.CreateOrderRequest(user_id="buyer", product_id="starter_1000", idempotency_key="k"), timeout=10
    ).order
    confirm = S.ConfirmPaymentRequest(order_id=order.order_id, provider="mock")
    with pytest.raises(grpc.RpcError):
        first.orders.ConfirmPayment(confirm, timeout=10)
    assert first.tokenstore.wait() == -9
    again = second.orders.ConfirmPayment(confirm, timeout=10)
    assert again.order.status == S.ORDER_STATUS_CREDITED
    assert again.balance.balance_micros == 10**9
    assert len(second.transactions("buyer")) == 1
    assert second.findings() == []


def test_a_refund_and_the_expiry_of_its_lot_never_take_the_same_credit(new_mesh: Callable[..., Mesh]) -> None:
    meshes = replicas(new_mesh)
    orders = []
    for number in range(20):
        order = meshes[0].orders.CreateOrder(S.CreateOrderRequest(
            user_id=f"race-{number}", product_id="starter_1000", idempotency_key="k"
        ), timeout=10).order
        meshes[0].orders.ConfirmPayment(S.ConfirmPaymentRequest(order_id=order.order_id, provider="mock"), timeout=10)
        orders.append(order)
    soon = "now() + interval '1500 milliseconds'"
    for table, column in (("lot", "expires_at"), ("account", "next_expiry_at")):
        meshes[0].execute(meshes[0].tokenstore_url, f"UPDATE tokenstore.{table} SET {column} = {soon}")
    time.sleep(1.45)

    def refund(order: Any) -> str:
        try:
            meshes[hash(order.order_id) % 2].orders.RefundOrder(
                S.RefundOrderRequest(order_id=order.order_id, reason="r", idempotency_key="f"), timeout=10
            )
        except grpc.RpcError as error:
            return str(error.code())  # type: ignore[attr-defined]  # it is a call too
        return "refunded"

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        list(pool.map(refund, orders))
    time.sleep(2.5)
    for number in range(20):
        entries = meshes[0].transactions(f"race-{number}")
        taken = [entry.source for entry in entries if entry.amount_micros < 0]
        assert taken in ([transaction_pb2.TRANSACTION_SOURCE_REFUND], [transaction_pb2.TRANSACTION_SOURCE_EXPIRY])
        assert meshes[0].balance(f"race-{number}").balance_micros == 0


def test_postgresql_restarts_under_load_and_nothing_is_lost_or_doubled(
    new_mesh: Callable[..., Mesh], scratch: Path
) -> None:
    own = Postgres(scratch / f"pg-{uuid4().hex[:8]}")
    own.start()
    try:
        own.create_database("books")
        schema, folder = SCHEMAS["tokenstore"]
        migrations.upgrade(url=own.url("books"), schema=schema, folder=folder)
        mesh = new_mesh(TOKENSTORE_DATABASE_URL=own.url("books"))
        mesh.tokenstore_url = own.url("books")
        mesh.tokenstore.start()
        mesh.wait_for_tokenstore()
        mesh.credit("u", 10**9)
        answered: set[str] = set()

        def load() -> None:
            for number in range(150):
                event = f"e{number}"
                while event not in answered:
                    try:
                        mesh.charges.RecordCharges(C.RecordChargesRequest(charges=[charge("u", event)]), timeout=10)
                        answered.add(event)
                    except grpc.RpcError:
                        time.sleep(0.05)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            working = pool.submit(load)
            wait_until(lambda: len(answered) > 20, what="some charges")
            own.kill()
            time.sleep(0.5)
            own.start()
            working.result(timeout=90)
        assert len(mesh.transactions("u")) == 151
        assert mesh.findings() == []
    finally:
        own.stop()


def run_cli(mesh: Mesh, *arguments: str, code: int = 0) -> str:
    program = "from tokenstore_service.cli import main; main()"
    environ = {**os.environ, "TOKENSTORE_DATABASE_URL": mesh.tokenstore_url}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_is_derived_is_rebuilt_from_the_entries(new_mesh: Callable[..., Mesh]) -> None:
    (mesh,) = replicas(new_mesh, 1)
    for number in range(6):
        mesh.credit(f"shared-{number}", 10**7)
    business([mesh], 1)
    wait_until(lambda: mesh.open_holds() == 0, seconds=20, what="the sweep")
    assert "0 differences" in run_cli(mesh, "rebuild")
    before = mesh.rows(mesh.tokenstore_url, "SELECT user_id, balance_micros, seq FROM tokenstore.account ORDER BY 1")
    for damage in (
        "UPDATE tokenstore.account SET balance_micros = 1, held_micros = 5 WHERE user_id = 'shared-1'",
        "DELETE FROM tokenstore.account WHERE user_id = 'shared-2'",
        "DELETE FROM tokenstore.lot WHERE user_id <= 'shared-3'",
        "UPDATE tokenstore.consumption_hour SET micros = micros + 1 WHERE user_id = 'shared-4'",
    ):
        mesh.execute(mesh.tokenstore_url, damage)
    assert mesh.findings()
    assert "shared-2" in run_cli(mesh, "rebuild", code=1)
    assert "put in place" in run_cli(mesh, "rebuild", "--swap")
    assert mesh.findings() == []
    assert mesh.rows(
        mesh.tokenstore_url, "SELECT user_id, balance_micros, seq FROM tokenstore.account ORDER BY 1"
    ) == before
    mesh.credit("shared-1", 5, key="afterwards")
    assert mesh.findings() == []


def test_a_price_table_is_imported_with_a_look_before(new_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    (mesh,) = replicas(new_mesh, 1)
    target = ("--target", mesh.tokenstore_address)
    table = tmp_path / "prices.csv"
    table.write_text("provider,model,input,output,cached_input\nOPENAI_CHAT,big,2.5,10,1.25\nLOCAL,small,0.1,0.4,\n")
    assert "2 new, 0 changed, 0 the same (dry run" in run_cli(mesh, "import-prices", str(table), "--dry-run", *target)
    assert "2 new" in run_cli(mesh, "import-prices", str(table), *target)
    assert "0 new, 0 changed, 2 the same" in run_cli(mesh, "import-prices", str(table), *target)
    other = tmp_path / "prices.json"
    other.write_text(json.dumps([{"provider": "LOCAL", "model": "small", "input": "0.2", "output": 0.4}]))
    shown = run_cli(mesh, "import-prices", str(other), *target)
    assert "input_price_micros_per_mtok: 100000 -> 200000" in shown
    table.write_text("provider,nonsense\nx,y\n")
    assert "row 1" in run_cli(mesh, "import-prices", str(table), *target, code=1)


def test_a_ledger_of_the_version_before_is_carried_over(
    postgres: Postgres, new_mesh: Callable[..., Mesh]
) -> None:
    """Entries of form 1 keep their proof; their credit becomes one lot, their sums are made."""
    name = f"old_{uuid4().hex[:8]}"
    postgres.create_database(name)
    schema, folder = SCHEMAS["tokenstore"]
    url = postgres.url(name)
    migrations.upgrade(url=url, schema=schema, folder=folder, to=OLD_VERSION)
    old = json.loads((Path(__file__).parent / "old_ledger.json").read_text())
    with psycopg.connect(url, autocommit=True, options=f"-c search_path={schema}") as connection:
        for table, rows in old.items():
            statement = f"INSERT INTO {table} SELECT * FROM json_populate_recordset(NULL::{table}, %s)"
            connection.execute(statement.encode(), (json.dumps(rows),))
    migrations.upgrade(url=url, schema=schema, folder=folder)
    with psycopg.connect(url, autocommit=True, options=f"-c search_path={schema}") as connection:
        lots = connection.execute("SELECT user_id, seq, remaining_micros FROM lot").fetchall()
        sums = connection.execute("SELECT calls, micros FROM consumption_hour").fetchall()
    assert lots == [("alice", 3, 999_929_600)]
    assert sums == [(2, 70_400)]
    mesh = new_mesh(TOKENSTORE_DATABASE_URL=url)
    mesh.tokenstore_url = url
    mesh.tokenstore.start()
    mesh.wait_for_tokenstore()
    assert mesh.findings() == []
    mesh.charges.RecordCharges(C.RecordChargesRequest(charges=[charge("alice", "new")]), timeout=10)
    mesh.credit("bob", 7, key="new")
    assert [entry.form for entry in mesh.transactions("alice")] == [2, 1, 1, 1]
    assert mesh.findings() == []
    assert "0 differences" in run_cli(mesh, "rebuild")
