"""Many coroutines, one batch: calls that wait at the same time are carried out together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Gathers the items that coroutines wait for and hands them to `run`, one batch at a time.

    A batch starts when the event loop has nothing else to do that could bring another item, or when it is full; items
    that come while one runs wait for the next. A caller that is cancelled takes its item with it while it waits, and
    leaves the others alone. An instance serves one event loop at a time, any number one after another.

    Args:
        run: Turns N items into N results, in the same order; what it raises is raised in each of the N calls.
        max_batch: Most items in a batch.
        size: What an item costs, for example a prompt's length. With it a batch is the item that has waited longest and
            those nearest to it in size, which limits padding and starves nobody; without it, first come first served.
    """

    def __init__(
        self,
        run: Callable[[list[T]], list[R]],
        max_batch: int,
        *,
        size: Callable[[T], float] | None = None,
        thread: bool = True,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._size = size
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._drainer: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch") if thread else None

    async def __call__(self, item: T) -> R:
        """The result for `item`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        if self._drainer is None or self._drainer.done() or self._drainer.get_loop() is not loop:
            self._waiting.clear()  # left by an event loop that stopped in the middle
            self._drainer = loop.create_task(self._drain())
        self._waiting.append((item, future))
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._waiting:
            try:
                await self._let_others_come()
                batch = self._take()
                if not batch:
                    continue
                items = [item for item, _ in batch]
                results = (
                    await loop.run_in_executor(self._worker, self._run, items) if self._worker else self._run(items)
                )
                if len(results) != len(batch):
                    raise RuntimeError(
                        f"run must return {len(batch)} results, one an item; it returned {len(results)}."
                    )
            except asyncio.CancelledError:  # of this task, by whoever stops the event loop: nobody may wait for ever
                for _, future in [*batch, *self._waiting]:
                    future.cancel()
                raise
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():  # its caller was cancelled meanwhile
                        future.set_result(result)

    async def _let_others_come(self) -> None:
        """Returns once two turns of the event loop brought no further item, or a batch is full."""
        seen = -1
        while seen < len(self._waiting) < self._max_batch:
            seen = len(self._waiting)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        waiting = [call for call in self._waiting if not call[1].done()]
        order = list(range(len(waiting)))
        if self._size and waiting:
            sizes = [self._size(item) for item, _ in waiting]
            order.sort(key=lambda index: abs(sizes[index] - sizes[0]))  # a stable sort: the oldest stays first
        chosen = set(order[: self._max_batch])
        self._waiting = [call for index, call in enumerate(waiting) if index not in chosen]
        return [waiting[index] for index in sorted(chosen)]
