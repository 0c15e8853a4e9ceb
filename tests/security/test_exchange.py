"""Tokens from an authorization server: what is sent, what is accepted, and that an exchange only narrows."""

from __future__ import annotations

import asyncio
import base64
import json
import traceback
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from joserfc.jwk import ECKey, RSAKey
from tests.security.authority import Authority

from paigeant import SecretToken
from paigeant.errors import (
    AuthorityUnavailable,
    ConfigurationError,
    ExchangeRefused,
    GrantInvalid,
    PaigeantError,
)
from paigeant.exchange import (
    ClientSecret,
    HandleGrants,
    JwtBearer,
    OwnTokens,
    PrivateKeyJwt,
    TokenEndpoint,
    TokenExchange,
)
from paigeant.identity import read_token, scopes_in
from paigeant.testing import ManualClock

SCOPES = ("a", "b", "c", "d")
HERE = "https://there.example"


@pytest.fixture
def endpoint(authority: Authority) -> TokenEndpoint:
    """The authority's, for a client with a secret that has odd signs."""
    authority.clients["desk"] = "s:e c+r%t"
    return TokenEndpoint(authority.token_url, ClientSecret("desk", SecretToken("s:e c+r%t")))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    held=st.lists(st.sampled_from(SCOPES), unique=True),
    wanted=st.lists(st.sampled_from(SCOPES), unique=True, min_size=1),
    widens=st.lists(st.sampled_from(SCOPES), unique=True, max_size=2),
)
def test_an_exchange_only_narrows(
    authority: Authority, endpoint: TokenEndpoint, held: list[str], wanted: list[str], widens: list[str]
) -> None:
    """Whatever is asked for and however the server answers, a token that comes out has no scope that wasn't held."""
    authority.widens = tuple(widens)
    subject = SecretToken(authority.token("ann", *held))
    try:
        token = asyncio.run(TokenExchange(endpoint).exchange(subject, audience=HERE, scopes=tuple(wanted)))
    except ExchangeRefused:
        assert not set(wanted) | set(widens) <= set(held) & set(wanted)
    else:
        assert set(scopes_in(read_token(token).claims)) <= set(wanted) <= set(held)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
async def test_trouble_that_passes(authority: Authority, endpoint: TokenEndpoint, status: int) -> None:
    """A server that can't answer now is worth another attempt."""
    authority.status = status
    with pytest.raises(AuthorityUnavailable, match=f"status {status}"):
        await OwnTokens(endpoint).own_token(audience=HERE, scopes=("a",))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 302])
async def test_trouble_that_doesn_t_pass(authority: Authority, endpoint: TokenEndpoint, status: int) -> None:
    """A refusal is final; a redirect of what holds secrets is followed nowhere."""
    authority.status = status
    with pytest.raises(ExchangeRefused):
        await OwnTokens(endpoint).own_token(audience=HERE, scopes=("a",))


@pytest.mark.parametrize("status", [200, 400, 503])
async def test_a_key_in_a_url_is_in_no_error(
    authority: Authority, endpoint: TokenEndpoint, status: int
) -> None:
    """Some servers want one in the query, and errors are recorded."""
    authority.status, authority.body = status, b"[]"
    endpoint = TokenEndpoint(f"{authority.token_url}?code=hush-4111", endpoint.client)
    with pytest.raises(PaigeantError, match=authority.token_url) as caught:
        await OwnTokens(endpoint).own_token(audience=HERE, scopes=("a",))
    assert "hush" not in str(caught.value)


async def test_a_server_that_is_slow(authority: Authority, endpoint: TokenEndpoint) -> None:
    """It is left after the time that it has, which is worth another attempt."""
    authority.release.clear()
    slow = TokenEndpoint(endpoint.url, endpoint.client, seconds=0.05)
    with pytest.raises(AuthorityUnavailable, match=r"no reply within 0\.05 s"):
        await OwnTokens(slow).own_token(audience=HERE, scopes=("a",))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"access_token": ""}',
        b'{"access_token": "a", "token_type": "mac"}',
        b'{"token_type": "Bearer"}',
    ],
)
async def test_answers_that_are_no_token(authority: Authority, endpoint: TokenEndpoint, body: bytes) -> None:
    """Something else than a bearer token is no answer."""
    elsewhere = TokenEndpoint(authority.jwks_url, endpoint.client)  # which says whatever it is told to
    authority.body = body
    with pytest.raises(AuthorityUnavailable, match="no bearer token"):
        await OwnTokens(elsewhere).own_token(audience=HERE, scopes=("a",))


@pytest.mark.parametrize("header", [{"kid": None}, {"alg": "RS512"}, {"alg": "none"}, {"crit": ["b64"]}])
@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"aud": HERE, "scope": "a admin"}, "can do more than was asked for: admin"),
        ({"aud": "https://elsewhere.example", "scope": "a"}, "for another audience"),
        ({"aud": HERE, "scope": 5}, "whose scopes can't be read"),
    ],
)
async def test_what_others_may_verify_is_looked_through(
    authority: Authority, endpoint: TokenEndpoint, header: dict[str, Any], claims: dict[str, Any], says: str
) -> None:
    """How a token is signed is the business of those it is for; what it says is held against what was asked for."""
    head = {"alg": "ES256", "kid": "k", **header}
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (head, claims)
    ]
    token = ".".join([*parts, "" if head["alg"] == "none" else "c2lnbmF0dXJl"])
    elsewhere = TokenEndpoint(authority.jwks_url, endpoint.client)  # which says whatever it is told to
    authority.body = json.dumps({"access_token": token, "token_type": "Bearer"}).encode()
    with pytest.raises(ExchangeRefused, match=says):
        await TokenExchange(elsewhere).exchange(SecretToken("t"), audience=HERE, scopes=("a",))


async def test_a_refused_grant(authority: Authority, endpoint: TokenEndpoint) -> None:
    """`invalid_grant` says that the person's token or grant is over, which isn't the service's fault."""
    with pytest.raises(GrantInvalid, match="invalid_grant"):
        await HandleGrants(endpoint).subject_token("unknown", workflow_id="r")
    stale = SecretToken(authority.token("ann", "a", lifetime=-1))
    for exchanger in (TokenExchange(endpoint), JwtBearer(endpoint)):
        with pytest.raises(GrantInvalid, match="invalid_grant"):
            await exchanger.exchange(stale, audience=HERE, scopes=("a",))


async def test_a_client_that_can_t_prove_itself(authority: Authority) -> None:
    """A wrong secret is refused."""
    authority.clients["desk"] = "right"
    endpoint = TokenEndpoint(authority.token_url, ClientSecret("desk", SecretToken("wrong")))
    with pytest.raises(ExchangeRefused, match="invalid_client"):
        await OwnTokens(endpoint).own_token(audience=HERE, scopes=("a",))


async def test_an_assertion_is_good_once(authority: Authority, clock: ManualClock) -> None:
    """A client with a key signs a new assertion for each request."""
    key = ECKey.generate_key("P-256", private=True)
    authority.clients["desk"] = key
    client = PrivateKeyJwt("desk", key.as_dict(private=True), clock=clock)
    own = OwnTokens(TokenEndpoint(authority.token_url, client))
    for _ in range(2):
        await own.own_token(audience=HERE, scopes=("a",))
    assertions = {one.form["client_assertion"] for one in authority.asked("/token")}
    assert len(assertions) == 2


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        ("no key", "ES256"),
        (RSAKey.generate_key(2048).as_pem(private=True).decode(), "ES256"),
        (ECKey.generate_key("P-256").as_dict(private=False), "ES256"),
        ({"kty": "oct", "k": "AAAA"}, "HS256"),
    ],
    ids=["no key", "another kind", "public", "shared"],
)
def test_keys_that_can_t_sign(key: Any, algorithm: str) -> None:
    """They are found out when the service starts, and the error doesn't show them."""
    with pytest.raises(ConfigurationError, match="the key of client 'desk' can't sign") as caught:
        PrivateKeyJwt("desk", key, algorithm)
    assert "PRIVATE" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("trouble", ["refused", "away", "unreachable", "widened"])
async def test_an_error_shows_no_token(authority: Authority, endpoint: TokenEndpoint, trouble: str) -> None:
    """Neither its text, nor its traceback with all values of variables, nor an error behind it."""
    subject = SecretToken(authority.token("ann", "a", "b"))
    match trouble:
        case "refused":
            authority.keys.clear()
        case "away":
            authority.status = 500
        case "unreachable":
            endpoint = TokenEndpoint("http://127.0.0.1:1/token", endpoint.client)
        case "widened":
            authority.widens = ("b",)
    with pytest.raises(PaigeantError) as caught:
        await TokenExchange(endpoint).exchange(subject, audience=HERE, scopes=("a",))
    found = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    # Of our frames alone: the test's own hold the authority, which knows all.
    shown = "".join(
        f"{name}={value}"
        for frame in found.stack
        if "paigeant/" in frame.filename and "/tests/" not in frame.filename
        for name, value in (frame.locals or {}).items()
    )
    for secret in (subject.reveal(), subject.reveal().split(".")[2], "s%3Ae+c", "czpl"):
        assert secret not in shown + str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "url", ["http://idp.example/token", "https://user:secret@idp.example/token", "idp.example"]
)
def test_urls_of_token_endpoints(url: str) -> None:
    """Secrets are sent over https only, or on this very host."""
    with pytest.raises(ConfigurationError, match="token endpoint"):
        TokenEndpoint(url, ClientSecret("desk", SecretToken("s")))
