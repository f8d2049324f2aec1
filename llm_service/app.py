"""Builds the server out of its parts; the only place that does."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio

from llm_service.clients.anthropic_format import AnthropicFormat
from llm_service.clients.credit_ledger import DirectChargeDelivery, GrpcCreditLedger
from llm_service.clients.http_model import HttpModel
from llm_service.clients.local_model import LocalModel, manners_of
from llm_service.clients.memory_service import DirectDelivery, DirectTurnDelivery, GrpcMemories
from llm_service.clients.openai_chat_format import OpenAiChatFormat
from llm_service.clients.openai_responses_format import OpenAiResponsesFormat
from llm_service.clients.token_counter import BpeTokenCounter
from llm_service.clients.upstream_http import UpstreamHttp
from llm_service.config import Settings
from llm_service.domain.call import CallRecord
from llm_service.domain.deployment import Provider
from llm_service.storage.call_journal import PostgresCallJournal
from llm_service.storage.content import ContentBox
from llm_service.storage.conversation_books import TurnRows
from llm_service.storage.conversation_rows import ConversationRows
from llm_service.storage.conversation_tasks import PostgresConversationTasks
from llm_service.storage.conversations import PostgresConversations
from llm_service.storage.model_registry import FollowedDirectory, PostgresModelRegistry
from llm_service.storage.sealed_keys import KeySealer
from llm_service.storage.tables import SCHEMA
from llm_service.storage.user_policies import PostgresUserPolicies
from llm_service.telemetry.call_metrics import CallMetrics
from llm_service.transport.servicers import Calls, services
from llm_service.usecases.admission import Admission, LocalLimiter
from llm_service.usecases.attempts import Attempts
from llm_service.usecases.begin_call import CallBeginner
from llm_service.usecases.conversation_chores import Chores
from llm_service.usecases.conversation_history import HistoryReader
from llm_service.usecases.conversation_ports import Memories
from llm_service.usecases.keep_calls_alive import keep_calls_alive
from llm_service.usecases.manage_conversations import Conversations
from llm_service.usecases.manage_models import ModelAdministration
from llm_service.usecases.model_health import ModelHealth
from llm_service.usecases.ports import Limiter, ModelProvider, TurnEnd
from llm_service.usecases.run_call import CallRunner
from llm_service.usecases.running_calls import RunningCalls
from llm_service.usecases.send_message import MessageSender
from llm_service.usecases.sweep_calls import sweep_calls
from llm_service.wire.chat import answer_from_bytes, answer_to_bytes, message_from_bytes, message_to_bytes
from llm_service.wire.events import (
    CHARGE_REQUESTED,
    CHARGES_TOPIC,
    TURN_COMPLETED,
    TURNS_TOPIC,
    charge_event_id,
    charge_requested_to_bytes,
    turn_completed_to_bytes,
    turn_key,
)
from servicekit.core.clock import SystemClock
from servicekit.core.faults import faults_from
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from servicekit.kafka.producer import KafkaProducer, KafkaPublisher
from servicekit.kafka.topics import ensure_topics
from servicekit.lifecycle import Readiness, background, serve_until_stopped, stop_signal
from servicekit.outbox.message import Publisher
from servicekit.outbox.relay import OutboxRelay
from servicekit.rpc.auth import authenticator_of
from servicekit.rpc.channel import TokenMetadata, open_unary_channel
from servicekit.rpc.interceptor import CallInterceptor
from servicekit.rpc.server import HealthBoard, all_scopes, build_server
from servicekit.rpc.validation import RequestValidator
from servicekit.sealing import KEY_BYTES, Sealer
from servicekit.settings import redacted
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import OutboxMetrics, RpcMetrics

log = EventLogger(__name__)

NAME = "llm_service"
MIGRATIONS = Path(__file__).parent / "storage" / "migrations"
WRITER_CONNECTIONS = 3
FLUSH_SECONDS = 5.0
TURN_SLACK_SECONDS = 5.0
"""How much longer than a call's lease and its queue a turn may take until its call is written down."""


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM. Raises OSError when the port is taken."""
    stop = stop_signal()
    clock, ids, faults = SystemClock(), RandomIdSource(), faults_from(settings.fault)
    charges_topic = settings.kafka_topic_prefix + CHARGES_TOPIC

    def event_of(record: CallRecord, *, corrects: bool = False) -> tuple[str, str, str, bytes]:
        event_id = charge_event_id(record, corrects=corrects)
        return event_id, CHARGE_REQUESTED, charges_topic, charge_requested_to_bytes(record, corrects=corrects)

    turns_topic = settings.kafka_topic_prefix + TURNS_TOPIC
    by_kafka, turn_sealer = bool(settings.kafka_bootstrap_servers), Sealer(settings.turn_keys())

    def turn_event_of(end: TurnEnd, record: CallRecord) -> tuple[str, str, str, str, bytes] | None:
        if not (end.turn.remembers and (by_kafka or settings.memory_target)):
            return None
        key = turn_key(end.turn.user_id, by_kafka=by_kafka)
        payload = turn_completed_to_bytes(end, record, turn_sealer)
        return key, str(end.turn.message_id), TURN_COMPLETED, turns_topic, payload

    hold_ttl = timedelta(seconds=settings.hold_ttl_seconds)
    log.info("starting", **redacted(settings))
    url = settings.full_database_url()
    database = Database(url, schema=SCHEMA, application_name=NAME, pool_size=settings.database_pool_size)
    writing = Database(
        url, schema=SCHEMA, application_name=f"{NAME}-writer", pool_size=WRITER_CONNECTIONS, by_key_only=True
    )
    channel = open_unary_channel(
        settings.tokenstore_target, ca_file=settings.tokenstore_tls_ca_file,
        cert_file=settings.tokenstore_tls_cert_file, key_file=settings.tokenstore_tls_key_file,
    )
    token = TokenMetadata(settings.tokenstore_token_file)
    ledger = GrpcCreditLedger(channel, token, hold_ttl=hold_ttl)
    sealer = KeySealer(settings.sealing_keys())
    answer_sealer = sealer
    if not sealer.can_seal:
        # Never in clear: without a key of the operator's, under one that ends with this process.
        answer_sealer = KeySealer([os.urandom(KEY_BYTES)])
        log.warning("answers_end_with_the_process", reason="LLM_SECRET_KEY is not set")
    registry = PostgresModelRegistry(database, sealer)
    box = ContentBox(sealer, seals=settings.seal_conversations)
    rows = ConversationRows(box, message_to_bytes=message_to_bytes, message_from_bytes=message_from_bytes)
    policies = PostgresUserPolicies(database)
    directory = FollowedDirectory(database, registry, also=policies.refresh)
    tokens = BpeTokenCounter()
    running = RunningCalls()
    health, meters = ModelHealth(clock), CallMetrics()
    http = UpstreamHttp(settings.upstream_reach)
    providers: dict[Provider, ModelProvider] = {
        Provider.LOCAL: LocalModel(tokens, tokens_per_second=settings.local_tokens_per_second),
        Provider.OPENAI_CHAT: HttpModel(http, OpenAiChatFormat()),
        Provider.OPENAI_RESPONSES: HttpModel(http, OpenAiResponsesFormat()),
        Provider.ANTHROPIC: HttpModel(http, AnthropicFormat()),
    }
    async with AsyncExitStack() as stack:
        for each in (database, writing):
            await each.open()
            stack.push_async_callback(each.close)
        stack.push_async_callback(channel.close)
        stack.push_async_callback(http.close)
        limiter: Limiter = LocalLimiter(clock)
        if settings.redis_url:
            # Imported here: the driver weighs 24 MB, and most processes need none.
            from llm_service.clients.redis_limits import RedisLimiter

            limiter = shared = RedisLimiter(settings.redis_url, clock=clock, ids=ids)
            stack.push_async_callback(shared.close)
        admission = Admission(
            limiter, clock=clock, queue_seconds=settings.queue_seconds, most_waiting=settings.most_waiting_calls
        )
        publisher: Publisher = DirectChargeDelivery(channel, token)
        memory: Memories | None = None
        if settings.memory_target:
            memory_channel = open_unary_channel(
                settings.memory_target, ca_file=settings.memory_tls_ca_file,
                cert_file=settings.memory_tls_cert_file, key_file=settings.memory_tls_key_file,
            )
            stack.push_async_callback(memory_channel.close)
            memory_token = TokenMetadata(settings.memory_token_file)
            memory = GrpcMemories(memory_channel, memory_token, seconds=settings.memory_seconds)
            publisher = DirectDelivery(publisher, DirectTurnDelivery(memory_channel, memory_token))
        if settings.kafka_bootstrap_servers:
            await stack.enter_async_context(background(
                lambda: ensure_topics(settings.kafka_bootstrap_servers, [charges_topic, turns_topic]),
                name="kafka-topics",
            ))
            producer = KafkaProducer(settings.kafka_bootstrap_servers, client_id=NAME)
            stack.callback(producer.close)
            publisher = KafkaPublisher(producer, source=f"/creditmesh/{NAME}")
        relay = OutboxRelay(
            writing, publisher, owner=f"{os.uname().nodename}:{os.getpid()}:{ids.new_id()}", metrics=OutboxMetrics(),
            clock=clock, faults=faults,
        )
        journal = PostgresCallJournal(
            writing, database, event_of=event_of, sealer=answer_sealer, answer_to_bytes=answer_to_bytes,
            answer_from_bytes=answer_from_bytes, wake_relay=relay.wake,
            turns=TurnRows(box, message_to_bytes=message_to_bytes, event_of=turn_event_of),
            lease=timedelta(seconds=settings.call_lease_seconds),
        )
        runner = CallRunner(
            beginner=CallBeginner(
                models=directory, ledger=ledger, journal=journal, tokens=tokens, admission=admission,
                policies=policies, user_limits=settings.user_limits(), clock=clock, ids=ids, faults=faults,
            ),
            attempts=Attempts(
                providers, health=health, admission=admission, meters=meters, clock=clock,
                most_attempts=settings.most_attempts,
            ),
            ledger=ledger, journal=journal, tokens=tokens, admission=admission, policies=policies, running=running,
            meters=meters, clock=clock, faults=faults, most_running=settings.most_running_calls,
        )
        conversations = PostgresConversations(database, rows)
        sender = MessageSender(
            conversations, runner, journal, directory,
            HistoryReader(conversations, tokens, most=settings.history_messages), memory, clock=clock, ids=ids,
            faults=faults, turn_seconds=settings.call_lease_seconds + settings.queue_seconds + TURN_SLACK_SECONDS,
        )
        chores = Chores(PostgresConversationTasks(database, rows), conversations, runner)
        validator = RequestValidator()
        served = services(
            Calls(runner, journal, running, directory, tokens, ids),
            ModelAdministration(
                registry, directory, providers, check_local=manners_of, reach=settings.upstream_reach, clock=clock,
                ids=ids,
            ),
            policies, Conversations(conversations, running, clock=clock, ids=ids), sender, validator, clock, ids,
        )
        board = HealthBoard([service.name for service in served])
        server = build_server(
            settings=settings, services=served, health_board=board,
            interceptor=CallInterceptor(
                authenticator=authenticator_of(settings.auth, settings.auth_tokens_file, clock=clock),
                scopes=all_scopes(served, reflection_open=settings.reflection_open), validator=validator,
                metrics=RpcMetrics(), clock=clock, ids=ids, log_successes=settings.access_log == "all",
            ),
        )
        await directory.refresh()
        await stack.enter_async_context(background(directory.follow, name="models"))
        await stack.enter_async_context(background(relay.run, name="outbox-relay"))
        await stack.enter_async_context(background(
            lambda: keep_calls_alive(
                running, journal, ledger, limiter, clock=clock, hold_ttl=hold_ttl,
                beat=lambda: meters.show(running, directory, health),
            ),
            name="heartbeats",
        ))
        kept = timedelta(seconds=settings.replay_ttl)
        await stack.enter_async_context(background(
            lambda: sweep_calls(
                journal, ledger, conversations, clock=clock, answers_kept=kept,
                found=lambda state, calls: meters.swept.labels(state).inc(calls),
            ),
            name="call-sweeper",
        ))

        await stack.enter_async_context(background(
            lambda: chores.run(mismatches=meters.conversation_mismatches.set), name="conversation-chores"
        ))

        async def tokenstore_is_reachable() -> bool:
            return channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

        async def after_drain() -> None:
            await runner.close()
            await sender.close()
            await journal.close()
            await ledger.close()
            await relay.leave(flush_seconds=FLUSH_SECONDS)

        readiness = Readiness(board, {"postgresql": database.answers, "tokenstore": tokenstore_is_reachable})
        await serve_until_stopped(
            server, readiness=readiness, stop=stop, drain_seconds=settings.drain_seconds, stack=stack,
            after_drain=after_drain,
        )
