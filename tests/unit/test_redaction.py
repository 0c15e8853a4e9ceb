"""What is hidden in texts and values that tell about runs, and what isn't."""

from __future__ import annotations

import pytest
from pydantic import SecretBytes, SecretStr

from paigeant.redaction import Redactor, redacted
from paigeant.secret import MASK

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"refused {TOKEN}!", "refused ***!"),
        ("indented ewogICJhbGciOiJFZERTQSIKfQ.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl", "indented ***"),
        (f"encrypted {TOKEN}.four.five.", "encrypted ***."),
        ("can't reach amqp://ada:pa55word@host/x?y=1", "can't reach amqp://ada:***@host/x?y=1"),
        ("GET https://host/x?access_token=abc&y=1", "GET https://host/x?access_token=***&y=1"),
        ("Authorization: Bearer abcdef012345", "Authorization: Bearer ***"),
        ("login with password='pass word' failed", "login with password=*** failed"),
        ('{"obo_token": "a\\"b", "sku": "A-1"}', '{"obo_token": ***, "sku": "A-1"}'),
        ("X-API-Key: 12345", "X-API-Key: ***"),
        ("no key like sk-proj-0123456789abcdef", "no key like ***"),
        ("-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_what_looks_secret_is_hidden(text: str, shown: str) -> None:
    """Tokens, credentials in URLs and headers, and what stands behind the name of a secret."""
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'password'",
        "used 12 tokens: input_tokens=5",
        "paigeant.observers.logs_of_the_sink.something_long failed",
        "missing argument 'token'; there is: sku, quantity",
        "eyJ is how tokens begin",
        "signed by eyJhbGciOiJFZERTQSJ9..c2lnbmF0dXJl",
        "see https://docs.example.org/a.b.c",
    ],
)
def test_what_only_speaks_of_secrets_stays(text: str) -> None:
    """Names of parameters, counts of tokens, names of modules and plain URLs are no secrets."""
    assert redacted(text) == text


def test_passwords_of_the_settings_are_hidden_anywhere() -> None:
    """A library may repeat a password without the URL that it was in."""
    redactor = Redactor(["postgresql://ada:hunter2hunter2@host/db"])
    assert redactor.text("FATAL: no entry for ada/hunter2hunter2") == "FATAL: no entry for ada/***"


def test_secret_values_are_hidden_by_type_and_by_name() -> None:
    """pydantic's secret types, and fields with the name of a secret, at any depth; others stay as they are."""
    value = {
        "password": "a",
        "inner": [{"obo_token": "b", "tokens": 3}],
        "typed": SecretStr("c"),
        "bytes": SecretBytes(b"d"),
        "fine": 1.5,
    }
    assert Redactor().value("more", value) == {
        "password": MASK,
        "inner": [{"obo_token": MASK, "tokens": 3}],
        "typed": MASK,
        "bytes": MASK,
        "fine": 1.5,
    }


def test_a_value_that_cannot_be_shown_keeps_no_line_from_being_written() -> None:
    """The text of a user's class is the user's code, which may fail."""

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert Redactor().value("x", Broken()) == "<Broken that can't be shown>"
