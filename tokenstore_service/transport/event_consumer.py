"""Charges, usage of other services and rewards by Kafka: the same path as the RPCs, offsets in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable, DomainError, Overloaded
from servicekit.core.offsets import OffsetMove, StaleConsumer
from servicekit.kafka.consumer import Batch, KafkaRecord
from servicekit.kafka.events import header_of
from servicekit.kafka.producer import KafkaProducer
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import ConsumerMetrics
from servicekit.telemetry.tracing import TRACEPARENT, SpanKind, is_on
from tokenstore_service.domain.commands import Command
from tokenstore_service.domain.errors import RewardRuleNotFound
from tokenstore_service.transport.charge_spans import applying
from tokenstore_service.usecases.ports import Catalog, Issues
from tokenstore_service.usecases.reward import reward_command
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.charges import RewardAsked, UndecodableEvent, command_from_record
from tokenstore_service.wire.issues import undecodable_record

log = EventLogger(__name__)

MOST_ERROR_BYTES = 500
ACTOR = "kafka"


@dataclass(frozen=True, slots=True)
class _Poison:
    record: KafkaRecord
    reason: str


class EventConsumer:
    """Applies batches of events. What is none goes to the dead letters, bytes and headers as they came, and to the
    issues; what the database can not take, whatever is done, too: nothing loops for ever."""

    def __init__(
        self, writer: BookWriter, catalog: Catalog, issues: Issues, dead_letters: KafkaProducer, *,
        topic_prefix: str, dead_letters_topic: str, validator: RequestValidator, clock: Clock,
        metrics: ConsumerMetrics,
    ) -> None:
        self._writer = writer
        self._catalog = catalog
        self._issues = issues
        self._dead_letters = dead_letters
        self._topic_prefix = topic_prefix
        self._dead_letters_topic = dead_letters_topic
        self._validator = validator
        self._clock = clock
        self._metrics = metrics

    async def handle(self, batch: Batch) -> None:
        """Raises what may pass: then nothing of the batch is applied, and it comes again."""
        commands, poison = await self._commands_of(batch.records)
        await self._bury(poison)
        try:
            with applying(_traceparents(batch.records), kind=SpanKind.CONSUMER):
                answers = await self._writer.apply_all(commands, batch.moves)
        except (DependencyUnavailable, Overloaded, StaleConsumer):
            raise
        except Exception as error:  # noqa: BLE001 - looked at record by record below
            log.error("batch_not_applied", error=error, records=len(batch.records))
            await self._one_by_one(batch)
            return
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        for answer in refused:
            if not isinstance(answer, DomainError):
                raise answer
            log.error("event_refused", reason=answer.reason, detail=answer.message)
        self._metrics.consumed.inc(len(commands) - len(refused))

    async def _commands_of(self, records: Sequence[KafkaRecord]) -> tuple[list[Command], list[_Poison]]:
        commands: list[Command] = []
        poison: list[_Poison] = []
        now = self._clock.now()
        for record in records:
            try:
                topic = record.topic.removeprefix(self._topic_prefix)
                command = command_from_record(
                    topic, record.value, record.headers, validator=self._validator, now=now
                )
                commands.append(await self._reward(command) if isinstance(command, RewardAsked) else command)
            except (UndecodableEvent, RewardRuleNotFound) as error:
                poison.append(_Poison(record, str(error)))
        return commands, poison

    async def _reward(self, asked: RewardAsked) -> Command:
        return await reward_command(
            self._catalog, event_id=asked.event_id, user_id=asked.user_id, source=asked.source,
            source_ref_id=asked.source_ref_id, actor=ACTOR,
        )

    async def _one_by_one(self, batch: Batch) -> None:
        """Each record in a transaction of its own, so that one which nothing helps does not stop the others."""
        at = {(move.topic, move.partition): move.first for move in batch.moves}
        ends = {(move.topic, move.partition): move.next for move in batch.moves}
        last = {(record.topic, record.partition): record.offset for record in batch.records}
        for record in batch.records:
            key = (record.topic, record.partition)
            until = ends[key] if record.offset == last[key] else record.offset + 1
            move = OffsetMove(record.topic, record.partition, at[key], until)
            commands, _ = await self._commands_of([record])
            try:
                await self._writer.apply_all(commands, [move])
            except (DependencyUnavailable, Overloaded, StaleConsumer):
                raise
            except Exception as error:  # noqa: BLE001 - permanent: kept for people, and passed by
                await self._bury([_Poison(record, f"it can not be booked: {type(error).__name__}")])
                await self._writer.apply_all([], [move])
            at[key] = until

    async def _bury(self, poison: Sequence[_Poison]) -> None:
        """Before the offsets move: a crash in between buries a message twice, never loses it."""
        if not poison:
            return
        outcomes = await self._dead_letters.send([
            (
                self._dead_letters_topic, each.record.key, each.record.value,
                [
                    *each.record.headers,
                    ("dlq_topic", each.record.topic.encode()),
                    ("dlq_partition", str(each.record.partition).encode()),
                    ("dlq_offset", str(each.record.offset).encode()),
                    ("dlq_reason", each.reason.encode()[:MOST_ERROR_BYTES]),
                ],
            )
            for each in poison
        ])
        for outcome in outcomes:
            if outcome is not None:
                raise DependencyUnavailable("Kafka") from outcome
        now = self._clock.now()
        await self._issues.add([
            undecodable_record(
                topic=each.record.topic, partition=each.record.partition, offset=each.record.offset,
                key=each.record.key, value=each.record.value, headers=each.record.headers, reason=each.reason, now=now,
            )
            for each in poison
        ])
        for each in poison:
            log.error(
                "dead_letter", topic=each.record.topic, partition=each.record.partition, offset=each.record.offset,
                reason=each.reason[:200],
            )
        self._metrics.dead_letters.inc(len(poison))


def _traceparents(records: Sequence[KafkaRecord]) -> list[str]:
    if not is_on():
        return []
    return [(header_of(record.headers, TRACEPARENT) or b"").decode(errors="replace") for record in records]
