"""An event loop that outlives the loops of its callers.

Evaluation calls `asyncio.run` once a run, and each call makes a new loop; the connections of an HTTP client and vLLM's engine
belong to the loop that they were first used in. They live in this one, in a thread of its own, until the process ends. A forked
process, which inherits no thread, has a loop of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from functools import cache
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


async def in_background(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns or raises, run in the background; it is cancelled where its caller is."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _loop(os.getpid())))


def in_background_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """`in_background` for code that is no coroutine."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop(os.getpid()))
    try:
        return future.result()
    finally:
        future.cancel()  # where the caller was interrupted


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="background", daemon=True).start()
    return loop
