"""Builds the server out of its parts; the only place that does."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from servicekit.core.clock import SystemClock
from servicekit.core.faults import faults_from
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from servicekit.db.leases import Leases
from servicekit.kafka.consumer import KafkaConsumer
from servicekit.kafka.offsets import load_offsets
from servicekit.kafka.producer import KafkaProducer, KafkaPublisher
from servicekit.kafka.topics import ensure_topics
from servicekit.lifecycle import Readiness, background, serve_until_stopped, stop_signal
from servicekit.outbox.relay import OutboxRelay
from servicekit.rpc.auth import authenticator_of
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.server import HealthBoard, all_scopes, build_server
from servicekit.rpc.validation import RequestValidator
from servicekit.settings import redacted
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import ConsumerMetrics, OutboxMetrics, RpcMetrics
from tokenstore_service.config import Settings
from tokenstore_service.domain.account import Account
from tokenstore_service.storage.book_store import PostgresBookStore
from tokenstore_service.storage.catalog import PostgresCatalog
from tokenstore_service.storage.charge_issues import PostgresIssues
from tokenstore_service.storage.ledger_metrics import PrometheusVerifyMetrics
from tokenstore_service.storage.ledger_reader import PostgresLedgerReader
from tokenstore_service.storage.order_reader import PostgresOrderReader
from tokenstore_service.storage.payment_secrets import FileSecrets
from tokenstore_service.storage.price_rules import FollowedPrices, PostgresPriceRules
from tokenstore_service.storage.redis_snapshots import RedisSnapshots
from tokenstore_service.storage.tables import SCHEMA
from tokenstore_service.transport.books import Books
from tokenstore_service.transport.event_consumer import EventConsumer
from tokenstore_service.transport.servicers import services
from tokenstore_service.usecases.balances import BalanceFeed, Balances
from tokenstore_service.usecases.resolve_issues import reprice_when_rules_change
from tokenstore_service.usecases.sweep_books import close_orders_once, expire_holds_once, expire_lots_once, sweep
from tokenstore_service.usecases.verify_ledger import verify_in_background
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.announcements import BALANCES_TOPIC, announcement_of
from tokenstore_service.wire.charges import CHARGES_TOPIC, DEAD_LETTERS_TOPIC, REWARDS_TOPIC, issue_original
from tokenstore_service.wire.usage_events import USAGE_TOPIC

log = EventLogger(__name__)

NAME = "tokenstore_service"
MIGRATIONS = Path(__file__).parent / "storage" / "migrations"
WRITER_CONNECTIONS = 2


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM. Raises OSError when the port is taken."""
    stop = stop_signal()
    clock, ids = SystemClock(), RandomIdSource()
    log.info("starting", **redacted(settings))
    if settings.allow_mock_payment:
        log.warning("mock_payment_allowed", reason="anybody with the scope orders.write can mint credit")
    url = settings.full_database_url()
    database = Database(url, schema=SCHEMA, application_name=NAME, pool_size=settings.database_pool_size)
    writing = Database(
        url, schema=SCHEMA, application_name=f"{NAME}-writer", pool_size=WRITER_CONNECTIONS, by_key_only=True
    )
    prices = FollowedPrices(database)
    reader = PostgresLedgerReader(database)
    shared = RedisSnapshots(settings.redis_url, clock=clock) if settings.redis_url else None
    balances = Balances(reader, clock=clock, keep_seconds=settings.balance_cache_seconds, shared=shared)
    feed = BalanceFeed(reader)
    topic = settings.kafka_topic_prefix.__add__
    faults = faults_from(settings.fault)

    def committed(accounts: Sequence[Account]) -> None:
        balances.committed(accounts)
        feed.committed(accounts)

    writer = BookWriter(
        PostgresBookStore(
            writing, encode_issue=issue_original, faults=faults,
            announce=functools.partial(announcement_of, topic=topic(BALANCES_TOPIC)),
        ),
        prices, clock=clock, faults=faults, policy=settings.policy(), on_committed=committed,
    )
    validator = RequestValidator()
    catalog, orders, issues = PostgresCatalog(database), PostgresOrderReader(database), PostgresIssues(database)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    leases = Leases(database, owner=owner)
    served = services(Books(
        writer=writer, reader=reader, balances=balances, feed=feed, rules=PostgresPriceRules(database), prices=prices,
        catalog=catalog, orders=orders, issues=issues,
        payment_secrets=FileSecrets(settings.payment_secrets_file, clock=clock),
        allow_mock_payment=settings.allow_mock_payment, validator=validator, clock=clock, ids=ids,
    ))
    board = HealthBoard([service.name for service in served])
    server = build_server(
        settings=settings, services=served, health_board=board,
        interceptor=CallInterceptor(
            authenticator=authenticator_of(settings.auth, settings.auth_tokens_file, clock=clock),
            scopes=all_scopes(served, reflection_open=settings.reflection_open), validator=validator,
            metrics=RpcMetrics(), clock=clock, ids=ids, log_successes=settings.access_log == "all",
        ),
    )
    work: dict[str, Callable[[], Awaitable[None]]] = {
        "prices": prices.follow,
        "watches": feed.follow,
        "hold-sweeper": lambda: sweep("holds", lambda: expire_holds_once(reader, writer, clock=clock), leases),
        "lot-sweeper": lambda: sweep("lots", lambda: expire_lots_once(reader, writer, clock=clock), leases),
    }
    if settings.order_expiry_seconds:
        expiry = settings.order_expiry_seconds
        work["order-sweeper"] = lambda: sweep(
            "orders", lambda: close_orders_once(orders, writer, clock=clock, expiry_seconds=expiry), leases
        )
    if settings.reprice == "auto":
        work["repricer"] = lambda: reprice_when_rules_change(issues, writer, prices, leases)
    if settings.verify_seconds:
        verify_metrics = PrometheusVerifyMetrics(clock=clock)
        work["verifier"] = lambda: verify_in_background(
            reader, leases, verify_metrics, every_seconds=settings.verify_seconds, clock=clock
        )
    if shared is not None:
        work["snapshots"] = balances.publish
    async with AsyncExitStack() as stack:
        for each in (database, writing):
            await each.open()
            stack.push_async_callback(each.close)
        stack.push_async_callback(leases.release)
        if shared is not None:
            stack.push_async_callback(shared.close)
        await prices.refresh()
        consumer: KafkaConsumer | None = None
        if settings.kafka_bootstrap_servers:
            producer = KafkaProducer(settings.kafka_bootstrap_servers, client_id=NAME)
            stack.callback(producer.close)
            topics = [topic(name) for name in (CHARGES_TOPIC, USAGE_TOPIC, REWARDS_TOPIC)]
            dead_letters = topic(DEAD_LETTERS_TOPIC)
            events = EventConsumer(
                writer, catalog, issues, producer, topic_prefix=settings.kafka_topic_prefix,
                dead_letters_topic=dead_letters, validator=validator, clock=clock, metrics=ConsumerMetrics(),
            )
            consumer = event_consumer = KafkaConsumer(
                bootstrap_servers=settings.kafka_bootstrap_servers, group=settings.kafka_group, topics=topics,
                client_id=NAME, protocol=settings.kafka_group_protocol, handle=events.handle,
                load_offsets=lambda partitions: load_offsets(database, partitions),
            )

            async def consume() -> None:
                await ensure_topics(
                    settings.kafka_bootstrap_servers, [*topics, dead_letters, topic(BALANCES_TOPIC)]
                )
                await event_consumer.run()

            work["consumer"] = consume
            if settings.balance_events != "off":
                relay = OutboxRelay(
                    database, KafkaPublisher(producer, source=NAME), owner=owner, metrics=OutboxMetrics(), clock=clock
                )
                work["relay"] = relay.run
        for name, task in work.items():
            await stack.enter_async_context(background(task, name=name))

        async def after_drain() -> None:
            if consumer is not None:
                await consumer.stop()
            await writer.close()

        await serve_until_stopped(
            server, readiness=Readiness(board, {"postgresql": database.answers}), stop=stop, stack=stack,
            drain_seconds=settings.drain_seconds, after_drain=after_drain, on_drain=feed.close,
        )
