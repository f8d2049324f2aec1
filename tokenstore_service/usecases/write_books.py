"""The one writer of a process: every change to the books, by RPC, Kafka or sweeper, goes through it in batches.

Holds and charges that arrive together share a transaction and its commit, and never wait for each other's locks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from servicekit.batching import MicroBatcher
from servicekit.core.backoff import Backoff
from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable
from servicekit.core.faults import FaultPoint, Faults
from servicekit.core.offsets import OffsetMove
from tokenstore_service.domain.account import Account
from tokenstore_service.domain.book import Book, keys_of, wanted_by
from tokenstore_service.domain.commands import Answer, Command, RecordCharge
from tokenstore_service.domain.policy import DEFAULT_POLICY, Policy
from tokenstore_service.domain.pricing import price_charges
from tokenstore_service.domain.rules import apply
from tokenstore_service.usecases.ports import BookStore, Prices, TransientFailure

MOST_COMMANDS = 500
LINGER_SECONDS = 0.004
MOST_TRIES = 6
COMMANDS_BETWEEN_SENDS = 100

AnyAnswer = TypeVar("AnyAnswer")


@dataclass(frozen=True, slots=True)
class _Group:
    """Commands that share one fate, and the consumer offsets that move with them."""

    commands: Sequence[Command]
    moves: Sequence[OffsetMove] = ()


Answers = list[Answer | Exception]


class BookWriter:
    """Applies commands. Every command is idempotent, so that a batch whose commit is in doubt is simply tried again."""

    def __init__(
        self, store: BookStore, prices: Prices, *, clock: Clock, faults: Faults, policy: Policy = DEFAULT_POLICY,
        linger_seconds: float = LINGER_SECONDS, on_committed: Callable[[Sequence[Account]], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._prices = prices
        self._clock = clock
        self._faults = faults
        self._policy = policy
        self._on_committed = on_committed
        self._batcher: MicroBatcher[_Group, Answers] = MicroBatcher(
            self._run_groups, name="books", most_items=MOST_COMMANDS, linger_seconds=linger_seconds,
            weigh=lambda group: len(group.commands),
        )

    async def apply(self, command: Command, answer: type[AnyAnswer]) -> AnyAnswer:
        """One command's answer. Raises its error, DependencyUnavailable or Overloaded."""
        (result,) = await self.apply_all([command])
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, answer)
        return result

    async def apply_all(self, commands: Sequence[Command], moves: Sequence[OffsetMove] = ()) -> Answers:
        """One answer or error for each command; all in one transaction, with the offsets."""
        return await self._batcher.submit(_Group(commands, moves))

    async def close(self) -> None:
        await self._batcher.close()

    async def _run_groups(self, groups: Sequence[_Group]) -> Sequence[Answers | Exception]:
        try:
            return cast("Sequence[Answers | Exception]", await self._run_with_retries(groups))
        except DependencyUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - told to the group it belongs to
            if len(groups) == 1:
                return [error]
        # One group spoils the transaction of all (a stale consumer, or a bug): let each stand for itself.
        results: list[Answers | Exception] = []
        for group in groups:
            results.extend(await self._run_groups([group]))
        return results

    async def _run_with_retries(self, groups: Sequence[_Group]) -> list[Answers]:
        backoff = Backoff(first_seconds=0.02, most_seconds=1.0)
        for attempt in range(1, MOST_TRIES + 1):
            try:
                return await self._run_once(groups)
            except TransientFailure as error:
                if attempt == MOST_TRIES:
                    raise DependencyUnavailable("PostgreSQL") from error
                await asyncio.sleep(backoff.next_seconds())
        raise AssertionError("unreachable")

    async def _run_once(self, groups: Sequence[_Group]) -> list[Answers]:
        commands = [command for group in groups for command in group.commands]
        moves = [move for group in groups for move in group.moves]
        quoted = {
            (command.quote.rule_id, command.quote.version)
            for command in commands if isinstance(command, RecordCharge) and command.quote
        }
        await self._prices.ensure(quoted)
        now, prices = self._clock.now(), self._prices.book
        keys = keys_of(commands, now)
        priced = price_charges(commands, prices)
        async with self._store.begin() as unit:
            loaded = await unit.load(keys)
            wanted = wanted_by(loaded, keys, commands, priced, now)
            if wanted:
                loaded = await unit.load_more(loaded, wanted)
            self._faults.reach(FaultPoint.APPLY_LOADED)
            book = Book(loaded, prices=prices, now=now, policy=self._policy, priced=priced)
            made: list[Answer | Exception] = []
            for begin in range(0, len(commands), COMMANDS_BETWEEN_SENDS):
                made += [apply(book, command) for command in commands[begin:begin + COMMANDS_BETWEEN_SENDS]]
                await unit.send(book)
            book.finish()
            answers = iter(made)
            await unit.save(book, moves)
            self._faults.reach(FaultPoint.BEFORE_APPLY_COMMIT)
            await unit.commit()
        self._faults.reach(FaultPoint.AFTER_APPLY_COMMIT)
        self._on_committed([*book.new_accounts, *book.changed_accounts])
        return [[next(answers) for _ in group.commands] for group in groups]
