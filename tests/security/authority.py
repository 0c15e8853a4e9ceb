"""An authorization server on this host: publishes keys, issues and exchanges tokens over real HTTP, and does it badly.

It knows the grants that workers use: token exchange (RFC 8693), the jwt-bearer form on behalf of a user, refreshing
what a handle stands for, and client credentials. Clients prove themselves by a secret or by an assertion of their own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from joserfc import jwt
from joserfc.jwk import ECKey, Key, import_key
from tests.patience import PATIENCE
from tests.services.http import HttpServer, Incoming

__all__ = ["Asked", "Authority", "Kept"]

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    path: str
    form: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A grant that a person left here for one run."""

    subject: str
    scopes: tuple[str, ...]
    workflow_id: str


class Refusal(Exception):
    """An error of OAuth: its code."""


class Authority(HttpServer):
    """Serves on a free port of this host while the block lasts.

    Its knobs may be turned at any time: `status` answers everything so, `release` holds answers back until it is set,
    `body` is said instead of the keys, `redirect` sends elsewhere, `audience` and `lifetime` are of issued tokens,
    `widens` gives more scopes than were asked for.
    """

    def __init__(self, *, now: Callable[[], float] = time.time, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls)
        self.now = now
        self.clients: dict[str, str | Key] = {}
        self.keys: list[Key] = []
        self.published: list[Key] = []
        self.grants: dict[str, Kept] = {}
        self.lifetime = 300.0
        self.own_audience = "https://paigeant.example"
        self.status: int | None = None
        self.body: bytes | None = None
        self.redirect: str | None = None
        self.audience: str | None = None
        self.widens: tuple[str, ...] = ()
        self.release = threading.Event()
        self.release.set()
        self.entered = threading.Event()
        """Set by each request that comes."""
        self._asked: list[Asked] = []
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self.rotate()

    @property
    def url(self) -> str:
        """The issuer of its tokens."""
        return self.origin

    @property
    def jwks_url(self) -> str:
        """Where its keys are."""
        return f"{self.url}/jwks"

    @property
    def token_url(self) -> str:
        """Where tokens are asked for."""
        return f"{self.url}/token"

    def __exit__(self, *error: Any) -> None:
        self.release.set()
        super().__exit__(*error)

    # -- what tests do to it

    def rotate(self, *, publish: bool = True) -> Key:
        """Sign with a new key from now on; it is published along with the old ones, or not yet."""
        key = ECKey.generate_key("P-256", parameters={"use": "sig", "alg": "ES256"}, private=True)
        key.ensure_kid()
        self.keys.append(key)
        if publish:
            self.published.append(key)
        return key

    def asked(self, path: str) -> list[Asked]:
        """The requests for a path so far."""
        with self._lock:
            return [asked for asked in self._asked if asked.path == path]

    def token(
        self,
        subject: str = "ann",
        *scopes: str,
        audience: str | list[str] | None = None,
        lifetime: float | None = None,
        header: Mapping[str, Any] | None = None,
        key: Key | None = None,
        **claims: Any,
    ) -> str:
        """A signed access token; claims and header fields that are None are left out."""
        now = self.now()
        all_claims = {
            "iss": self.url,
            "sub": subject,
            "aud": self.own_audience if audience is None else audience,
            "iat": int(now),
            "exp": int(now + (self.lifetime if lifetime is None else lifetime)),
            "jti": secrets.token_hex(8),
            "scope": " ".join(scopes),
            **claims,
        }
        key = key or self.keys[-1]
        head = {"alg": "ES256", "kid": key.kid, "typ": "at+jwt", **(header or {})}
        return jwt.encode(
            {name: value for name, value in head.items() if value is not None},
            {name: value for name, value in all_claims.items() if value is not None},
            key,
            algorithms=["ES256", "RS256", "HS256", "EdDSA", "Ed25519", "none"],
            default_type=None,
        )

    def grant(self, subject: str, *scopes: str, workflow_id: str) -> str:
        """Keep a person's grant for a run; gives the handle."""
        handle = f"grant-{secrets.token_hex(8)}"
        self.grants[handle] = Kept(subject, scopes, workflow_id)
        return handle

    # -- what it answers

    def keys_as_json(self) -> bytes:
        """The published keys."""
        return json.dumps({"keys": [key.as_dict(private=False) for key in self.published]}).encode()

    def issue(self, form: Mapping[str, str], basic: str | None) -> dict[str, Any]:
        """The answer of the token endpoint. Raises Refusal."""
        client = self._client(form, basic)
        wanted = tuple(form.get("scope", "").split())
        match form.get("grant_type"):
            case "urn:ietf:params:oauth:grant-type:token-exchange":
                if form.get("subject_token_type") != ACCESS_TOKEN:
                    raise Refusal("invalid_request")
                claims = self._read(form.get("subject_token", ""))
                if "actor_token" in form and self._read(form["actor_token"])["sub"] != client:
                    raise Refusal("invalid_request")
                return self._narrowed(claims, wanted, form.get("audience") or form.get("resource"), client)
            case "urn:ietf:params:oauth:grant-type:jwt-bearer":
                if form.get("requested_token_use") != "on_behalf_of":
                    raise Refusal("invalid_request")
                return self._narrowed(
                    self._read(form.get("assertion", "")), wanted, form.get("audience"), client
                )
            case "refresh_token":
                kept = self.grants.get(form.get("refresh_token", ""))
                if kept is None or kept.workflow_id != form.get("workflow_id"):
                    raise Refusal("invalid_grant")
                return self._answer(kept.subject, kept.scopes, self.own_audience, {})
            case "client_credentials":
                return self._answer(client, wanted, form.get("audience") or self.own_audience, {})
            case _:
                raise Refusal("unsupported_grant_type")

    def _narrowed(
        self, claims: Mapping[str, Any], wanted: tuple[str, ...], audience: str | None, client: str
    ) -> dict[str, Any]:
        have = tuple(claims["scope"].split())
        if audience is None:
            raise Refusal("invalid_target")
        if not set(wanted) <= set(have):
            raise Refusal("invalid_scope")
        act = {"sub": client, **({"act": claims["act"]} if "act" in claims else {})}
        return self._answer(claims["sub"], wanted or have, audience, {"act": act})

    def _answer(
        self, subject: str, scopes: tuple[str, ...], audience: str, more: dict[str, Any]
    ) -> dict[str, Any]:
        scopes = (*scopes, *self.widens)
        return {
            "access_token": self.token(subject, *scopes, audience=self.audience or audience, **more),
            "issued_token_type": ACCESS_TOKEN,
            "token_type": "Bearer",
            "expires_in": int(self.lifetime),
            "scope": " ".join(scopes),
        }

    def _read(self, text: str) -> dict[str, Any]:
        for key in self.keys:
            try:
                claims = dict(jwt.decode(text, key, algorithms=["ES256"]).claims)
            except Exception:  # another key, or no token at all
                continue
            if claims["exp"] <= self.now() or claims["aud"] != self.own_audience:
                raise Refusal("invalid_grant")
            return claims
        raise Refusal("invalid_grant")

    def _client(self, form: Mapping[str, str], basic: str | None) -> str:
        if basic is not None:
            client, _, secret = base64.b64decode(basic).decode().partition(":")
            client, secret = unquote_plus(client), unquote_plus(secret)
            known = self.clients.get(client)
            if isinstance(known, str) and secrets.compare_digest(known, secret):
                return client
            raise Refusal("invalid_client")
        if form.get("client_assertion_type") != ASSERTION:
            raise Refusal("invalid_client")
        client = form.get("client_id", "")
        key = self.clients.get(client)
        if not isinstance(key, Key):
            raise Refusal("invalid_client")
        try:
            claims = jwt.decode(form["client_assertion"], import_key(key.as_dict(private=False))).claims
        except Exception as exc:  # whatever is wrong with it, it proves nothing
            raise Refusal("invalid_client") from exc
        good = claims["iss"] == claims["sub"] == client and claims["aud"] == self.token_url
        with self._lock:
            fresh = claims["jti"] not in self._seen
            self._seen.add(claims["jti"])
        if not good or not fresh or not self.now() < claims["exp"] <= self.now() + 300:
            raise Refusal("invalid_client")
        return client

    # -- over HTTP

    def serve(self, request: Incoming) -> None:
        form = dict(parse_qsl(request.body().decode(), keep_blank_values=True))
        path = urlsplit(request.path).path
        with self._lock:
            self._asked.append(Asked(path, form))
        self.entered.set()
        self.release.wait(PATIENCE)
        if self.status is not None:
            request.reply(self.status, b'{"error": "server_error"}')
        elif self.redirect is not None and not path.startswith("/moved"):
            request.reply(302, headers={"location": self.redirect})
        elif path in ("/jwks", "/moved"):
            request.reply(200, self.body if self.body is not None else self.keys_as_json())
        elif path == "/token":
            self._serve_token(request, form)
        else:
            request.reply(404, b"{}")

    def _serve_token(self, request: Incoming, form: dict[str, str]) -> None:
        kind, _, basic = request.headers.get("authorization", "").partition(" ")
        try:
            answer = self.issue(form, basic if kind == "Basic" else None)
        except Refusal as exc:
            code = str(exc)
            said = {"error": code, "error_description": "refused"}
            request.reply(401 if code == "invalid_client" else 400, json.dumps(said).encode())
        else:
            request.reply(200, json.dumps(answer).encode())


def digest(token: str) -> str:
    """A name for a token that doesn't tell it."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]
