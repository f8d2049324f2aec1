"""Builds the server out of its parts; the only place that does."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from servicekit.core.clock import SystemClock
from servicekit.core.faults import faults_from
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from servicekit.kafka.consumer import KafkaConsumer
from servicekit.kafka.offsets import load_offsets
from servicekit.kafka.producer import KafkaProducer
from servicekit.kafka.topics import ensure_topics
from servicekit.lifecycle import Readiness, background, serve_until_stopped, stop_signal
from servicekit.rpc.auth import authenticator_of
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.server import HealthBoard, all_scopes, build_server
from servicekit.rpc.validation import RequestValidator
from servicekit.settings import redacted
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import ConsumerMetrics, RpcMetrics
from tokenstore_service.config import Settings
from tokenstore_service.storage.book_store import PostgresBookStore
from tokenstore_service.storage.ledger_reader import PostgresLedgerReader
from tokenstore_service.storage.price_rules import FollowedPrices, PostgresPriceRules
from tokenstore_service.storage.tables import SCHEMA
from tokenstore_service.transport.charge_consumer import ChargeConsumer
from tokenstore_service.transport.servicers import Books, services
from tokenstore_service.usecases.sweep_holds import sweep_holds
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.charges import CHARGES_TOPIC, DEAD_LETTERS_TOPIC, issue_original_to_bytes

log = EventLogger(__name__)

NAME = "tokenstore_service"
MIGRATIONS = Path(__file__).parent / "storage" / "migrations"
WRITER_CONNECTIONS = 2


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM. Raises OSError when the port is taken."""
    stop = stop_signal()
    clock, ids = SystemClock(), RandomIdSource()
    log.info("starting", **redacted(settings))
    if settings.redis_url:
        log.warning("redis_not_used", reason="balances are read from the database in this version")
    url = settings.full_database_url()
    database = Database(url, schema=SCHEMA, application_name=NAME, pool_size=settings.database_pool_size)
    writing = Database(
        url, schema=SCHEMA, application_name=f"{NAME}-writer", pool_size=WRITER_CONNECTIONS, by_key_only=True
    )
    prices = FollowedPrices(database)
    reader = PostgresLedgerReader(database)
    writer = BookWriter(
        PostgresBookStore(writing, encode_issue=issue_original_to_bytes), prices, clock=clock,
        faults=faults_from(settings.fault),
    )
    validator = RequestValidator()
    served = services(Books(writer, reader, PostgresPriceRules(database), prices, clock, ids))
    board = HealthBoard([service.name for service in served])
    server = build_server(
        settings=settings, services=served, health_board=board,
        interceptor=CallInterceptor(
            authenticator=authenticator_of(settings.auth, settings.auth_tokens_file, clock=clock),
            scopes=all_scopes(served, reflection_open=settings.reflection_open), validator=validator,
            metrics=RpcMetrics(), clock=clock, ids=ids, log_successes=settings.access_log == "all",
        ),
    )
    async with AsyncExitStack() as stack:
        for each in (database, writing):
            await each.open()
            stack.push_async_callback(each.close)
        await prices.refresh()
        await stack.enter_async_context(background(prices.follow, name="prices"))
        await stack.enter_async_context(
            background(lambda: sweep_holds(reader, writer, clock=clock), name="hold-sweeper")
        )
        consumer: KafkaConsumer | None = None
        if settings.kafka_bootstrap_servers:
            producer = KafkaProducer(settings.kafka_bootstrap_servers, client_id=NAME)
            stack.callback(producer.close)
            topic = settings.kafka_topic_prefix + CHARGES_TOPIC
            dead_letters = settings.kafka_topic_prefix + DEAD_LETTERS_TOPIC
            charges = ChargeConsumer(
                writer, producer, dead_letters_topic=dead_letters, validator=validator, clock=clock,
                metrics=ConsumerMetrics(),
            )
            consumer = charge_consumer = KafkaConsumer(
                bootstrap_servers=settings.kafka_bootstrap_servers, group=settings.kafka_group,
                topics=[topic], client_id=NAME, protocol=settings.kafka_group_protocol, handle=charges.handle,
                load_offsets=lambda partitions: load_offsets(database, partitions),
            )

            async def consume() -> None:
                await ensure_topics(settings.kafka_bootstrap_servers, [topic, dead_letters])
                await charge_consumer.run()

            await stack.enter_async_context(background(consume, name="charge-consumer"))

        async def after_drain() -> None:
            if consumer is not None:
                await consumer.stop()
            await writer.close()

        await serve_until_stopped(
            server, readiness=Readiness(board, {"postgresql": database.answers}), stop=stop, stack=stack,
            drain_seconds=settings.drain_seconds, after_drain=after_drain,
        )
