"""The micro-batcher: batches, limits, results, errors, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from servicekit.batching import MicroBatcher
from servicekit.core.errors import Overloaded


class Doubler:
    """Doubles numbers; 13 is an error of its own, 666 of the whole batch. Waits while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, items: Sequence[int]) -> Sequence[int | Exception]:
        self.batches.append(list(items))
        await self.gate.wait()
        if 666 in items:
            raise ArithmeticError("the whole batch")
        return [ValueError("unlucky") if item == 13 else 2 * item for item in items]


async def test_an_idle_batcher_takes_an_item_at_once_and_a_busy_one_gathers_the_rest() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler.run, name="test")
    doubler.gate.clear()
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = [asyncio.create_task(batcher.submit(number)) for number in (7, 8)]
    await asyncio.sleep(0)
    doubler.gate.set()
    assert await asyncio.gather(*tasks, *late) == [0, 2, 4, 6, 8, 14, 16]
    assert sorted(map(len, doubler.batches)) == [2, 5]


async def test_each_item_has_its_own_result_or_error() -> None:
    batcher = MicroBatcher(Doubler().run, name="test")
    results = await asyncio.gather(*map(batcher.submit, (1, 13, 3)), return_exceptions=True)
    assert (results[0], results[2]) == (2, 6)
    assert isinstance(results[1], ValueError)


async def test_an_error_of_the_batch_goes_to_all_and_the_next_batch_runs() -> None:
    batcher = MicroBatcher(Doubler().run, name="test")
    results = await asyncio.gather(*map(batcher.submit, (1, 666)), return_exceptions=True)
    assert all(isinstance(result, ArithmeticError) for result in results)
    assert await batcher.submit(4) == 8


async def test_a_wrong_number_of_results_is_an_error_not_a_hang() -> None:
    async def run(items: Sequence[int]) -> Sequence[int]:
        return []

    with pytest.raises(RuntimeError, match="0 results for 1 items"):
        await MicroBatcher(run, name="test").submit(1)


async def test_a_cancelled_caller_leaves_the_others_alone() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler.run, name="test")
    doubler.gate.clear()
    running = [asyncio.create_task(batcher.submit(number)) for number in (1, 2)]
    await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(batcher.submit(number)) for number in (3, 4)]
    await asyncio.sleep(0.01)
    running[0].cancel()
    waiting[0].cancel()
    await asyncio.sleep(0)
    doubler.gate.set()
    assert await running[1] == 4
    assert await waiting[1] == 8
    assert doubler.batches == [[1, 2], [4]], "what was cancelled in time is not run"
    assert await batcher.submit(5) == 10


async def test_a_batch_holds_no_more_than_its_limit() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler.run, name="test", most_items=3)
    await asyncio.gather(*map(batcher.submit, range(10)))
    assert max(map(len, doubler.batches)) == 3


async def test_items_may_weigh_and_a_heavy_one_stands_alone() -> None:
    doubler = Doubler()
    batcher = MicroBatcher(doubler.run, name="test", most_items=10, weigh=lambda item: item)
    await asyncio.gather(*map(batcher.submit, (4, 4, 4, 50, 1)))
    assert doubler.batches == [[4, 4], [4], [50], [1]]


async def test_a_full_queue_refuses_at_once() -> None:
    doubler = Doubler()
    doubler.gate.clear()
    batcher = MicroBatcher(doubler.run, name="test", most_queued=2)
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(2)]
    await asyncio.sleep(0.01)
    more = [asyncio.create_task(batcher.submit(number)) for number in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await batcher.submit(9)
    doubler.gate.set()
    await asyncio.gather(*tasks, *more)


async def test_closing_finishes_what_was_taken_and_takes_no_more() -> None:
    batcher = MicroBatcher(Doubler().run, name="test")
    task = asyncio.create_task(batcher.submit(1))
    await asyncio.sleep(0)
    await batcher.close()
    assert await task == 2
    with pytest.raises(Overloaded):
        await batcher.submit(2)
