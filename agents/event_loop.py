"""Runs a coroutine to its end from code that is no coroutine, and ends at once on an interrupt."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_GRACE = 1.0  # seconds that an interrupted coroutine has to clean up


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop is running already, as it is in a notebook.

    Raises:
        KeyboardInterrupt: within seconds of it, whatever the coroutine waits for; what does not stop is left behind.
        Exception: what the coroutine raised.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(coroutine)
    return _run_beside(coroutine)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    runner = asyncio.Runner()
    try:
        with _raising_interrupts():
            result = runner.run(coroutine)
    except KeyboardInterrupt:
        _stop(runner.get_loop())
        raise
    except BaseException:
        runner.close()
        raise
    runner.close()
    return result


def _run_beside(coroutine: Coroutine[Any, Any, T]) -> T:
    """In a thread with its own event loop."""
    started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]]
    started, ended = concurrent.futures.Future(), concurrent.futures.Future[T]()

    async def announced() -> T:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def run() -> None:
        try:
            ended.set_result(asyncio.run(announced()))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, name="run", daemon=True).start()
    try:
        return ended.result()
    except KeyboardInterrupt:
        loop, task = started.result()
        if task is not None:
            loop.call_soon_threadsafe(task.cancel)
        concurrent.futures.wait([ended], _GRACE)
        raise


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels what is left in an event loop and closes it, waiting for neither a thread nor a task that ignores it."""
    loop.set_exception_handler(lambda loop, context: None)  # what is left behind is no news
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=_GRACE))
    loop.close()


@contextmanager
def _raising_interrupts() -> Iterator[None]:
    """An interrupt is raised where the program is. `asyncio` makes the first one the cancellation of its main task instead, which
    a policy that blocks would not notice."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: signal.default_int_handler(number, frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
