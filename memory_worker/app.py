"""Builds the server out of its parts; the only place that does."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

from memory_worker.clients.hashed_embedder import HashedEmbedder
from memory_worker.clients.language_models import GrpcModels, LlmEmbedder
from memory_worker.config import Settings
from memory_worker.storage.jobs import PostgresJobs
from memory_worker.storage.memories import PostgresMemories
from memory_worker.storage.tables import SCHEMA
from memory_worker.telemetry.memory_metrics import MemoryMetrics
from memory_worker.transport.servicers import MemoryParts, services
from memory_worker.transport.turn_consumer import TurnConsumer
from memory_worker.usecases.keep_house import keep_house
from memory_worker.usecases.manage_items import ItemKeeper
from memory_worker.usecases.ports import Embedder
from memory_worker.usecases.retrieve import Retriever
from memory_worker.usecases.work_jobs import JobWorker
from memory_worker.wire.turns import DEAD_LETTERS_TOPIC, TURNS_TOPIC
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
from servicekit.rpc.channel import TokenMetadata, open_channel
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.server import HealthBoard, all_scopes, build_server
from servicekit.rpc.validation import RequestValidator
from servicekit.settings import redacted
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import RpcMetrics

log = EventLogger(__name__)

NAME = "memory_worker"
MIGRATIONS = Path(__file__).parent / "storage" / "migrations"
EMBEDDING_ALIAS = "embedding"


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM. Raises OSError when the port is taken."""
    stop = stop_signal()
    clock, ids = SystemClock(), RandomIdSource()
    log.info("starting", **redacted(settings))
    database = Database(
        settings.full_database_url(), schema=SCHEMA, application_name=NAME, pool_size=settings.database_pool_size
    )
    channel = open_channel(
        settings.llm_target, ca_file=settings.llm_tls_ca_file, cert_file=settings.llm_tls_cert_file,
        key_file=settings.llm_tls_key_file,
    )
    token, policy, metrics = TokenMetadata(settings.llm_token_file), settings.policy_of(), MemoryMetrics()
    embedder: Embedder = HashedEmbedder()
    if settings.embedder == "llm":
        embedder = LlmEmbedder(channel, token, alias=EMBEDDING_ALIAS, version=settings.embedding_version)
    jobs, memories = PostgresJobs(database, ids), PostgresMemories(database, clock=clock, ids=ids)
    worker = JobWorker(
        jobs, jobs, memories, GrpcModels(channel, token), embedder, policy=policy,
        owner=f"{os.uname().nodename}:{os.getpid()}:{ids.new_id()}", most_running=settings.most_running_jobs,
        faults=faults_from(settings.fault), ended=metrics.ended,
    )
    validator = RequestValidator()
    served = services(MemoryParts(
        jobs=jobs, memories=memories,
        keeper=ItemKeeper(memories, jobs, embedder, policy=policy, clock=clock, ids=ids),
        retriever=Retriever(memories, embedder, policy=policy, clock=clock), embedder=embedder, wake=worker.wake,
        clock=clock, ids=ids,
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

    def indexed(items: int, with_vector: int) -> None:
        metrics.items.set(items)
        metrics.unindexed.set(items - with_vector)

    async with AsyncExitStack() as stack:
        await database.open()
        stack.push_async_callback(database.close)
        stack.push_async_callback(channel.close)
        consumer: KafkaConsumer | None = None
        if settings.kafka_bootstrap_servers:
            producer = KafkaProducer(settings.kafka_bootstrap_servers, client_id=NAME)
            stack.callback(producer.close)
            topic, dead = (settings.kafka_topic_prefix + name for name in (TURNS_TOPIC, DEAD_LETTERS_TOPIC))
            turns = TurnConsumer(
                jobs, producer, dead_letters_topic=dead, validator=validator, clock=clock, wake=worker.wake
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
        await stack.enter_async_context(background(
            lambda: keep_house(
                memories, embedder, answers_kept=timedelta(days=settings.answers_kept_days),
                expired=metrics.expired.inc, indexed=indexed,
            ),
            name="housekeeping",
        ))

        async def after_drain() -> None:
            if consumer is not None:
                await consumer.stop()

        await serve_until_stopped(
            server, readiness=Readiness(board, {"postgresql": database.answers}), stop=stop, stack=stack,
            drain_seconds=settings.drain_seconds, after_drain=after_drain,
        )
