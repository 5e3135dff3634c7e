"""Retries during an outage, on a clock that the tests move."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest

from atommem_env import openai_client
from atommem_env.errors import SettingError
from atommem_env.openai_client import Attempts, Outage, Rejected, Service, Unavailable


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
    made = Service(
        "m", "http://me:secret@host/v1?key=other", "sk-1", **{"patience": 30.0, "pauses": (0.5, 4.0), **options}
    )
    made.reached = True
    return made


DOWN = Outage("is down")


def test_pauses_double_up_to_the_longest_until_the_patience_is_over(clock: Clock) -> None:
    shared = service()
    attempts = Attempts(shared)
    for _ in range(9):
        clock.wait(attempts.pause(DOWN))
    assert clock.waited == [0.5, 1, 2, 4, 4, 4, 4, 4, 4]
    with pytest.raises(Unavailable, match=r"^is down\. That has lasted for 28 s$"):
        attempts.pause(DOWN)
    clock.now += 60
    with pytest.raises(Unavailable):
        Attempts(shared).pause(DOWN)
    shared.answered()
    assert Attempts(shared).pause(DOWN) == 0.5


def test_a_service_that_has_never_answered_is_given_up_early(clock: Clock) -> None:
    shared = service(patience=300.0)
    shared.reached = False
    attempts = Attempts(shared)
    for _ in range(2):
        clock.wait(attempts.pause(DOWN))
    clock.wait(1.0)
    with pytest.raises(Unavailable, match="never answered: check that it runs, and host and port in OPENAI_BASE_URL"):
        attempts.pause(DOWN)


@pytest.mark.parametrize(("timed_from_sending", "expected"), [(False, 600.0), (True, 10.0)])
def test_the_patience_may_cover_the_wait_for_an_answer(clock: Clock, timed_from_sending: bool, expected: float) -> None:
    attempts = Attempts(service(timed_from_sending=timed_from_sending))
    clock.now += 20
    attempts.pause(DOWN)
    assert attempts.timeout() == expected


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((status, "no sk-1") for status in (307, 400, 401, 404, 422, 501)),
        (429, '{"error": {"message": "no sk-1", "code": "insufficient_quota"}}'),
        (500, '{"error": {"message": "no sk-1", "type": "exceed_context_size_error"}}'),
    ],
)
def test_what_would_be_answered_in_the_same_way_is_a_rejection(status: int, body: str) -> None:
    failure = service().failure(status, body)
    assert isinstance(failure, Rejected)
    assert failure.status == status
    assert failure.reason.startswith("no …")
    assert "sk-1" not in failure.reason + failure.said


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *((status, "no") for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
        (400, '{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'),
        (503, "<html>a page about a guardrail</html>"),
    ],
)
def test_what_passes_is_an_outage(status: int, body: str) -> None:
    assert isinstance(service().failure(status, body), Outage)


@pytest.mark.parametrize(
    ("url", "status", "body", "hint"),
    [
        ("http://host:8000", 404, '{"detail": "Not Found"}', "Is a /v1 missing"),
        ("http://host:8000", 405, "", "Is a /v1 missing"),
        ("http://host:8000", 404, "model 'm' not found", ""),
        ("http://host:8000/v1", 404, '{"detail": "Not Found"}', ""),
        ("http://host:8000/v1", 401, "no", "Is OPENAI_API_KEY its key?"),
    ],
)
def test_a_rejection_says_what_to_check(url: str, status: int, body: str, hint: str) -> None:
    failure = Service("m", url, None, patience=1, pauses=(1, 1)).failure(status, body)
    assert isinstance(failure, Rejected)
    assert hint in failure.reason
    assert ("?" in failure.reason) == bool(hint)


def test_a_redirect_is_not_followed_and_its_target_shown_without_secrets() -> None:
    failure = service().failure(307, "", "https://me:secret@elsewhere/v1/chat?key=other")
    assert isinstance(failure, Rejected)
    assert "It redirects to https://elsewhere/v1/chat, where neither key nor prompt is sent" in failure.reason


def test_an_outage_is_logged_once_and_so_is_its_end(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    shared = service()
    shared.answered()
    requests = [Attempts(shared), Attempts(shared)]
    for seconds in (0.0, 0.9, 0.2, 1.0):
        clock.now += seconds
        for attempts in requests:
            attempts.pause(DOWN)
    clock.now += 4
    for _ in range(2):
        shared.answered()
    assert [record.getMessage() for record in caplog.records] == [
        "The service of m at http://host/v1 is down. It is asked again for 30 s.",
        "The service of m at http://host/v1 answers again, after 6 s.",
    ]


def test_something_is_noted_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    shared = service()
    for _ in range(3):
        shared.note("kind", "does something odd.")
    assert [record.getMessage() for record in caplog.records] == [
        "The service of m at http://host/v1 does something odd."
    ]
    assert shared.notices == {"kind": 3}


def test_secrets_are_taken_out_of_what_a_service_says() -> None:
    assert service().safe("key=other of sk-1, me:secret") == "key=… of …, me:…"
    assert Service("m", "http://host/v1", None, patience=1, pauses=(1, 1)).safe("none of it") == "none of it"
    assert len(service().safe("x " * 10_000)) == 300
    shown = repr(service()) + repr(vars(service()))
    assert not [secret for secret in (":secret", "sk-1", "other") if secret in shown]


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "me:secret@host/v1", "ftp://me:secret@host", "http://host:port/v1", ""]
)
def test_an_address_that_is_none_is_rejected_without_its_secrets(url: str) -> None:
    with pytest.raises(
        SettingError, match="OPENAI_BASE_URL must be an address such as http://localhost:8000/v1"
    ) as caught:
        Service("m", url, "sk-1", patience=1, pauses=(1, 1))
    assert "secret" not in str(caught.value)


def test_a_key_that_no_header_holds_is_rejected_without_showing_it() -> None:
    with pytest.raises(SettingError, match="OPENAI_API_KEY has a character") as caught:
        Service("m", "http://host/v1", "sk-ä", patience=1, pauses=(1, 1))
    assert "sk-" not in str(caught.value)
    Service("m", "http://host/v1", "sk-1\n", patience=1, pauses=(1, 1))
