"""Tokens from an authorization server: exchanged for another audience, for a handle, or of the service itself.

The service proves who it is by a secret or by an assertion that it signs (RFC 7523). Nothing is kept: each call asks.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote_plus

from paigeant.clock import Clock, SystemClock
from paigeant.codec import parse_strict
from paigeant.errors import (
    AuthorityUnavailable,
    ConfigurationError,
    ExchangeRefused,
    GrantInvalid,
    MessageInvalid,
    TokenRejected,
)
from paigeant.https import MOST_SECONDS, Reply, check_url, place_of, request
from paigeant.identity import said_by, scopes_in
from paigeant.secret import SecretToken

__all__ = [
    "ClientAuthentication",
    "ClientSecret",
    "HandleGrants",
    "JwtBearer",
    "OwnTokens",
    "PrivateKeyJwt",
    "TokenEndpoint",
    "TokenExchange",
]

_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ASSERTION_SECONDS = 60
_LONGEST_CODE = 100

Form = Mapping[str, str | SecretToken]


class ClientAuthentication(Protocol):
    """How a service proves to an authorization server who it is."""

    @property
    def client_id(self) -> str:
        """Who it is there."""
        ...

    def proof(self, url: str) -> tuple[dict[str, str | SecretToken], SecretToken | None]:
        """What a request to `url` has besides: fields of its form, and the value of the header `authorization`."""
        ...


@dataclass(frozen=True, slots=True)
class ClientSecret:
    """A secret that the service shares with the authorization server (`client_secret_basic`).

    Raises ConfigurationError for what is no text.
    """

    client_id: str
    secret: SecretToken

    def __post_init__(self) -> None:
        try:
            self.proof("https://example")
            return
        except UnicodeEncodeError:
            pass
        # Outside of the handler: that error holds the secret.
        raise ConfigurationError(f"the secret of client '{self.client_id}' is no text in UTF-8")

    def proof(self, url: str) -> tuple[dict[str, str | SecretToken], SecretToken | None]:
        pair = f"{quote_plus(self.client_id)}:{quote_plus(self.secret.reveal())}"
        return {}, SecretToken(f"Basic {base64.b64encode(pair.encode()).decode()}")


@dataclass(frozen=True, slots=True)
class PrivateKeyJwt:
    """A key of the service, whose public part the authorization server knows (`private_key_jwt`).

    `key` is the private key as a JWK or as PEM. Raises ConfigurationError for what is none.
    """

    client_id: str
    key: str | Mapping[str, Any] = field(repr=False)
    algorithm: str = "ES256"
    clock: Clock = field(default_factory=SystemClock)

    def __post_init__(self) -> None:
        self.proof("https://example")  # what can't sign is found out now

    def proof(self, url: str) -> tuple[dict[str, str | SecretToken], SecretToken | None]:
        from joserfc import jwt
        from joserfc.jwk import ECKey, OKPKey, RSAKey, import_key

        now = int(self.clock.now())
        claims = {
            "iss": self.client_id,
            "sub": self.client_id,
            "aud": url,
            "jti": secrets.token_urlsafe(16),
            "iat": now,
            "exp": now + _ASSERTION_SECONDS,
        }
        kinds: dict[str, Any] = {"ES": ECKey, "RS": RSAKey, "PS": RSAKey, "Ed": OKPKey}
        trouble = assertion = None
        try:
            if isinstance(self.key, str):
                key: Any = kinds[self.algorithm[:2]].import_key(self.key)
            else:
                key = import_key(dict(self.key))
            key.ensure_kid()
            header = {"alg": self.algorithm, "kid": key.kid}
            assertion = jwt.encode(header, claims, key, algorithms=[self.algorithm])
        except Exception as exc:  # the library raises errors of many kinds for a key that is none
            trouble = type(exc).__name__
        if assertion is None:
            raise ConfigurationError(
                f"the key of client '{self.client_id}' can't sign with {self.algorithm} ({trouble}); "
                "expected a private key as PEM or JWK"
            )
        fields: dict[str, str | SecretToken] = {
            "client_id": self.client_id,
            "client_assertion_type": _ASSERTION,
            "client_assertion": SecretToken(assertion),
        }
        return fields, None


@dataclass(frozen=True, slots=True)
class Issued:
    """A token as a server gave it, with the scopes that it says the token has; None where it says nothing."""

    token: SecretToken
    scopes: tuple[str, ...] | None


class TokenEndpoint:
    """Where an authorization server gives tokens, asked in the name of one service, `seconds` at most each time."""

    def __init__(self, url: str, client: ClientAuthentication, *, seconds: float = MOST_SECONDS) -> None:
        self.url = check_url(url, "the URL of a token endpoint")
        self.place = place_of(url)
        """What errors call it."""
        self.client = client
        self.seconds = seconds

    async def ask(self, form: Form) -> Issued:
        """The token that `form` asks for. Raises GrantInvalid, ExchangeRefused, AuthorityUnavailable."""
        fields, authorization = self.client.proof(self.url)
        headers = {} if authorization is None else {"authorization": authorization}
        reply = await request(self.url, form={**form, **fields}, headers=headers, seconds=self.seconds)
        if reply.status >= 500 or reply.status in (408, 429):
            raise AuthorityUnavailable(self.place, f"it answered with status {reply.status}")
        if reply.status != 200:
            code = _code(reply)
            refused = f"{self.place} refused with {code or f'status {reply.status}'}"
            raise (GrantInvalid if code == "invalid_grant" else ExchangeRefused)(refused)
        issued = _issued(reply)
        if issued is None:
            raise AuthorityUnavailable(self.place, "its answer is no bearer token")
        return issued

    async def narrowed(self, form: Form, scopes: tuple[str, ...], audience: str | None) -> SecretToken:
        """Like `ask`, for a token with these scopes at most. Raises ExchangeRefused for one that can do more."""
        issued = await self.ask(form)
        given = set(issued.scopes or ())
        claims = said_by(issued.token)
        if claims is not None:
            given |= _scopes(self.place, claims)
            aud = claims.get("aud")
            if audience is not None and audience not in (aud if isinstance(aud, list) else [aud]):
                raise ExchangeRefused(f"{self.place} gave a token for another audience than '{audience}'")
        more = sorted(given - set(scopes))
        if more:
            raise ExchangeRefused(
                f"{self.place} gave a token that can do more than was asked for: {', '.join(more)[:200]}"
            )
        return issued.token


@dataclass(frozen=True, slots=True)
class TokenExchange:
    """Token exchange by RFC 8693. `actor`, if there is one, gives the service's own token to send along."""

    endpoint: TokenEndpoint
    actor: Callable[[], Awaitable[SecretToken]] | None = None

    async def exchange(self, subject: SecretToken, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        form: dict[str, str | SecretToken] = {
            "grant_type": _EXCHANGE,
            "subject_token": subject,
            "subject_token_type": _ACCESS_TOKEN,
            "requested_token_type": _ACCESS_TOKEN,
            "audience": audience,
            "scope": " ".join(scopes),
        }
        if self.actor is not None:
            form |= {"actor_token": await self.actor(), "actor_token_type": _ACCESS_TOKEN}
        return await self.endpoint.narrowed(form, scopes, audience)


@dataclass(frozen=True, slots=True)
class JwtBearer:
    """The jwt-bearer form (RFC 7523) with `requested_token_use=on_behalf_of`, as Microsoft Entra has it.

    There the scopes name the audience, so what that server puts into the token isn't held against the one asked for.
    """

    endpoint: TokenEndpoint

    async def exchange(self, subject: SecretToken, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        form: dict[str, str | SecretToken] = {
            "grant_type": _BEARER,
            "assertion": subject,
            "requested_token_use": "on_behalf_of",
            "audience": audience,
            "scope": " ".join(scopes),
        }
        return await self.endpoint.narrowed(form, scopes, None)


@dataclass(frozen=True, slots=True)
class HandleGrants:
    """A broker that keeps refresh tokens and gives access tokens for their handles.

    It is asked as for a refresh (RFC 6749, 6), with the handle in the refresh token's place and the run's id as
    `workflow_id`: it has to refuse a handle that was left for another run.
    """

    endpoint: TokenEndpoint

    async def subject_token(self, handle: str, *, workflow_id: str) -> SecretToken:
        form = {"grant_type": "refresh_token", "refresh_token": handle, "workflow_id": workflow_id}
        return (await self.endpoint.ask(form)).token


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """Tokens of the service's own identity, by client credentials (RFC 6749, 4.4)."""

    endpoint: TokenEndpoint

    async def own_token(self, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        form: dict[str, str | SecretToken] = {
            "grant_type": "client_credentials",
            "audience": audience,
            "scope": " ".join(scopes),
        }
        try:
            return await self.endpoint.narrowed(form, scopes, None)
        except GrantInvalid as exc:
            raise ExchangeRefused(str(exc)) from exc

    def actor(self, audience: str | None) -> Callable[[], Awaitable[SecretToken]]:
        """Gives the service's own token, to be sent along with an exchange; for `audience`, or the server's default."""

        async def token() -> SecretToken:
            form = {
                "grant_type": "client_credentials",
                **({} if audience is None else {"audience": audience}),
            }
            return (await self.endpoint.ask(form)).token

        return token


def _code(reply: Reply) -> str:
    """The error code of a refusal (RFC 6749, 5.2), which is a word; its description may hold anything."""
    value = _object(reply)
    code = None if value is None else value.get("error")
    fits = (
        isinstance(code, str)
        and len(code) <= _LONGEST_CODE
        and code.replace("_", "").isalnum()
        and code.isascii()
    )
    return str(code) if fits else ""


def _issued(reply: Reply) -> Issued | None:
    value = _object(reply)
    if value is None:
        return None
    text, kind, scope = value.get("access_token"), value.get("token_type"), value.get("scope")
    if (
        not isinstance(text, str)
        or not text
        or not isinstance(kind, str)
        or kind.lower() not in ("bearer", "n_a")
    ):
        return None
    return Issued(SecretToken(text), tuple(scope.split()) if isinstance(scope, str) else None)


def _object(reply: Reply) -> dict[str, Any] | None:
    try:
        value = parse_strict(reply.body)
    except MessageInvalid:
        return None
    return value if isinstance(value, dict) else None


def _scopes(place: str, claims: Mapping[str, Any]) -> set[str]:
    try:
        return set(scopes_in(claims))
    except TokenRejected as exc:  # it says nothing of the person's token, which was good
        raise ExchangeRefused(f"{place} gave a token whose scopes can't be read") from exc
