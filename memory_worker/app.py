"""Builds the server out of its parts; the only place that does."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

from memory_worker.clients.embedders import EmbedderMaker, name_of
from memory_worker.clients.language_models import GrpcModels
from memory_worker.config import Settings
from memory_worker.storage.decisions import PostgresDecisions
from memory_worker.storage.index_outbox import PostgresIndexOutbox
from memory_worker.storage.item_writer import ItemWriter
from memory_worker.storage.items import PostgresItems
from memory_worker.storage.jobs import PostgresJobs
from memory_worker.storage.tables import SCHEMA
from memory_worker.storage.upkeep import PostgresUpkeep
from memory_worker.telemetry.memory_metrics import MemoryMetrics
from memory_worker.transport.servicers import MemoryParts, services
from memory_worker.transport.turn_consumer import TurnConsumer
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.keep_house import Housekeeper, Rhythm
from memory_worker.usecases.manage_items import ItemKeeper
from memory_worker.usecases.memory_ports import VectorIndex
from memory_worker.usecases.replay_jobs import JobReplayer
from memory_worker.usecases.retrieve import Retriever
from memory_worker.usecases.vector_index import IndexKeeper, IndexSearch
from memory_worker.usecases.work_jobs import JobWorker
from memory_worker.wire.turns import DEAD_LETTERS_TOPIC, TURNS_TOPIC, TurnReader
from servicekit.core.clock import SystemClock
from servicekit.core.faults import faults_from
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from servicekit.db.leases import Leases
from servicekit.kafka.consumer import KafkaConsumer
from servicekit.kafka.offsets import load_offsets
from servicekit.kafka.producer import KafkaProducer
from servicekit.kafka.topics import ensure_topics
from servicekit.lifecycle import Readiness, background, serve_until_stopped, stop_signal
from servicekit.rpc.auth import authenticator_of
from servicekit.rpc.channel import TokenMetadata, open_unary_channel
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.server import HealthBoard, all_scopes, build_server
from servicekit.rpc.validation import RequestValidator
from servicekit.sealing import Sealer
from servicekit.settings import ConfigurationError, redacted
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import RpcMetrics

log = EventLogger(__name__)

NAME = "memory_worker"
MOST_TRANSACTION_SECONDS = 60.0
"""Nothing here holds a user's memories for longer than some milliseconds; what does has gone wrong."""
MIGRATIONS = Path(__file__).parent / "storage" / "migrations"


def index_of(settings: Settings) -> VectorIndex | None:
    """The vector database that the settings name; None = PostgreSQL alone. Raises ConfigurationError."""
    if settings.vector_index != "milvus":
        return None
    try:
        from memory_worker.clients.milvus import MilvusIndex
    except ImportError as error:
        raise ConfigurationError([f"MEMORY_VECTOR_INDEX: needs the extra creditmesh[milvus] ({error.name})"]) from error
    return MilvusIndex(
        settings.milvus_uri, token=settings.milvus_token.get_secret_value(), prefix=settings.milvus_prefix,
        search_seconds=settings.milvus_search_seconds, seconds=settings.milvus_seconds,
    )


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM. Raises OSError when the port is taken."""
    stop = stop_signal()
    clock, ids = SystemClock(), RandomIdSource()
    log.info("starting", **redacted(settings))
    database = Database(
        settings.full_database_url(), schema=SCHEMA, application_name=NAME, pool_size=settings.database_pool_size,
        transaction_seconds=MOST_TRANSACTION_SECONDS,
    )
    channel = open_unary_channel(
        settings.llm_target, ca_file=settings.llm_tls_ca_file, cert_file=settings.llm_tls_cert_file,
        key_file=settings.llm_tls_key_file,
    )
    token, policy, metrics = TokenMetadata(settings.llm_token_file), settings.policy_of(), MemoryMetrics()
    maker = EmbedderMaker(channel, token)
    wanted = name_of(settings.embedder, alias=settings.embedding_alias, version=settings.embedding_version)
    embedder = maker.make(wanted)
    if embedder is None:
        raise ConfigurationError([f"MEMORY_EMBEDDER: {settings.embedder} needs the extra creditmesh[minilm]"])
    index = index_of(settings)
    tell_index = index is not None
    writer, jobs = ItemWriter(database, tell_index=tell_index), PostgresJobs(database, ids)
    items = PostgresItems(database, writer, clock=clock, tell_index=tell_index)
    decisions = PostgresDecisions(database, writer, clock=clock, ids=ids)
    upkeep = PostgresUpkeep(database, writer, clock=clock)
    embedders = Embedders(embedder, upkeep, make=maker.make)
    search = IndexSearch(index, clock=clock, failed=metrics.index_failures.inc)
    index_keeper: IndexKeeper | None = None
    if index is not None:
        index_keeper = IndexKeeper(
            index, PostgresIndexOutbox(database), serving=lambda: embedders.serving.name, clock=clock
        )
    reader = TurnReader(Sealer(settings.turn_keys()))
    models = GrpcModels(channel, token)
    owner = f"{os.uname().nodename}:{os.getpid()}:{ids.new_id()}"
    worker = JobWorker(
        jobs, jobs, items, decisions, models, embedders, search, opened=reader.opened,
        policy=policy, owner=owner, most_running=settings.most_running_jobs, faults=faults_from(settings.fault),
        ended=metrics.ended,
    )
    leases = Leases(database, owner=owner)
    housekeeper = Housekeeper(
        upkeep, embedders, leases, kept=settings.retention_of(), clock=clock,
        rhythm=Rhythm(settings.chores_seconds, timedelta(seconds=settings.compare_seconds)), index=index_keeper,
        expired=metrics.expired.inc, indexed=metrics.indexed, drifted=metrics.drifted, waiting=metrics.waiting.set,
    )
    validator = RequestValidator()
    served = services(MemoryParts(
        jobs=jobs, turns=reader, items=items, decisions=decisions, upkeep=upkeep, embedders=embedders,
        index=index_keeper,
        keeper=ItemKeeper(items, decisions, jobs, embedders, policy=policy, clock=clock, ids=ids),
        replayer=JobReplayer(jobs, items, decisions, models, policy=policy, opened=reader.opened),
        retriever=Retriever(items, embedders, search, policy=policy, clock=clock), wake=worker.wake, clock=clock,
        ids=ids,
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

    async with AsyncExitStack() as stack:
        await database.open()
        stack.push_async_callback(database.close)
        stack.push_async_callback(leases.release)
        if index is not None:
            stack.callback(index.close)
        await embedders.announce()
        stack.push_async_callback(channel.close)
        consumer: KafkaConsumer | None = None
        if settings.kafka_bootstrap_servers:
            producer = KafkaProducer(settings.kafka_bootstrap_servers, client_id=NAME)
            stack.callback(producer.close)
            topic, dead = (settings.kafka_topic_prefix + name for name in (TURNS_TOPIC, DEAD_LETTERS_TOPIC))
            turns = TurnConsumer(
                jobs, reader, producer, dead_letters_topic=dead, validator=validator, clock=clock, wake=worker.wake
            )
            consumer = turn_consumer = KafkaConsumer(
                bootstrap_servers=settings.kafka_bootstrap_servers, group=settings.kafka_group, topics=[topic],
                client_id=NAME, protocol=settings.kafka_group_protocol, handle=turns.handle,
                load_offsets=lambda partitions: load_offsets(database, partitions),
            )

            async def consume() -> None:
                await ensure_topics(settings.kafka_bootstrap_servers, [topic, dead])
                await turn_consumer.run()

            await stack.enter_async_context(background(consume, name="consumer"))
        await stack.enter_async_context(background(worker.run, name="jobs"))
        await stack.enter_async_context(background(embedders.follow, name="embedders"))
        await stack.enter_async_context(background(housekeeper.run, name="housekeeping"))
        if index_keeper is not None:
            await stack.enter_async_context(background(index_keeper.run, name="index"))

        async def after_drain() -> None:
            if consumer is not None:
                await consumer.stop()

        await serve_until_stopped(
            server, readiness=Readiness(board, {"postgresql": database.answers}), stop=stop, stack=stack,
            drain_seconds=settings.drain_seconds, after_drain=after_drain,
        )
