"""What clients of OpenAI-compatible services share: retries during an outage, and messages without secrets."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from atommem_env.errors import MissingDependency

_log = logging.getLogger(__name__)
_RETRYABLE = 408, 425, 429  # statuses below 500 that pass
_UNREPORTED = 1.0  # seconds of an outage that are not logged: a service that limits the rate has many such
_SHOWN = 500  # characters of what a service says
_NO_KEY = "none"


class Rejected(Exception):
    """The service cannot do what a request asks for.

    Attributes:
        status: of HTTP.
        reason: the service's own words, safe to show.
        body: all of its answer; may hold secrets.
    """

    def __init__(self, status: int, reason: str, body: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.body = status, reason, body


class Unavailable(Exception):
    """An outage outlasts the patience; the message is a clause about the service, safe to show."""


def import_openai(part: str) -> Any:
    """The package `openai`, which `part` needs.

    Raises:
        MissingDependency: the extra `openai` is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise MissingDependency(f"{part} cannot be loaded ({error}): pip install 'atommem[openai]'.") from error
    return openai


class Service:
    """What is known of a service, shared by all requests of a client; safe to use from several threads.

    An outage is logged once when it begins and once when it ends.

    Args:
        name: of what the service serves, for the log.
        url: its address. A password or a key in it is never shown.
        key: its API key, never shown; empty where it needs none.
        patience: seconds of an outage in which requests are sent again; after that each is sent once, until one is answered.
        pauses: seconds after a request's first failure, doubled with each further one, and the longest.
        timed_from_sending: whether an outage begins when a request without an answer was sent, rather than when it failed.

    Attributes:
        address: the URL without secrets.
        key: what to give to a client of the package `openai`, which insists on one.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None,
        *,
        patience: float,
        pauses: tuple[float, float],
        timed_from_sending: bool = False,
    ) -> None:
        self.address, self.key = without_secrets(url), key or _NO_KEY
        self.patience, self.pauses, self.timed_from_sending = patience, pauses, timed_from_sending
        self._name = name
        parts = urlsplit(url)
        secrets = [key, parts.password, *(value for _, value in parse_qsl(parts.query))]
        self._secrets = sorted({text for text in secrets if text}, key=len, reverse=True)  # one may hold another
        self._lock = threading.Lock()
        self._down_since: float | None = None  # when the outage began, if there is one
        self._logged = False  # that outage

    def safe(self, text: str) -> str:
        """What a service says, without the secrets, which some repeat, and not more than can be read."""
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text[:_SHOWN]

    def down_since(self, now: float) -> float:
        """When the outage began; it begins `now` if there was none."""
        with self._lock:
            self._down_since = self._down_since or now
            return self._down_since

    def log_outage(self, why: str, now: float) -> None:
        """Logs an outage, once it has lasted for a moment and was not logged before."""
        with self._lock:
            if self._logged or self._down_since is None or now < self._down_since + _UNREPORTED:
                return
            self._logged = True
        who = self._name, self.address
        _log.warning("The service of %s at %s %s. It is asked again for %g s.", *who, why, self.patience)

    def answered(self) -> None:
        """Ends the outage, if there is one: the service has answered, be it by a rejection."""
        with self._lock:
            began, logged = self._down_since, self._logged
            self._down_since, self._logged = None, False
        if logged and began is not None:
            lasted = time.monotonic() - began
            _log.warning("The service of %s at %s answers again, after %.0f s.", self._name, self.address, lasted)


class Attempts:
    """The attempts at one request; what to do between them, for clients with and without an event loop.

    attempts = Attempts(service)
    while True:
        try:
            answer = client.embeddings.create(…)
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            time.sleep(attempts.pause_after(error))
        else:
            service.answered()
            return answer
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pause, self._longest = service.pauses
        self._since: float | None = None  # what the patience is counted from, unless the outage is older
        if service.timed_from_sending:
            self._since = time.monotonic()
            service.down_since(self._since)

    def seconds_left(self) -> float:
        """How much of the patience is left; negative where it is over."""
        now = time.monotonic()
        return min(self._since or now, self._service.down_since(now)) + self._service.patience - now

    def pause_after(self, error: Any) -> float:
        """Seconds to wait before the next attempt, after an `APIStatusError` or an `APIConnectionError` of the package.

        Raises:
            Rejected: another attempt would be answered in the same way.
            Unavailable: the patience is over.
        """
        status: int | None = getattr(error, "status_code", None)
        if status is None:  # no connection, or no answer in time
            # The package says no more than "Connection error."
            return self.pause(self._service.safe(f"does not answer: {error.__cause__ or error!r}"))
        said = error.body.get("message") if isinstance(error.body, Mapping) else None
        reason = self._service.safe(str(said or error.message))
        if status < 500 and status not in _RETRYABLE:
            self._service.answered()
            raise Rejected(status, reason, error.response.text)
        return self.pause(f"answered with status {status}: {reason}")

    def pause(self, why: str) -> float:
        """`pause_after` for a failure that is no error of the package; `why` is a clause about the service, safe to show."""
        now = time.monotonic()
        self._since = self._since or now
        down_since = self._service.down_since(now)
        self._service.log_outage(why, now)
        if now + self._pause > min(self._since, down_since) + self._service.patience:
            raise Unavailable(f"{why}. That has lasted for {now - down_since:.0f} s")
        pause, self._pause = self._pause, min(2 * self._pause, self._longest)
        return pause


def without_secrets(url: str) -> str:
    """An address without the password, or the key, that it may hold.

    >>> without_secrets("https://me:secret@host:8000/v1?key=secret")
    'https://host:8000/v1'
    """
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
