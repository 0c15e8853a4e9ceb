"""What is secret in a URL is shown nowhere."""

from __future__ import annotations

import pytest

from paigeant.urls import scrubbed, without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///paigeant.db", "sqlite:///paigeant.db"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:pa55word@host", "redis://:***@host"),
        ("amqp://ann@host", "amqp://ann@host"),
        ("amqp://ann:p%40ss:w/rd@host/v", "amqp://ann:***@host/v"),
        ("amqps://ann:p@ss@host/v", "amqps://ann:***@host/v"),
        (
            "postgresql://a/b?user=x&password=pa55&sslmode=require",
            "postgresql://a/b?user=x&password=***&sslmode=require",
        ),
        ("redis://h?auth_token=t&x=1#f", "redis://h?auth_token=***&x=1#f"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """User, host and everything else stay, so that a person can tell which server is meant."""
    assert without_password(url) == shown


@pytest.mark.parametrize(
    "text",
    [
        "can't reach amqp://ann:p%40ss-word@host/: refused",
        "('amqp://ann:p@ss-word@host/',) is wrong",
        "login p@ss-word failed for ann, host",
        "no server at redis://host?password=p%40ss-word, host",
        "dsn: p%40ss-word, host",
    ],
)
def test_a_text_is_shown_without_passwords(text: str) -> None:
    """Neither as it stands in the URL nor as it is meant, wherever a library's error has it."""
    shown = scrubbed(text, ["amqp://ann:p%40ss-word@host/"])
    assert "ss-word" not in shown
    assert "***" in shown
    assert "host" in shown


def test_a_text_without_secrets_stays() -> None:
    """A short password is no reason to hide letters of words, and a user without a password is no secret."""
    text = "can't reach amqp://ann@host: a queue is full; mail bob@example.org at 10:30"
    assert scrubbed(text, ["redis://:a@host", "amqp://ann@host"]) == text
    said = "the broker refuses the user 'guest'"
    assert scrubbed(said, ["amqp://guest:guest@host"]) == said
