"""An event loop that outlives the loops of its callers.

Evaluation calls `asyncio.run` once a run, and each call makes a new loop; the connections of an HTTP client and vLLM's engine
belong to the loop that they were first used in. They live in this one, in a thread of its own, until the process ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import cache
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


async def in_background(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns or raises, run in the background; it is cancelled where its caller is."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _loop()))


def in_background_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """`in_background` for code that is no coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="models", daemon=True).start()
    return loop
