"""An authorization server on this host: publishes keys, issues and exchanges tokens over real HTTP, and does it badly.

It knows the grants that workers use: token exchange (RFC 8693), the jwt-bearer form on behalf of a user, refreshing
what a handle stands for, and client credentials. Clients prove themselves by a secret or by an assertion of their own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from joserfc import jwt
from joserfc.jwk import ECKey, Key, import_key

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


class Authority:
    """Serves on a free port of this host while the block lasts.

    Its knobs may be turned at any time: `status` answers everything so, `release` holds answers back until it is set,
    `body` is said instead of the keys, `redirect` sends elsewhere, `audience` and `lifetime` are of issued tokens,
    `widens` gives more scopes than were asked for.
    """

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.rotate()

    @property
    def url(self) -> str:
        """The issuer of its tokens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def jwks_url(self) -> str:
        """Where its keys are."""
        return f"{self.url}/jwks"

    @property
    def token_url(self) -> str:
        """Where tokens are asked for."""
        return f"{self.url}/token"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

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


def digest(token: str) -> str:
    """A name for a token that doesn't tell it."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def _handler(authority: Authority) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            self._serve(dict(parse_qsl(body.decode(), keep_blank_values=True)))

        def _serve(self, form: dict[str, str]) -> None:
            path = urlsplit(self.path).path
            with authority._lock:
                authority._asked.append(Asked(path, form))
            authority.entered.set()
            authority.release.wait(60)
            if authority.status is not None:
                self._say(authority.status, b'{"error": "server_error"}')
            elif authority.redirect is not None and not path.startswith("/moved"):
                self._say(302, b"", location=authority.redirect)
            elif path in ("/jwks", "/moved"):
                self._say(200, authority.body if authority.body is not None else authority.keys_as_json())
            elif path == "/token":
                kind, _, basic = self.headers.get("authorization", "").partition(" ")
                try:
                    answer = authority.issue(form, basic if kind == "Basic" else None)
                except Refusal as exc:
                    code = str(exc)
                    said = {"error": code, "error_description": "refused"}
                    self._say(401 if code == "invalid_client" else 400, json.dumps(said).encode())
                else:
                    self._say(200, json.dumps(answer).encode())
            else:
                self._say(404, b"{}")

        def _say(self, status: int, body: bytes, **headers: str) -> None:
            try:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # whoever asked has gone

        def log_message(self, *_: object) -> None:
            """Nothing: a test looks at `asked`."""

    return Handler
