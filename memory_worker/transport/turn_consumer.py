"""Turns by Kafka: one job each, offsets in the same transaction; what is no turn goes to the dead letters."""

from __future__ import annotations

from collections.abc import Callable

from memory_worker.domain.errors import TurnSealed
from memory_worker.usecases.ports import JobQueue, Turn
from memory_worker.wire.turns import TurnReader, UndecodableTurn, turn_event_from_bytes
from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable, DomainError
from servicekit.kafka.consumer import Batch, KafkaRecord
from servicekit.kafka.producer import KafkaProducer
from servicekit.rpc.validation import RequestValidator
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)


class TurnConsumer:
    """Turns batches of records into jobs."""

    def __init__(
        self, jobs: JobQueue, reader: TurnReader, dead_letters: KafkaProducer, *, dead_letters_topic: str,
        validator: RequestValidator, clock: Clock, wake: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._reader = reader
        self._dead_letters = dead_letters
        self._topic = dead_letters_topic
        self._validator = validator
        self._clock = clock
        self._wake = wake

    async def handle(self, batch: Batch) -> None:
        """Raises what may pass: then nothing of the batch is taken, and it comes again."""
        turns: list[Turn] = []
        buried: list[tuple[str, bytes | None, bytes | None, list[tuple[str, str | bytes | None]]]] = []
        for record in batch.records:
            try:
                turns.append(self._turn_of(record))
            except TurnSealed:
                raise  # a key is missing here: nothing is wrong with the turn, which waits for it
            except (UndecodableTurn, DomainError) as error:
                log.error("turn_undecodable", reason=str(error), topic=record.topic, partition=record.partition,
                          offset=record.offset)
                headers: list[tuple[str, str | bytes | None]] = [
                    *record.headers, ("dlq_topic", record.topic.encode()),
                    ("dlq_partition", str(record.partition).encode()), ("dlq_offset", str(record.offset).encode()),
                    ("dlq_reason", str(error).encode()[:500]),
                ]
                buried.append((self._topic, record.key, record.value, headers))
        for outcome in await self._dead_letters.send(buried):
            if outcome is not None:
                raise DependencyUnavailable("Kafka") from outcome
        await self._jobs.submit(turns, batch.moves)
        self._wake()

    def _turn_of(self, record: KafkaRecord) -> Turn:
        event = turn_event_from_bytes(record.value)
        self._validator.check(event)
        return self._reader.turn_of(event, now=self._clock.now())
