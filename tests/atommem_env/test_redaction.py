"""Keys and passwords in whatever form a service repeats them."""

from __future__ import annotations

import base64
import html
import json
import logging
from urllib.parse import quote

import pytest

from atommem_env.redaction import Secrets, without_secrets

KEY, PASSWORD, TOKEN = 'sk-Ab"9/x+Y<q>z~77wv', "p@ss:w/ord=ü", "tok en&1234567"
URL = f"https://me:{quote(PASSWORD, safe='')}@host:8000/v1?token={quote(TOKEN, safe='')}&sk-bare-name"
SECRETS = Secrets(URL, KEY)


@pytest.mark.parametrize("secret", [KEY, PASSWORD, TOKEN, "sk-bare-name"])
@pytest.mark.parametrize(
    "spell",
    [
        str,
        str.upper,
        repr,
        json.dumps,
        html.escape,
        quote,
        lambda secret: quote(secret, safe=""),
        lambda secret: quote(secret, safe="").lower(),
        lambda secret: json.dumps(secret).replace("/", "\\/"),
        lambda secret: base64.b64encode(secret.encode()).decode(),
        lambda secret: repr(f"Bearer {secret}\n".encode()),
        lambda secret: secret[:8],
        lambda secret: secret[-7:],
        lambda secret: f"{secret[:6]}…{secret[-3:]}",
        lambda secret: f"({secret[2:-2]})",
    ],
)
def test_no_six_characters_of_a_secret_are_shown_however_they_are_spelled(secret: str, spell: object) -> None:
    assert callable(spell)
    shown = SECRETS.hide(f"said: {spell(secret)}, and no more").casefold()
    assert shown.startswith("said: ")
    assert shown.endswith("and no more")
    assert not [i for i in range(len(secret) - 5) if secret[i : i + 6].casefold() in shown]
    assert "…" in shown


@pytest.mark.parametrize(
    "masked", ["sk-A****************wv", "sk…wv", "sk-A...wv", "****77wv", "sk-A********", "sXXXXXXwv"]
)
def test_a_key_that_is_masked_in_part_is_hidden_in_whole(masked: str) -> None:
    assert SECRETS.hide(f"Incorrect API key provided: {masked}. You can find it …") == (
        "Incorrect API key provided: …. You can find it …"
    )


def test_what_is_no_secret_stays() -> None:
    text = "This model's maximum context length is 8192 tokens … see https://host/docs, x*y, and so on..."
    assert SECRETS.hide(text) == text
    assert Secrets("http://host/v1", None, "").hide(text) == text


def test_a_name_without_a_password_is_a_key_and_basic_credentials_are_hidden() -> None:
    assert Secrets("https://sk-abcdef@host/v1").hide("no sk-abcdef") == "no …"
    assert Secrets("https://me:open-sesame@host").hide("Basic bWU6b3Blbi1zZXNhbWU=") == "Basic …"


def test_records_of_loggers_lose_their_secrets(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test_redaction")
    logger.addFilter(SECRETS)
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("HTTP Request: %s %s", "POST", URL)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("HTTP Request: POST https://me:…@host:8000/v1?token=…&…")
    assert repr(SECRETS) == "Secrets(…)"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "https://host:8000/v1"),
        ("https://me:p@ss@host/v1", "https://host/v1"),
        ("https://me:pa/ss@host/v1#secret", "https://host/v1"),
        ("http://host", "http://host"),
        ("host:8000?key=x", "host:8000"),
    ],
)
def test_an_address_is_shown_without_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
