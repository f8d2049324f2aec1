"""Charges by Kafka: the same path as RecordCharges, with the offsets in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence

from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable
from servicekit.kafka.consumer import Batch, KafkaRecord
from servicekit.kafka.producer import KafkaProducer
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry.logs import EventLogger
from servicekit.telemetry.metrics import ConsumerMetrics
from tokenstore_service.domain.commands import RecordCharge
from tokenstore_service.usecases.write_books import BookWriter
from tokenstore_service.wire.charges import UndecodableEvent, charge_from_record

log = EventLogger(__name__)

MOST_ERROR_BYTES = 500


class ChargeConsumer:
    """Applies batches of charge events; what is none goes to the dead letters, bytes and headers as they came."""

    def __init__(
        self, writer: BookWriter, dead_letters: KafkaProducer, *, dead_letters_topic: str,
        validator: RequestValidator, clock: Clock, metrics: ConsumerMetrics,
    ) -> None:
        self._writer = writer
        self._dead_letters = dead_letters
        self._dead_letters_topic = dead_letters_topic
        self._validator = validator
        self._clock = clock
        self._metrics = metrics

    async def handle(self, batch: Batch) -> None:
        """Raises whatever keeps the batch from being applied; then nothing of it is, and it comes again."""
        charges: list[RecordCharge] = []
        poison: list[tuple[KafkaRecord, str]] = []
        now = self._clock.now()
        for record in batch.records:
            try:
                charges.append(
                    charge_from_record(record.value, record.headers, validator=self._validator, now=now)
                )
            except UndecodableEvent as error:
                poison.append((record, str(error)))
        if poison:
            await self._bury(poison)
        for answer in await self._writer.apply_all(charges, batch.moves):
            if isinstance(answer, Exception):
                raise answer
        self._metrics.consumed.inc(len(charges))

    async def _bury(self, poison: Sequence[tuple[KafkaRecord, str]]) -> None:
        """Before the offsets move: a crash in between buries a message twice, never loses it."""
        outcomes = await self._dead_letters.send([
            (
                self._dead_letters_topic, record.key, record.value,
                [
                    *record.headers,
                    ("dlq_topic", record.topic.encode()),
                    ("dlq_partition", str(record.partition).encode()),
                    ("dlq_offset", str(record.offset).encode()),
                    ("dlq_reason", reason.encode()[:MOST_ERROR_BYTES]),
                ],
            )
            for record, reason in poison
        ])
        for (record, reason), outcome in zip(poison, outcomes, strict=True):
            if outcome is not None:
                raise DependencyUnavailable("Kafka") from outcome
            log.error(
                "dead_letter", topic=record.topic, partition=record.partition, offset=record.offset, reason=reason[:200]
            )
        self._metrics.dead_letters.inc(len(poison))
