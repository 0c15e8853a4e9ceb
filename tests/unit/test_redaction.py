"""What is hidden in texts and values that tell about runs, and what isn't."""

from __future__ import annotations

import time
import warnings
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError

from paigeant.redaction import Redactor, quoted, redacted, secrets_in, without
from paigeant.secret import MASK, masked_body

CPU_SECONDS = 10.0
"""Seconds of the processor; what grows faster than the text takes minutes."""

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"refused {TOKEN}!", "refused ***!"),
        ("indented ewogICJhbGciOiJFZERTQSIKfQ.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl", "indented ***"),
        (f"encrypted {TOKEN}.four.five.", "encrypted ***."),
        (f"token%3A{TOKEN} of api.eyJ.example.org", "token%3A*** of api.eyJ.example.org"),
        ("can't reach amqp://ada:pa55word@host/x?y=1", "can't reach amqp://ada:***@host/x?y=1"),
        ("GET https://host/x?access_token=abc&y=1", "GET https://host/x?access_token=***&y=1"),
        ("Authorization: Bearer abcdef012345", "Authorization: Bearer ***"),
        ("Authorization: Token 0a1b2c, status 401", "Authorization: ***, status 401"),
        ("proxy-authorization: Negotiate YII==\nHost: x", "proxy-authorization: ***\nHost: x"),
        ('authorization: Digest username="ada", response=0a1b, nc=1 failed', "authorization: *** failed"),
        ("Cookie: theme=dark; sid=0a1b; csrf=2c; then it failed", "Cookie: ***; then it failed"),
        ("SECRET_KEY=0a1b2c", "SECRET_KEY=***"),
        ("login with password='pass word' failed", "login with password=*** failed"),
        ('{"obo_token": "a\\"b", "sku": "A-1"}', '{"obo_token": ***, "sku": "A-1"}'),
        ("X-API-Key: 12345", "X-API-Key: ***"),
        ("called with password=b'pass word', n=1", "called with password=***, n=1"),
        ("called with token=SecretStr('pass word')", "called with token=***)"),
        ('{"obo_token":["a b", "c"], "sku": "A-1"}', '{"obo_token":***, "sku": "A-1"}'),
        ('command {"obo_token":"opaque', 'command {"obo_token":***'),
        ("{'password': 'pass wo...\nnext", "{'password': ***\nnext"),
        ("got [(b'Set-Cookie', b'sid=1; a'), ('n', '1')]", "got [(b'Set-Cookie', ***), ('n', '1')]"),
        ("got [('Cookie', 'sid=1; a'), ('X-Api-Key', '12345')]", "got [('Cookie', ***), ('X-Api-Key', ***)]"),
        ("('password', 'must have 8 characters')", "('password', 'must have 8 characters')"),
        ("authorization: policy orders, reason=none", "authorization: ***, reason=none"),
        (
            "rest_framework_simplejwt.exceptions.InvalidToken",
            "rest_framework_simplejwt.exceptions.InvalidToken",
        ),
        ("at monkeyJungle-prod.cluster-a.example.com", "at monkeyJungle-prod.cluster-a.example.com"),
        (f"session_{TOKEN}", "session_***"),
        (
            "Command '['deploy', '--token', 'pa55 word', '-v']' returned non-zero exit status 1.",
            "Command '['deploy', '--token', ***, '-v']' returned non-zero exit status 1.",
        ),
        ("deploy --api-key 'pa55 word' --db-password pa55 -v", "deploy --api-key *** --db-password *** -v"),
        (r'{"a": "{\\\"password\\\": \\\"pa55\\\"}"}', r'{"a": "{\\\"password\\\": ***}'),
        ("credentials={'a': 'b', 'c': {'d': 1}, 'e': 'pa55'}, n=1", "credentials=***, n=1"),
        ("GET /login?next=%2Fcb%3Ftoken%3Dpa55 failed", "GET /login?next=%2Fcb%3Ftoken%3D*** failed"),
        ("body=%7B%22password%22%3A%22pa55%22%7D", "body=%7B%22password%22%3A%22***"),
        ("no key like sk-proj-0123456789abcdef", "no key like ***"),
        (f"sk_live_{'a1B2' * 6} and rk_test_{'a1B2' * 6}", "*** and ***"),
        (f"ghp_{'a1B2' * 9}, github_pat_{'a1B2' * 6}_{'x9' * 20}", "***, ***"),
        ("glpat-a1B2c3D4e5F6g7H8i9J0", "***"),
        ("slack said no to xoxb-123456789012-a1B2c3D4e5F6", "slack said no to ***"),
        (f"hf_{'a1B2' * 8}", "***"),
        ("AKIAIOSFODNN7EXAMPLE; AIzaSyA-1234567890abcdefghijklmnopqrstu", "***; ***"),
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
        "takes ('token', 'sku', 'quantity')",
        "takes '--token', '--sku' or --password --sku",
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


class Account(NamedTuple):
    """A value whose parts have names of their own."""

    user: str
    password: str


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({b"authorization": b"x", b"accept": b"y"}, {"b'authorization'": MASK, "b'accept'": "b'y'"}),
        (
            {"accessToken": "x", "dbPassword": "y", "maxTokens": 3},
            {"accessToken": MASK, "dbPassword": MASK, "maxTokens": 3},
        ),
        (
            [("x-api-key", "x"), (b"set-cookie", b"y"), ("accept", "z")],
            [["x-api-key", MASK], ["b'set-cookie'", MASK], ["accept", "z"]],
        ),
        ([Account("ada", "x")], [{"user": "ada", "password": MASK}]),
        (["deploy", "--token", "x", "-v"], ["deploy", "--token", MASK, "-v"]),
    ],
    ids=["bytes", "camel case", "pairs", "named tuple", "options"],
)
def test_names_are_known_in_whatever_form_they_come(value: Any, shown: Any) -> None:
    """As HTTP libraries, JSON of others and Python's own types have them."""
    assert Redactor().value("more", value) == shown


def test_secrets_are_found_under_names_of_any_form() -> None:
    """For texts that tell about such a value."""
    value = {b"token": "abcd", "apiToken": "efgh", "a": Account("ada", "ijkl"), "h": [["x-api-key", "mnop"]]}
    assert set(secrets_in(value)) == {"abcd", "efgh", "ijkl", "mnop"}
    assert "mnop" not in quoted(value, "headers")


def test_a_value_that_cannot_be_shown_keeps_no_line_from_being_written() -> None:
    """The text of a user's class is the user's code, which may fail."""

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert Redactor().value("x", Broken()) == "<Broken that can't be shown>"


class Login(BaseModel):
    """Something with a secret whose name says so, and without a type that does."""

    user: int
    api_key: int


def misfit(user: Any) -> Login:
    """One that holds what doesn't fit."""
    made: Any = Login.model_construct
    login: Login = made(user=user, api_key="canary-4111")
    return login


class Logins(BaseModel):
    """The same, deeper."""

    both: list[Login]


def test_what_pydantic_quotes_of_a_secret_field_is_hidden() -> None:
    """In its errors and in its warnings; what it quotes of other fields stays."""
    with pytest.raises(ValidationError) as caught:
        Logins.model_validate({"both": [{"user": "ada", "api_key": "canary-4111"}]})
    shown = redacted(str(caught.value))
    assert "canary" in str(caught.value)
    assert "canary" not in shown
    assert "both.0.user\n" in shown
    assert "input_value='ada'" in shown
    assert "[type=int_parsing, input_value=***, input_type=str]" in shown
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        misfit("ada").model_dump_json()
    said = str(told[0].message)
    assert "canary" in said
    assert "canary" not in redacted(said)
    assert "input_value='ada'" in redacted(said)


@pytest.mark.parametrize(
    ("value", "names", "shown"),
    [
        ("canary-4111", ("password",), "***"),
        (4111, ("card", "api_key"), "***"),
        (None, ("password",), "None"),
        ("many", ("quantity",), "'many'"),
        ({"sku": "A", "password": ["canary"]}, (), "{'sku': 'A', 'password': '***'}"),
        ({"user": "a" * 60, "password": "canary-4111"}, (), f"{{'user': '{'a' * 60}', 'pas..."),
        ([{"secret": {"canary": 1}}], ("given",), "[{'secret': '***'}]"),
        (misfit(1), (), "Login(user=1, api_key=***)"),
        ((1, "a"), (), "(1, 'a')"),
    ],
)
def test_an_error_quotes_no_secret(value: Any, names: tuple[str, ...], shown: str) -> None:
    """What a name says is secret, at any depth; all else is quoted as Python shows it."""
    assert quoted(value, *names) == shown


def test_secrets_are_found_by_the_names_they_stand_under() -> None:
    """At any depth, with all that is in them; what contains itself is looked into once."""
    value: dict[str, Any] = {
        "a": [{"b": {"c": {"d": {"e": {"f": {"g": {"token": {"key": [4111, True, "x"]}}}}}}}}]
    }
    value["again"] = value
    assert sorted(secrets_in(value)) == ["4111", "key", "x"]
    assert secrets_in("canary", "password") == ["canary"]
    assert secrets_in("canary", "passwords_seen") == []
    assert "4111" not in str(Redactor().value("more", value["a"]))


def test_texts_about_a_value_are_without_its_secrets() -> None:
    """A secret of a few characters is hidden where it is a word, so that others stay words."""
    assert without("bad canary-4111, not canary-4111x", ["canary-4111"]) == "bad ***, not ***x"
    assert without("found 7 in 1970", ["7"]) == "found *** in 1970"


@pytest.mark.parametrize(
    "text",
    [
        "eyJ" * 100_000,
        "eyJ." * 50_000,
        f"token={' ' * 100_000}",
        f"password: {'eyJ' * 50_000}",
        "cookie: a=b;" * 20_000,
        "authorization: a " * 20_000,
        "Authorization: Digest a=b, " * 10_000,
        "('token', '" * 20_000,
        "key http://" + "a://b:" * 15_000,
        "key" + "?" * 90_000,
        'token="' + "\\" * 100_000,
        "token" + "\\" * 100_000,
        "token={" * 20_000,
        "token={" + "{" * 100_000,
        "token={" + "{}" * 50_000,
        "--token " * 20_000,
        "--" * 50_000 + "token",
        "--token" + " " * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_no_text_takes_long_to_look_through(text: str) -> None:
    """Anybody may send one, and it is looked through in the event loop: twice the text takes twice as long."""
    began = time.process_time()
    redacted(text)
    masked_body(text.encode())
    assert time.process_time() - began < CPU_SECONDS
