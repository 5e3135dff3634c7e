"""Retries during an outage, on a clock that the tests move."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest

from atommem_env import openai_client
from atommem_env.openai_client import Attempts, Rejected, Service, Unavailable


@dataclass
class Response:
    text: str = "all of the answer"


class StatusError(Exception):
    """As an `openai.APIStatusError` is."""

    def __init__(self, status_code: int, message: str = "no") -> None:
        self.status_code, self.message, self.body, self.response = status_code, message, None, Response()


@dataclass
class Clock:
    now: float = 1000.0
    waited: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(openai_client, "time", clock)
    return clock


def service(**options: Any) -> Service:
    return Service(
        "m", "http://me:secret@host/v1?key=other", "sk-1", **{"patience": 30.0, "pauses": (0.5, 4.0), **options}
    )


def test_pauses_double_up_to_the_longest_until_the_patience_is_over(clock: Clock) -> None:
    shared = service()
    attempts = Attempts(shared)
    for _ in range(9):
        clock.wait(attempts.pause_after(StatusError(503)))
    assert clock.waited == [0.5, 1, 2, 4, 4, 4, 4, 4, 4]
    with pytest.raises(Unavailable, match=r"^answered with status 503: no\. That has lasted for 28 s$"):
        attempts.pause_after(StatusError(503))
    clock.now += 60
    with pytest.raises(Unavailable):
        Attempts(shared).pause_after(StatusError(503))
    shared.answered()
    assert Attempts(shared).pause_after(StatusError(503)) == 0.5


@pytest.mark.parametrize(("timed_from_sending", "expected"), [(False, 30.0), (True, 10.0)])
def test_the_patience_may_cover_the_wait_for_an_answer(clock: Clock, timed_from_sending: bool, expected: float) -> None:
    attempts = Attempts(service(timed_from_sending=timed_from_sending))
    clock.now += 20
    attempts.pause_after(ConnectionError())
    assert attempts.seconds_left() == expected


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_would_be_answered_in_the_same_way_is_not_retried(clock: Clock, status: int) -> None:
    with pytest.raises(Rejected) as caught:
        Attempts(service()).pause_after(StatusError(status, "no sk-1"))
    assert (caught.value.status, caught.value.reason, caught.value.body) == (status, "no …", "all of the answer")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 529])
def test_what_passes_is_retried(clock: Clock, status: int) -> None:
    assert Attempts(service()).pause_after(StatusError(status)) == 0.5


def test_an_outage_is_logged_once_and_so_is_its_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    shared = service()
    shared.answered()
    requests = [Attempts(shared), Attempts(shared)]
    for seconds in (0.0, 0.9, 0.2, 1.0):
        clock.now += seconds
        for attempts in requests:
            attempts.pause_after(StatusError(500, "down"))
    clock.now += 4
    for _ in range(2):
        shared.answered()
    assert [record.getMessage() for record in caplog.records] == [
        "The service of m at http://host/v1 answered with status 500: down. It is asked again for 30 s.",
        "The service of m at http://host/v1 answers again, after 6 s.",
    ]


def test_secrets_are_taken_out_of_what_a_service_says() -> None:
    assert service().safe("key=other of sk-1, me:secret") == "key=… of …, me:…"
    assert Service("m", "http://host/v1", None, patience=1, pauses=(1, 1)).safe("none of it") == "none of it"
    assert len(service().safe("x" * 10_000)) == 500
