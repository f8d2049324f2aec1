"""Charges into a TokenStore as fast as it takes them."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import psycopg
from confluent_kafka import Producer
from creditmesh.common.v1 import billing_pb2
from creditmesh.events.v1 import charge_requested_pb2
from creditmesh.tokenstore.v1 import charge_service_pb2, charge_service_pb2_grpc

from servicekit.core.ids import RandomIdSource
from tests.support.mesh import Mesh

IN_FLIGHT = 4


def events(count: int, *, users: int) -> list[charge_requested_pb2.ChargeRequested]:
    ids = RandomIdSource()
    return [
        charge_requested_pb2.ChargeRequested(
            event_id=str(ids.new_id()), user_id=f"bench-{number % users}", scene="chat", provider="LOCAL", model="pro",
            usage=billing_pb2.Usage(input_tokens=100, output_tokens=50),
        )
        for number in range(count)
    ]


async def charges_by_rpc(address: str, *, users: int, batch_size: int, count: int) -> float:
    """Charges per second, answered when durable, a few requests in flight (64 when they hold one charge each)."""
    made = events(count, users=users)
    requests = [
        charge_service_pb2.RecordChargesRequest(charges=made[begin:begin + batch_size])
        for begin in range(0, count, batch_size)
    ]
    waiting = iter(requests)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = charge_service_pb2_grpc.ChargeServiceStub(channel)

        async def caller() -> None:
            for request in waiting:
                answer = await stub.RecordCharges(request, timeout=60)
                assert all(result.seq for result in answer.results)

        begun = time.perf_counter()
        await asyncio.gather(*[caller() for _ in range(64 if batch_size == 1 else IN_FLIGHT)])
        return count / (time.perf_counter() - begun)


def charges_by_kafka(mesh: Mesh, bootstrap_servers: str, *, prefix: str, users: int, count: int) -> float:
    """Charges per second from the first to the last entry that was booked; all were in the topic before."""
    mesh.tokenstore.start()
    give_up_at = time.monotonic() + 30
    while "kafka_assigned" not in mesh.tokenstore.text() and time.monotonic() < give_up_at:
        time.sleep(0.05)
    mesh.tokenstore.stop()
    producer = Producer({"bootstrap.servers": bootstrap_servers, "linger.ms": 5})
    for event in events(count, users=users):
        while True:
            try:
                producer.produce(f"{prefix}creditmesh.charges.v1", event.SerializeToString(), event.user_id.encode())
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0
    mesh.tokenstore.start()
    with psycopg.connect(mesh.tokenstore_url, autocommit=True) as connection:
        while True:
            row = connection.execute("SELECT coalesce(sum(seq), 0) FROM tokenstore.account").fetchone()
            if row is not None and row[0] >= count:
                break
            time.sleep(0.05)
        row = connection.execute(
            "SELECT extract(epoch FROM max(booked_at) - min(booked_at))::float8 FROM tokenstore.ledger_entry"
        ).fetchone()
        assert row is not None
        return count / float(row[0])
