"""A client of a service that speaks the OpenAI API: bounded answers, retries during an outage, messages without secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import reprlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from atommem_env.errors import MissingDependency, SettingError
from atommem_env.redaction import Secrets, without_secrets
from atommem_env.service_words import (
    codes_in,
    is_out_of_quota,
    is_overloaded,
    is_refused,
    is_too_long,
    named_in,
    names_model,
    reason_in,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LOGGERS = "httpx", "openai._base_client", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy"
_PASSING = 408, 409, 425, 429  # statuses below 500 that pass
_LASTING = 501, 505  # statuses from 500 that do not
_UNREPORTED = 1.0  # seconds of an outage that are not logged: a service that limits the rate has many such
_SHOWN = 300  # characters of what a service says
_NO_KEY = "none"
_CONNECT = 10.0  # seconds for a connection
_LAST_TRY = 5.0  # least seconds for an answer, where the patience covers the wait for it
_UNREACHED = 3.0  # seconds of the patience with a service that has never answered: its address may be wrong
_CODE_STATUS = (  # for an error in an answer with status 200
    (("context_length", "content_filter", "invalid_request", "bad_request", "badrequest", "invalid_argument"), 400),
    (("auth", "permission", "api_key"), 401),
    (("not_found", "notfound"), 404),
)


class Rejected(Exception):
    """The service cannot do what a request asks for.

    Attributes:
        status: of HTTP; 200 where the answer itself is the rejection.
        reason: the service's own words, safe to show.
        said: these words in full, and its codes; without secrets.
    """

    def __init__(self, status: int, reason: str, said: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.said = status, reason, said

    @property
    def is_of_form(self) -> bool:
        """Whether the request may be accepted in another form."""
        return self.status in (400, 415, 422)

    def clause(self, what: str) -> str:
        """What the service did, as a clause about it; `what` it was asked for."""
        if self.status < 300:
            return f"answered {what}, but {self.reason}"
        return f"rejected {what} with status {self.status}: {self.reason}"

    def names(self, fields: Iterable[str]) -> frozenset[str]:
        """Those of a request's fields that it names."""
        return frozenset(named_in(self.said, fields))


class Unavailable(Exception):
    """An outage outlasts the patience; the message is a clause about the service, safe to show."""


class Malformed(Exception):
    """An answer is not what was asked for; the message is a clause about the service, made safe by `Service.ask`."""


class Outage(Exception):
    """One attempt failed, and another may succeed; the message is a clause about the service, safe to show."""


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
    """A service, and what is known of it; shared by all requests of a client.

    An outage is logged once when it begins and once when it ends. A service that has never answered is given up early.

    Args:
        name: of what the service serves, for the log.
        url: its address. A password or a key in it is never shown.
        key: its API key, never shown; empty where it needs none.
        setting: the environment variable that the address is from.
        patience: seconds of an outage in which requests are sent again; after that each is sent once, until one is answered.
        pauses: seconds after a request's first failure, doubled with each further one, and the longest.
        timeout: seconds for a whole answer.
        tries: times in all that a request is sent whose answers are malformed.
        timed_from_sending: whether an outage begins when a request without an answer was sent, rather than when it failed.

    Attributes:
        address: the URL without secrets.
        reached: whether it has answered at all, be it by an error.
        notices: how often each thing happened that is logged only the first time, see `note`.

    Raises:
        SettingError: `url` is no address of HTTP, or the key cannot be sent in a header.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str | None,
        *,
        setting: str = "OPENAI_BASE_URL",
        patience: float,
        pauses: tuple[float, float],
        timeout: float = 600.0,
        tries: int = 1,
        timed_from_sending: bool = False,
    ) -> None:
        url, key = url.strip(), (key or "").strip()
        _check_address(setting, url)
        if not (key.isascii() and key.isprintable()):
            raise SettingError("OPENAI_API_KEY has a character that no HTTP header can hold. Copy the key again.")
        self._secrets = Secrets(url, key)
        self.address, self.setting = self._secrets.hide(without_secrets(url)), setting
        self.patience, self.pauses, self.timed_from_sending = patience, pauses, timed_from_sending
        self.timeout, self.tries = timeout, tries
        self.reached = False
        self.notices: Counter[str] = Counter()
        self._name = name
        self._connect: Callable[[], Any] = lambda: _connect(url, key or _NO_KEY)
        self._connection: tuple[int, Any] | None = None  # the process that it belongs to, and the package's client
        self._down_since: float | None = None  # when the outage began, if there is one
        self._logged = False  # that outage
        for logger in _LOGGERS:  # they log the address of each request
            logging.getLogger(logger).addFilter(self._secrets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, {self.address!r})"

    async def ask(self, path: str, body: Mapping[str, Any], accept: Callable[[Any], T]) -> T:
        """What `accept` makes of the service's answer to a POST, which is sent again during an outage.

        Args:
            path: below the address.
            body: of the request.
            accept: reads the answer, parsed JSON; raises `Malformed` or `Rejected` where it is not what was asked for.

        Raises:
            Rejected: the service does not accept the request.
            Unavailable: the outage outlasts the patience.
            Malformed: the last of `tries` answers was.
        """
        attempts, malformed = Attempts(self), 0
        while True:
            try:
                result = accept(await self._post(path, body, attempts.timeout()))
            except Outage as outage:
                pause = attempts.pause(outage)
            except Malformed as error:
                malformed, why = malformed + 1, self.safe(str(error))
                if malformed == self.tries:
                    raise type(error)(why) from None
                pause = attempts.pause(Outage(why))
            else:
                self.answered()
                return result
            await asyncio.sleep(pause)

    def safe(self, text: str) -> str:
        """What a service says, without the secrets, which some repeat, and not more than can be read."""
        return self._secrets.hide(text[: 20 * _SHOWN])[:_SHOWN]

    def note(self, kind: str, message: str) -> None:
        """Logs something once, and counts how often it happens."""
        self.notices[kind] += 1
        if self.notices[kind] == 1:
            _log.warning("The service of %s at %s %s", self._name, self.address, message)

    def down_since(self, now: float) -> float:
        """When the outage began; it begins `now` if there was none."""
        self._down_since = self._down_since or now
        return self._down_since

    def log_outage(self, why: str, now: float) -> None:
        """Logs an outage, once it has lasted for a moment and was not logged before."""
        if not self._logged and self._down_since is not None and now >= self._down_since + _UNREPORTED:
            self._logged = True
            who = self._name, self.address
            _log.warning("The service of %s at %s %s. It is asked again for %g s.", *who, why, self.patience)

    def answered(self) -> None:
        """Ends the outage, if there is one: the service has answered, be it by a rejection."""
        began, logged = self._down_since, self._logged
        self._down_since, self._logged, self.reached = None, False, True
        if logged and began is not None:
            lasted = time.monotonic() - began
            _log.warning("The service of %s at %s answers again, after %.0f s.", self._name, self.address, lasted)

    def failure(self, status: int, body: str, redirect: str = "") -> Rejected | Outage:
        """What an error of the service means, by its status and its words.

        Args:
            body: of the answer.
            redirect: address that it redirects to.
        """
        words, codes = reason_in(body), codes_in(body)
        said = self._secrets.hide(f"{words} {codes}"[: _SHOWN * 40])
        reason = self.safe(words) or f"no reason ({len(body)} bytes)"
        asks_for_another_prompt = is_too_long(said) or (status < 500 and is_refused(said))
        passes = status >= 500 or status in _PASSING or (status >= 400 and is_overloaded(said))
        if not (asks_for_another_prompt or is_out_of_quota(said)) and passes and status not in _LASTING:
            return Outage(f"answered with status {status}: {reason}")
        self.answered()
        return Rejected(status, reason + self._hint(status, said, redirect), said)

    def _hint(self, status: int, said: str, redirect: str) -> str:
        if 300 <= status < 400:
            target = self.safe(without_secrets(redirect))
            return f" It redirects to {target}, where neither key nor prompt is sent: set {self.setting} to the right address."
        if status in (404, 405, 501) and not names_model(said) and "/v1" not in self.address:
            return f" Is a /v1 missing at the end of {self.setting}?"
        if status in (401, 403):
            return " Is OPENAI_API_KEY its key?"
        return ""

    async def _post(self, path: str, body: Mapping[str, Any], timeout: float) -> Any:
        """One answer, parsed; raises `Rejected`, `Outage` or `Malformed`."""
        import httpx
        import openai

        from atommem_env.bounded_http import OversizedBody, UnreadableBody

        limits = httpx.Timeout(timeout, connect=min(timeout, _CONNECT))
        try:
            answer = await self._client().post(path, cast_to=httpx.Response, body=body, options={"timeout": limits})
        except openai.APIStatusError as error:
            response = error.response
            self.reached = True
            redirect = response.headers.get("location", "")
            raise self.failure(response.status_code, response.text, redirect) from None
        except openai.APIConnectionError as error:  # no connection, or no complete answer
            cause = error.__cause__  # the package says no more than "Connection error."
            why = self.safe(_describe_error(cause or error))
            if isinstance(cause, OversizedBody | UnreadableBody):
                self.answered()
                raise Rejected(200, f"its answer is {why}", "") from None
            raise Outage(f"does not answer: {why}") from None
        self.reached = True
        return self._parsed(answer.content, answer.headers.get("content-type", "no content type"))

    def _parsed(self, content: bytes, content_type: str) -> Any:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            text = content[: 20 * _SHOWN].decode("utf-8", "replace")
            seen = f"{content_type[:60]}: {self.safe(text)!r}"
            if "html" in content_type or text.lstrip().startswith("<"):  # of a gateway before the service
                raise Outage(self.safe(f"sent a page rather than JSON, {seen}")) from None
            nested = " (nested too deeply)" if isinstance(error, RecursionError) else ""
            raise Malformed(f"sent no JSON{nested}, {seen}") from None
        if isinstance(answer, Mapping) and answer.get("error") and not (answer.get("choices") or answer.get("data")):
            raise self.failure(_status_of(answer), content.decode("utf-8", "replace"))
        return answer

    def _client(self) -> Any:
        """The package's client; connections belong to one process and its loop, so a forked process has its own."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = os.getpid(), self._connect()
        return self._connection[1]


class Attempts:
    """The attempts at one request: how long to wait for an answer, and between them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pause, self._longest = service.pauses
        self._since: float | None = None  # what the patience is counted from, unless the outage is older
        if service.timed_from_sending:
            self._since = time.monotonic()
            service.down_since(self._since)

    def timeout(self) -> float:
        """Seconds for a whole answer: no more than is left of the patience, where that covers the wait for it."""
        if not self._service.timed_from_sending:
            return self._service.timeout
        now = time.monotonic()
        left = min(self._since or now, self._service.down_since(now)) + self._service.patience - now
        return min(self._service.timeout, max(left, _LAST_TRY))

    def pause(self, outage: Outage) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            Unavailable: the patience is over.
        """
        now, service = time.monotonic(), self._service
        self._since = self._since or now
        down_since = service.down_since(now)
        service.log_outage(str(outage), now)
        patience = service.patience if service.reached else min(service.patience, _UNREACHED)
        if now + self._pause > min(self._since, down_since) + patience:
            what = f"{outage}. That has lasted for {now - down_since:.0f} s"
            if not service.reached:
                what += f", and it has never answered: check that it runs, and host and port in {service.setting}"
            raise Unavailable(what)
        pause, self._pause = self._pause, min(2 * self._pause, self._longest)
        return pause


def describe_answer(answer: object) -> str:
    """What an answer is, for a message: its kind, its fields, its beginning.

    >>> describe_answer({"object": "list", "data": []}), describe_answer([1])
    ("an object with the fields object, data: {'data': [], 'object': 'list'}", 'a list: [1]')
    """
    kind = "a list" if isinstance(answer, list) else "a value"
    if isinstance(answer, dict):
        kind = "an object"
        kind += (
            f" with the fields {', '.join(str(name)[:30] for name in list(answer)[:10])}"
            if answer
            else " without fields"
        )
    return f"{kind}: {_REPR.repr(answer)}"[:_SHOWN]


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring = 5, 10, 4, 200


def sentence(clause: str) -> str:
    """A clause with a full stop, unless it ends a sentence already.

    >>> sentence("It says no"), sentence("Is a /v1 missing?")
    ('It says no.', 'Is a /v1 missing?')
    """
    return clause if clause.endswith((".", "?", "!", "…")) else f"{clause}."


def _describe_error(error: BaseException) -> str:
    """An error of a connection, with what it came from: the outermost often names no more than its kind."""
    root = error
    while True:
        inner = root.exceptions[0] if isinstance(root, BaseExceptionGroup) else root.__cause__ or root.__context__
        if inner is None:
            break
        root = inner
    words = [str(error) or type(error).__name__, *([str(root)] if isinstance(root, OSError) else [])]
    return " — ".join(dict.fromkeys(words))


def _connect(url: str, key: str) -> Any:
    import openai

    from atommem_env.bounded_http import BoundedClient

    base, _, query = url.partition("?")
    return openai.AsyncOpenAI(
        base_url=base,
        api_key=key,
        max_retries=0,  # the package's own add chance to the pauses, and end early
        default_query=dict(parse_qsl(query.partition("#")[0], keep_blank_values=True)),
        http_client=BoundedClient(),
    )


def _check_address(setting: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        sound = False
    if not sound:
        raise SettingError(
            f"{setting} must be an address such as http://localhost:8000/v1, got {without_secrets(url)[:_SHOWN]!r}."
        )


def _status_of(answer: Mapping[str, Any]) -> int:
    """The status of an error that came with status 200; 500 where nothing says whose fault it is."""
    error = answer["error"]
    for part in (error, answer):
        for name in ("code", "status", "status_code") if isinstance(part, Mapping) else ():
            value = part.get(name)
            if isinstance(value, int | str) and str(value).isdecimal() and 400 <= int(str(value)[:4]) < 600:
                return int(value)
    codes = codes_in(json.dumps(error)).lower()
    return next((status for words, status in _CODE_STATUS if any(word in codes for word in words)), 500)
