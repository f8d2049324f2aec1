"""The asyncio micro-batcher that every batched path uses.

It adds no delay when idle: an item that finds the worker free is taken at once, and what queues while a batch runs
becomes the next batch. Only under load (several items in the batch and behind it) a worker lingers for
`linger_seconds` before its next batch, so that it is a fuller one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from servicekit.core.errors import Overloaded

ITEMS_UNDER_LOAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Gathers items of concurrent callers into batches and gives each its own result.

    `run(items)` answers one result per item, in order; a result that is an exception is raised to that item's caller,
    and an exception that `run` raises goes to every caller of the batch. A caller that is cancelled leaves the others
    alone: its item is dropped if its batch has not begun, and finished unheard otherwise. An item may weigh as much as
    several; a batch holds at most `most_items` of weight, or one item that is heavier by itself.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]], *, name: str,
        most_items: int = 500, most_queued: int = 20_000, workers: int = 1, linger_seconds: float = 0.0,
        weigh: Callable[[Item], int] = lambda _item: 1,
    ) -> None:
        self._run = run
        self._name = name
        self._most_items = most_items
        self._most_queued = most_queued
        self._linger_seconds = linger_seconds
        self._weigh = weigh
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._idle_workers = workers
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def submit(self, item: Item) -> Result:
        """The item's own result. Raises Overloaded when the queue is full or the batcher is closed."""
        return await self.enqueue(item)

    def enqueue(self, item: Item) -> asyncio.Future[Result]:
        """As submit, but the future at once."""
        if self._closed or len(self._queue) >= self._most_queued:
            raise Overloaded(f"the queue {self._name} is full or closed")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        if self._idle_workers > 0:
            self._idle_workers -= 1
            task = asyncio.create_task(self._work(), name=f"batcher-{self._name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def close(self) -> None:
        """Takes no more items and returns when those that were taken are done."""
        self._closed = True
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _work(self) -> None:
        try:
            while self._queue:
                batch = self._take()
                await self._run_batch(batch)
                under_load = len(batch) + len(self._queue) >= ITEMS_UNDER_LOAD
                if self._linger_seconds and under_load and len(self._queue) < self._most_items:
                    await asyncio.sleep(self._linger_seconds)
        finally:
            self._idle_workers += 1

    def _take(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        weight = 0
        while self._queue:
            item, future = self._queue[0]
            if batch and weight + self._weigh(item) > self._most_items:
                break
            self._queue.popleft()
            if not future.done():
                batch.append((item, future))
                weight += self._weigh(item)
        return batch

    async def _run_batch(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        if not batch:
            return
        try:
            results = await self._run([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"batch {self._name}: {len(results)} results for {len(batch)} items")
        except Exception as error:  # noqa: BLE001 - handed to every caller of the batch
            results = [error] * len(batch)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), result in zip(batch, results, strict=True):
            # A cancelled caller's future is done already; completing it would raise and stop everybody.
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
