"""Coroutines from code that is none."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from agents.event_loop import run_blocking
from agents.policy import reply_to


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def fail() -> int:
    raise ValueError("no")


def test_the_result_or_the_error_comes_back_with_and_without_a_running_loop() -> None:
    async def cell() -> int:
        with pytest.raises(ValueError, match="no"):
            run_blocking(fail())
        return run_blocking(double(3))

    assert run_blocking(double(2)) == 4
    assert asyncio.run(cell()) == 6
    with pytest.raises(ValueError, match="no"):
        run_blocking(fail())


async def block() -> None:
    time.sleep(60)


async def wait() -> None:
    await asyncio.sleep(60)


async def block_in_a_thread() -> None:
    await reply_to(lambda observation: str(time.sleep(5)), {}, timeout=60.0)  # type: ignore[typeddict-item]


async def beside() -> None:
    run_blocking(wait())


@pytest.mark.parametrize("coroutine", [block, block_in_a_thread, wait, beside])
def test_an_interrupt_is_raised_at_once(coroutine: object) -> None:
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_blocking(coroutine())  # type: ignore[operator]
    assert time.monotonic() - begun < 3
    assert signal.getsignal(signal.SIGINT) is before
    timer.join()


def test_what_an_interrupted_coroutine_left_waiting_is_cancelled() -> None:
    ended: list[str] = []

    async def waiting() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waiting")

    async def interrupted() -> None:
        other = asyncio.ensure_future(waiting())
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)
        await other

    with pytest.raises(KeyboardInterrupt):
        run_blocking(interrupted())
    assert ended == ["waiting"]
