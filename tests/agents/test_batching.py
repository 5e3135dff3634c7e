"""`agents.batching`: which calls share a batch, errors, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from agents.batching import Batcher


class Doubling:
    """Doubles numbers, rejects 13, and records the batches; `gate` holds every batch back while it is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = 0
        self.most_running = 0

    def __call__(self, items: list[int]) -> list[int]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.batches.append(items)
        assert self.gate.wait(timeout=10)
        self.running -= 1
        if 13 in items:
            raise ValueError("13 is rejected")
        return [2 * item for item in items]


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition never came true")


def test_calls_that_wait_together_are_one_batch() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=16)

    async def late(item: int) -> int:
        await asyncio.sleep(0)  # work that is ready, but needs a turn of the loop to arrive
        return await batcher(item)

    async def main() -> list[int]:
        return await asyncio.gather(*[batcher(1), batcher(2), late(3), late(4)])

    assert asyncio.run(main()) == [2, 4, 6, 8]
    assert run.batches == [[1, 2, 3, 4]]


def test_a_batch_holds_at_most_max_batch_items_and_one_runs_at_a_time() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=3)

    async def main() -> list[int]:
        return await asyncio.gather(*(batcher(item) for item in range(8)))

    assert asyncio.run(main()) == [2 * item for item in range(8)]
    assert run.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert run.most_running == 1


def test_items_are_collected_and_the_loop_goes_on_while_a_batch_runs() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=16)

    async def main() -> None:
        run.gate.clear()
        first = asyncio.create_task(batcher(1))
        await until(lambda: run.batches)
        others = [asyncio.create_task(batcher(item)) for item in (2, 3)]
        await asyncio.sleep(0.02)
        assert run.batches == [[1]]
        run.gate.set()
        assert await asyncio.gather(first, *others) == [2, 4, 6]

    asyncio.run(main())
    assert run.batches == [[1], [2, 3]]


def test_with_sizes_the_oldest_item_goes_first_and_takes_the_nearest_along() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=2, size=float)

    async def main() -> None:
        await asyncio.gather(*(batcher(item) for item in (50, 1, 52, 2, 90, 91)))

    asyncio.run(main())
    assert run.batches == [[50, 52], [1, 2], [90, 91]]


def test_a_failing_batch_raises_in_each_of_its_calls_and_in_no_other() -> None:
    batcher = Batcher(Doubling(), max_batch=2)

    async def main() -> list[int | BaseException]:
        return await asyncio.gather(*(batcher(item) for item in (1, 13, 2, 3)), return_exceptions=True)

    first, second, *rest = asyncio.run(main())
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert rest == [4, 6]


def test_a_run_that_loses_a_result_is_an_error() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: items[1:], max_batch=4)

    async def main() -> None:
        await asyncio.gather(batcher(1), batcher(2))

    with pytest.raises(RuntimeError, match="must return 2 results, one an item; it returned 1"):
        asyncio.run(main())


def test_a_cancelled_call_takes_its_item_along_and_leaves_the_others_alone() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=16)

    async def main() -> None:
        run.gate.clear()
        running = [asyncio.create_task(batcher(item)) for item in (1, 2)]
        await until(lambda: run.batches)
        waiting = [asyncio.create_task(batcher(item)) for item in (3, 4)]
        await asyncio.sleep(0.01)
        running[0].cancel()
        waiting[0].cancel()
        run.gate.set()
        results = await asyncio.gather(*running, *waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, int, asyncio.CancelledError, int]
        assert await batcher(5) == 10

    asyncio.run(main())
    assert run.batches == [[1, 2], [4], [5]]


def test_it_serves_one_event_loop_after_another_even_when_one_stops_in_the_middle() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=1)

    async def stopped() -> None:
        async with asyncio.timeout(0.05):
            await asyncio.gather(batcher(1), batcher(2))

    async def main() -> int:
        return await batcher(3)

    run.gate.clear()
    with pytest.raises(TimeoutError):
        asyncio.run(stopped())
    threading.Timer(0.05, run.gate.set).start()
    assert asyncio.run(main()) == 6
    assert asyncio.run(main()) == 6
    assert run.batches == [[1], [3], [3]]
    assert run.most_running == 1


def test_nobody_waits_for_ever_when_every_task_is_cancelled() -> None:
    run = Doubling()
    batcher = Batcher(run, max_batch=1)

    async def main() -> None:
        run.gate.clear()
        calls = [asyncio.create_task(batcher(item)) for item in (1, 2)]
        await until(lambda: run.batches)
        for task in asyncio.all_tasks() - {asyncio.current_task(), *calls}:
            task.cancel()  # the batcher's own, and not the calls
        done, waiting = await asyncio.wait(calls, timeout=5)
        assert not waiting
        assert all(task.cancelled() for task in done)
        run.gate.set()

    asyncio.run(main())
