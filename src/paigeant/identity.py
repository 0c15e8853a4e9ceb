"""SecurityContext: for whom a run acts and with which rights; and what makes a token a proof of that.

Everything here computes on what it is given. Keys come from elsewhere (`jwks.py`), and so do tokens (`behalf.py`).
"""

from __future__ import annotations

import base64
import binascii
import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from paigeant.codec import parse_strict
from paigeant.errors import InputInvalid, MessageInvalid, TokenExpired, TokenRejected
from paigeant.secret import SecretToken, holds_token
from paigeant.slip import is_text

__all__ = [
    "ALGORITHMS",
    "GRANT_SIGNAL",
    "LEEWAY_SECONDS",
    "MANDATE",
    "MOST_TOKEN_BYTES",
    "Draft",
    "GrantHandle",
    "Issuer",
    "Mandate",
    "SecurityContext",
    "check_claims",
    "check_scopes",
    "check_signature",
    "read_token",
    "said_by",
    "scopes_in",
]

MANDATE = "paigeant-mandate"
"""A header of messages, recorded with the run: for whom it acts, as JSON and without any token."""

GRANT_SIGNAL = "paigeant.grant"
"""What a step waits for that has no valid token: the name of a signal which only `Run.grant` sends."""

LEEWAY_SECONDS = 30.0
"""By so much the clocks of an issuer and a worker may differ."""

MOST_TOKEN_BYTES = 16 * 1024
_MOST_ACTORS = 5
_MOST_TEXT = 500

ALGORITHMS = ("ES256", "ES384", "RS256", "PS256", "Ed25519", "EdDSA")
"""What tokens may be signed with. Neither `none` nor a secret that two parties share."""

_REFUSED = ("jku", "jwk", "x5u", "x5c", "crit", "b64", "zip", "enc")
"""Header fields that name a key from the token itself, or change how it is to be read."""


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """On whose behalf a run acts, and with which rights. It holds no token: tokens are never stored.

    `subject` is the stable id of the person or service, `issuer` who says so, `scopes` are the rights that they
    granted. `actors` are those who act for it, the present one first; they are there for the record, not for
    decisions. Where it comes from a token that was verified just now, `audience` and `expires_at` are that token's.
    """

    subject: str
    scopes: tuple[str, ...] = ()
    issuer: str | None = None
    audience: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()
    expires_at: float | None = None

    def missing(self, scopes: Iterable[str]) -> tuple[str, ...]:
        """Those of `scopes` that were not granted."""
        return tuple(scope for scope in scopes if scope not in self.scopes)


@dataclass(frozen=True, slots=True)
class GrantHandle:
    """The name of a grant that a broker or authorization server keeps for one run.

    The handle is no secret and no token: it is worth something only to a worker that proves who it is, and for that
    run alone. `subject`, `issuer` and `scopes` say what it stands for, and are recorded with the run.
    """

    handle: str
    subject: str
    issuer: str
    scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("handle", "subject", "issuer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or len(value) > _MOST_TEXT or not is_text(value):
                raise InputInvalid(
                    f"the {name} of a grant is a text of 1 to {_MOST_TEXT} characters, found {type(value).__name__}"
                )
        if holds_token(self.handle):
            raise InputInvalid(
                "a handle is the name of a grant, found a token; pass the token itself instead"
            )
        object.__setattr__(self, "scopes", check_scopes(self.scopes))


@dataclass(frozen=True, slots=True)
class Mandate:
    """For whom a run acts, as its row and its messages have it. `handle`: the grant that gives tokens, if any."""

    subject: str
    issuer: str
    scopes: tuple[str, ...] = ()
    handle: str | None = None

    @classmethod
    def of(cls, grant: GrantHandle) -> Self:
        """What is recorded of a grant."""
        return cls(grant.subject, grant.issuer, grant.scopes, grant.handle)

    @property
    def identity(self) -> SecurityContext:
        """What is known without a token."""
        return SecurityContext(self.subject, self.scopes, self.issuer)

    def dump(self) -> str:
        """As a header of messages."""
        value = {"sub": self.subject, "iss": self.issuer, "scopes": self.scopes, "handle": self.handle}
        return json.dumps(value, separators=(",", ":"))

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Self | None:
        """The mandate of a run from its headers; None for a run that acts for nobody. Raises TokenRejected."""
        text = headers.get(MANDATE)
        if text is None:
            return None
        try:
            value = parse_strict(text.encode())
            scopes, handle = value["scopes"], value["handle"]
            texts = [value["sub"], value["iss"], *scopes, *([] if handle is None else [handle])]
            if not isinstance(scopes, list) or not all(isinstance(part, str) for part in texts):
                raise TypeError("it isn't made of texts")
            return cls(value["sub"], value["iss"], tuple(scopes), handle)
        except (MessageInvalid, ValueError, TypeError, KeyError) as exc:
            raise TokenRejected(
                "mandate", f"the header {MANDATE} can't be read: {type(exc).__name__}"
            ) from exc

    def bound(self, found: SecurityContext) -> SecurityContext:
        """What a verified token allows to this run: no more than was granted to it. Raises TokenRejected."""
        if (found.subject, found.issuer) != (self.subject, self.issuer):
            raise TokenRejected(
                "subject",
                f"the run acts for '{self.subject}' of {self.issuer}, and the token is that of '{found.subject}' "
                f"of {found.issuer}",
            )
        scopes = tuple(scope for scope in found.scopes if scope in self.scopes)
        return SecurityContext(
            found.subject, scopes, found.issuer, found.audience, found.actors, found.expires_at
        )


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who may say for whom a run acts. `name` is the exact `iss` of its tokens.

    `algorithms` are those that it signs with. `token_type` is the `typ` of its access tokens; None where it sets none.
    """

    name: str
    jwks_url: str
    algorithms: tuple[str, ...] = ("ES256", "RS256")
    token_type: str | None = "at+jwt"


@dataclass(frozen=True, slots=True)
class Draft:
    """A token that was read and not yet verified: nothing in it is true so far."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]

    @property
    def kid(self) -> str:
        """The id of the key that is said to have signed it."""
        return str(self.header["kid"])

    @property
    def issuer(self) -> str:
        """Who is said to have issued it."""
        return str(self.claims["iss"])


def read_token(token: SecretToken) -> Draft:
    """A token's header and claims, checked for what needs no key. Raises TokenRejected."""
    size = len(token.reveal())
    if size > MOST_TOKEN_BYTES:
        raise TokenRejected("too_large", f"it has {size:,} characters, at most {MOST_TOKEN_BYTES:,} are read")
    parts = _unsigned(token)
    if parts is None or not parts.is_signed:
        raise TokenRejected("malformed", "it isn't three parts of base64url, the last of them a signature")
    header, claims = _object(parts.header, "header"), _object(parts.claims, "claims")
    refused = next((name for name in _REFUSED if name in header), None)
    if refused is not None:
        raise TokenRejected("header", f"its header has '{refused}', which is never followed")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= _MOST_TEXT or not is_text(kid):
        raise TokenRejected("header", "its header has no `kid` that names its key")
    if header.get("alg") not in ALGORITHMS:
        raise TokenRejected(
            "algorithm", f"it is signed with {_short(header.get('alg'))}, which is never accepted"
        )
    if not isinstance(claims.get("iss"), str):
        raise TokenRejected("issuer", "it doesn't say who has issued it")
    return Draft(header, claims)


def said_by(token: SecretToken) -> Mapping[str, Any] | None:
    """The claims of a token that others are to verify, whatever its header is; None where only they can read it."""
    parts = _unsigned(token)
    try:
        return None if parts is None else _object(parts.claims, "claims")
    except TokenRejected:
        return None


class _Parts(NamedTuple):
    header: str
    claims: str
    is_signed: bool


def _unsigned(token: SecretToken) -> _Parts | None:
    """A token's first two parts. Its text stays in here: whoever raises an error has no signature in its frame."""
    text = token.reveal()
    parts = text.split(".")
    if len(parts) != 3 or not parts[0] or not parts[1] or not text.isascii():
        return None
    return _Parts(parts[0], parts[1], bool(parts[2]))


def check_signature(token: SecretToken, draft: Draft, key: Mapping[str, Any], issuer: Issuer) -> None:
    """Raise TokenRejected unless `key` has signed the token, with an algorithm of its issuer and of the key."""
    from joserfc import jws  # here, because few processes see a token
    from joserfc.errors import SecurityWarning
    from joserfc.jwk import import_key

    algorithm = str(draft.header["alg"])
    if algorithm not in issuer.algorithms or key.get("alg", algorithm) != algorithm:
        raise TokenRejected(
            "algorithm", f"it is signed with {algorithm}, and the key or its issuer uses another one"
        )
    kind = draft.header.get("typ")
    if issuer.token_type is not None and not _is_type(kind, issuer.token_type):
        raise TokenRejected(
            "type", f"it is of type {_short(kind)}, expected {issuer.token_type}: an access token"
        )
    registry = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    trouble = None
    try:
        with warnings.catch_warnings():
            # Of EdDSA, which got another name; an issuer that still says so is as safe.
            warnings.simplefilter("ignore", SecurityWarning)
            jws.deserialize_compact(token.reveal(), import_key(dict(key)), registry=registry)
    except Exception as exc:  # the library's are of many kinds, KeyError for a curve that it doesn't know
        trouble = type(exc).__name__
    if trouble is not None:  # outside of the handler: the library's frames hold the token
        raise TokenRejected("signature", f"its signature isn't that of key '{draft.kid}' ({trouble})")


def check_claims(draft: Draft, *, audience: str, now: float) -> SecurityContext:
    """For whom a token lets this service act, once its signature is verified.

    Raises TokenExpired for one that was good, TokenRejected for one that never is.
    """
    claims = draft.claims
    if "cnf" in claims:
        raise TokenRejected(
            "sender_constrained", "it is bound to its sender's key (`cnf`): only the sender can use it"
        )
    aud = claims.get("aud")
    audiences = [aud] if isinstance(aud, str) else aud
    if not isinstance(audiences, list) or audience not in audiences:
        raise TokenRejected("audience", f"it is meant for {_short(aud)}, and this service is '{audience}'")
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= _MOST_TEXT or not is_text(subject):
        raise TokenRejected("subject", "it doesn't say for whom it was issued")
    expires, begins, issued = (_instant(claims, name) for name in ("exp", "nbf", "iat"))
    if expires is None:
        raise TokenRejected("expiry", "it has no end (`exp`)")
    if begins is not None and begins > now + LEEWAY_SECONDS:
        raise TokenRejected("not_yet", f"it is valid in {begins - now:.0f} s at the earliest")
    if issued is not None and issued > now + LEEWAY_SECONDS:
        raise TokenRejected("not_yet", f"it says that it was issued {issued - now:.0f} s from now")
    actors = _actors(claims.get("act"))
    scopes = scopes_in(claims)
    if expires + LEEWAY_SECONDS <= now:
        raise TokenExpired(f"the token of '{subject}' expired {now - expires:.0f} s ago")
    names = tuple(name for name in audiences if isinstance(name, str))
    return SecurityContext(subject, scopes, draft.issuer, names, actors, expires)


def scopes_in(claims: Mapping[str, Any]) -> tuple[str, ...]:
    """The scopes of a token: `scope` (RFC 9068), or `scp` where an issuer calls it so. Raises TokenRejected."""
    value = claims.get("scope", claims.get("scp", ""))
    listed = value.split() if isinstance(value, str) else value
    try:
        return check_scopes(listed)
    except InputInvalid as exc:
        raise TokenRejected("scope", f"its scopes can't be read: {exc}") from exc


def check_scopes(scopes: Collection[str]) -> tuple[str, ...]:
    """`scopes` without repeats. Raises InputInvalid for what are no scopes (RFC 6749, 3.3)."""
    if isinstance(scopes, (str, Mapping)) or not isinstance(scopes, Collection):
        raise InputInvalid(f"scopes are a list of texts, found {type(scopes).__name__}")
    for scope in scopes:
        good = isinstance(scope, str) and 0 < len(scope) <= _MOST_TEXT
        if not good or any(not "!" <= sign <= "~" or sign in '"\\' for sign in scope):
            raise InputInvalid(f"a scope is a text of visible ASCII characters, found {_short(scope)}")
    return tuple(dict.fromkeys(scopes))


def _actors(act: Any) -> tuple[str, ...]:
    actors: list[str] = []
    while act is not None:
        if len(actors) == _MOST_ACTORS:
            raise TokenRejected(
                "actors", f"more than {_MOST_ACTORS} actors stand one behind the other (`act`)"
            )
        if not isinstance(act, dict) or not isinstance(act.get("sub"), str) or not is_text(act["sub"]):
            raise TokenRejected("actors", "an actor (`act`) has no `sub`")
        actors.append(act["sub"])
        act = act.get("act")
    return tuple(actors)


def _instant(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**53:
        raise TokenRejected("malformed", f"its `{name}` is no number of seconds")
    return float(value)


def _object(part: str, what: str) -> dict[str, Any]:
    trouble = "it is no JSON object"
    try:
        body = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        value = parse_strict(body)
    except MessageInvalid as exc:
        value, trouble = None, exc.reason
    except (binascii.Error, ValueError):
        value, trouble = None, "it is no base64url"
    if not isinstance(value, dict):
        raise TokenRejected("malformed", f"its {what} can't be read: {trouble}")
    return value


def _is_type(found: object, wanted: str) -> bool:
    return isinstance(found, str) and found.lower().removeprefix("application/") == wanted.lower()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
