"""A token that nothing shows by accident, and texts without tokens."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import pickle
import time
import traceback
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic_core import PydanticSerializationError, to_json

from paigeant import SecretToken, codec
from paigeant.errors import OutputInvalid
from paigeant.secret import masked, masked_body, refuse_tokens
from paigeant.store import DeadLetter

TEXT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"
TOKEN = SecretToken(TEXT)


@dataclass
class Holder:
    """Something that has a token."""

    token: SecretToken


@pytest.mark.parametrize(
    "shown",
    [
        repr,
        str,
        "{}".format,
        "{:>20}".format,
        "{!r}".format,
        lambda token: f"{token}",
        lambda token: "%s %r" % (token, token),  # noqa: UP031
        lambda token: repr([token, {"a": token}]),
        lambda token: repr(Holder(token)),
        lambda token: repr(dataclasses.asdict(Holder(token))),
        lambda token: json.dumps({"token": token}, default=str),
        lambda token: to_json(token, fallback=str).decode(),
        lambda token: repr(copy.deepcopy({"a": token})),
        lambda token: repr({name: getattr(token, name) for name in dir(token) if name != "reveal"}),
    ],
)
def test_nothing_shows_it(shown: Callable[[Any], str]) -> None:
    """However it is printed, alone or within something."""
    assert "eyJ" not in shown(TOKEN)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (pickle.dumps, TypeError),
        (json.dumps, TypeError),
        (to_json, PydanticSerializationError),
        (codec.dump, codec.JsonInvalid),
    ],
)
def test_nothing_writes_it(write: Callable[[Any], Any], error: type[Exception]) -> None:
    """What would keep it fails, and the error doesn't tell it either."""
    with pytest.raises(error) as caught:
        write({"token": TOKEN})
    assert "eyJ" not in str(caught.value)


def test_a_traceback_with_the_values_of_variables_hides_it() -> None:
    """Whoever prints local variables along with an error prints stars."""

    def use(token: SecretToken) -> None:
        raise ValueError(f"no use for {token}")

    with pytest.raises(ValueError, match="no use") as caught:
        use(TOKEN)
    found = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = "".join(found.format())
    assert "***" in shown
    assert "eyJ" not in shown


def test_a_copy_is_the_same() -> None:
    """There is one of it, however it is passed on; equal are those with one text."""
    assert copy.copy(TOKEN) is TOKEN
    assert copy.deepcopy(Holder(TOKEN)).token is TOKEN
    assert SecretToken(TEXT) == TOKEN
    assert len({TOKEN, SecretToken(TEXT), SecretToken("other")}) == 2
    assert TOKEN != TEXT
    assert TOKEN.reveal() == TEXT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"at-{TEXT}: no", "at-***: no"),
        (f"Bearer {TEXT} was refused", "Bearer *** was refused"),
        (f"a={TEXT}&b={TEXT}", "a=***&b=***"),
        ("opaque-1234 is no token", "*** is no token"),
        ("nothing of that kind: eyJ", "nothing of that kind: eyJ"),
    ],
)
def test_texts_are_masked(text: str, expected: str) -> None:
    """Known tokens, and whatever looks like a signed one, are stars."""
    assert masked(text, [SecretToken("opaque-1234")]) == expected


FORMS: list[Callable[[str], str]] = [
    str,
    json.dumps,
    lambda text: urllib.parse.quote(text, safe=""),
    lambda text: base64.b64encode(text.encode()).decode(),
    lambda text: base64.b64encode(f"Basic {text}: yes".encode()).decode(),
    lambda text: base64.b64encode(f"a{text}".encode()).decode(),
    lambda text: codec.dump({"a": f"at {text}".encode()}).decode(),
]


@pytest.mark.parametrize("text", [TEXT, 'odd"one\\of~~+many/kinds?>='], ids=["signed", "opaque"])
@pytest.mark.parametrize("form", FORMS)
def test_a_token_is_known_in_each_form(form: Callable[[str], str], text: str) -> None:
    """As JSON, a URL or base64 has it, at any place: what is refused is masked as well, so that errors can be kept."""
    written = f"it said {form(text)}, and no more"
    with pytest.raises(OutputInvalid, match="what is kept holds a token"):
        refuse_tokens("what is kept", written.encode(), [SecretToken(text)])
    shown = masked(written, [SecretToken(text)])
    assert "***" in shown
    refuse_tokens("what is shown", shown.encode(), [SecretToken(text)])


@pytest.mark.parametrize("text", ["", "a", "ab1"])
def test_a_short_token_is_in_few_texts(text: str) -> None:
    """No text is refused for a token of nothing, and none for what a short one's base64 has in common with others."""
    refuse_tokens("what is kept", b"YWE YTE= TEXT", [SecretToken(text)])
    assert masked("YWE YTE= TEXT", [SecretToken(text)]) == "YWE YTE= TEXT"


@pytest.mark.parametrize(
    "body",
    [
        b'{"headers": {"obo_token":"opaque\\"1234", "a": "b"}}',
        b'{"headers": {"obo_token" : "' + TEXT.encode() + b'"}}',
        b'{"headers": {"obo_token":"opaque\\"1234',
        b"\xff obo " + TEXT.encode() + b"\n{}",
    ],
)
def test_a_dead_letter_has_no_token(body: bytes) -> None:
    """Of a rejected body all is kept but the token in it, whether it can be read or not."""
    kept = DeadLetter.about("m", "topic", "not_json", "", body, 1).body
    assert b"1234" not in kept
    assert b"eyJ" not in kept
    assert b"***" in kept
    assert kept[:5] == body[:5]


@pytest.mark.parametrize(
    "token",
    [
        "eyJhbGciOiJ9.eyJzdWIiOiJ9.c2ln",
        "eyJhbGciOiJ9..aXY.Y2lwaGVy.dGFn",
        "eyAiYWxnIjo.eyJzdWIiOiJ9.c2ln",
        "ew0KImFsZyI.eyJzdWIiOiJ9.c2ln",
    ],
)
def test_no_part_of_a_token_is_left_in_a_body(token: str) -> None:
    """Of a signed one with three parts and an encrypted one with five, however their JSON is spaced.

    What a detached signature says stays.
    """
    body = b'{"jws_signature":"eyJhbGciOiJ9..c2lnbmF0dXJl"} said %s, then' % token.encode()
    assert masked_body(body) == b'{"jws_signature":"eyJhbGciOiJ9..c2lnbmF0dXJl"} said ***, then'


def test_what_is_said_of_a_dead_letter_is_short() -> None:
    """A message may be quoted in it, and a sender decides how long that is."""
    letter = DeadLetter.about("m", "topic", "x" * 900_000, "y" * 900_000, b"", 1)
    assert len(letter.reason) < 5000
    assert len(letter.detail) < 5000


def test_no_part_of_a_token_is_left_where_it_is_cut() -> None:
    """Half a token is not known as one any more, so it is hidden before."""
    letter = DeadLetter.about("m", "topic", "odd", f"{'y' * (4000 - len(TEXT) // 2)} {TEXT}", b"", 1)
    assert "eyJ" not in letter.detail


def test_a_body_full_of_beginnings_of_tokens_takes_no_time() -> None:
    """Anybody can send one, and it is looked through before anything else is known of it."""
    began = time.process_time()
    DeadLetter.about("m", "topic", "unsigned", "", b"eyJ" * 30_000, 1)
    assert time.process_time() - began < 10.0
