"""SignedEnvelope: detached JWS over the exact bytes that travel, verified before anything of them is read.

RFC 7515 appendix F with RFC 7797 (`b64: false`): the signature stands in front of the body, which is signed as it is.
The cryptography is joserfc's; which headers there are, and in which form, is checked here: the library lets more pass.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Protocol

from pydantic_core import to_json

from paigeant.codec import parse_strict
from paigeant.envelope import SIGNATURE, framed, inner, outer, split
from paigeant.errors import ConfigurationError, KeysUnavailable, MessageInvalid
from paigeant.keys import Algorithm, Key, Roles, TrustedKey
from paigeant.message import (
    DEFAULT_LIMIT_BYTES,
    JUST_BEGUN,
    SENT_FROM,
    PaigeantMessage,
    Seal,
    decode,
    encode,
)
from paigeant.secret import OBO_TOKEN
from paigeant.slip import Phase

__all__ = ["REASONS", "KeySource", "SignedEnvelope"]

LEEWAY = 60.0
"""Seconds by which the clocks of two hosts may differ."""

REASONS = (
    "unsigned",
    "bad_frame",
    "bad_header",
    "unknown_key",
    "keys_unavailable",
    "revoked_key",
    "expired_key",
    "bad_signature",
    "wrong_deployment",
    "wrong_topic",
    "expired",
    "not_yet_valid",
    "wrong_token",
    "wrong_role",
)
"""Why a signed message is refused, before or after its body is read; see `message.decode` for the others."""

_TYPE = "paigeant-msg+jws"
_SEAL_BYTES = len(
    b'"seal":{"deployment":,"topic":,"issued_at":1000000000,"expires_at":1000000000,"sent_from":,"obo_hash":},'
) + len(hashlib.sha256().hexdigest())
_NAMES = {"alg", "kid", "typ", "crit", "b64"}


class KeySource(Protocol):
    """Where an envelope has its keys from. They may change at any time."""

    def signer(self) -> tuple[Key, Roles]:
        """The key to sign with now, and what it may be used for. Raises ConfigurationError when there is none."""
        ...

    async def find(self, kid: str) -> TrustedKey | None:
        """The public key of this id, revoked or not; None for one that nobody vouches for.

        Raises KeysUnavailable when that can't be found out now.
        """
        ...


class SignedEnvelope:
    """Signs what is sent. What comes is verified where it is signed and, if it `requires` that, refused where it isn't.

    `deployment` is what sender and receiver call their installation: a message of another one is refused. A message
    holds for `lifetime` seconds; one that is sent again is signed again. `clock` gives this host's time.
    """

    def __init__(
        self,
        keys: KeySource,
        *,
        deployment: str,
        requires: bool,
        lifetime: float,
        clock: Callable[[], float],
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        self.keys = keys
        self.deployment = deployment
        self.requires = requires
        self.lifetime = lifetime
        self.limit_bytes = limit_bytes
        self.seal_bytes = _SEAL_BYTES + len(to_json(deployment))
        self._clock = clock

    def seal(self, message: PaigeantMessage, topic: str) -> bytes:
        key, _ = self.keys.signer()
        now = int(self._clock())
        body = inner(message)
        headers = {name: text for name, text in body.headers.items() if name != JUST_BEGUN}
        seal = Seal(
            self.deployment,
            topic,
            now,
            now + int(self.lifetime),
            sent_from=headers.pop(SENT_FROM, None),
            obo_hash=_hash_of(message.headers.get(OBO_TOKEN)),
        )
        signed = encode(body.evolve(headers=headers, seal=seal), limit_bytes=self.limit_bytes)
        # Its text is in no variable: the frame of an error, such as that the message is too large, may be shown.
        return framed(signed, signature=_sign(key, signed), token=message.headers.get(OBO_TOKEN))

    async def open(self, topic: str, wire: bytes) -> PaigeantMessage:
        headers, body = split(wire, self.limit_bytes)
        signature = headers.get(SIGNATURE)
        if signature is None:
            if self.requires:
                raise MessageInvalid("unsigned", "it bears no signature, and signing is `require`")
            return outer(decode(body, limit_bytes=self.limit_bytes), headers)
        key = await self._verified(signature, body)
        message = decode(body, limit_bytes=self.limit_bytes)
        self._check(message, topic, headers.get(OBO_TOKEN), key)
        opened = outer(message, headers)
        if key.roles.may_do(topic) or _has_begun(message):
            return opened
        return opened.evolve(headers={**opened.headers, JUST_BEGUN: "said"})

    def may_send(self, message: PaigeantMessage, topic: str) -> bool:
        try:
            _, roles = self.keys.signer()
        except ConfigurationError:  # it has no key any more
            return False
        return _may_send(roles, message, topic, message.headers.get(SENT_FROM))

    async def may_start(self, message: PaigeantMessage) -> bool:
        signature = message.headers.get(SIGNATURE)
        if signature is None:
            return not self.requires
        _, _, kid, _ = _read(signature)
        key = await self.keys.find(kid)
        return key is not None and key.revoked_at is None and key.roles.may_start(message.workflow)

    @property
    def told(self) -> str:
        key, roles = self.keys.signer()
        what = "all messages" if roles.is_all else _named(roles)
        mode = "require" if self.requires else "sign"
        return f"{mode}: deployment '{self.deployment}', key {key.kid} ({key.algorithm}), for {what}"

    @property
    def serves_all(self) -> bool:
        try:
            return self.keys.signer()[1].is_all
        except ConfigurationError:  # it has no key any more
            return False

    async def _verified(self, signature: str, body: bytes) -> TrustedKey:
        """The key that has signed `body`, of which nothing has been read yet."""
        protected, algorithm, kid, raw = _read(signature)
        try:
            key = await self.keys.find(kid)
        except KeysUnavailable as exc:  # closed: what can't be verified isn't believed, and is sent again
            raise MessageInvalid("keys_unavailable", str(exc)) from exc
        if key is None:
            raise MessageInvalid("unknown_key", f"nobody vouches for the key '{kid}'")
        if key.revoked_at is not None:
            raise MessageInvalid("revoked_key", f"the key '{kid}' is revoked, whenever it has signed")
        if not key.holds(self._clock(), LEEWAY):
            raise MessageInvalid("expired_key", f"the key '{kid}' doesn't hold now")
        if key.algorithm != algorithm:
            raise MessageInvalid(
                "bad_header", f"the key '{kid}' is for {key.algorithm}, found {algorithm[:20]}"
            )
        if not _holds(key, protected + b"." + body, raw):
            raise MessageInvalid(
                "bad_signature", f"it wasn't signed with the key '{kid}', or was changed since"
            )
        return key

    def _check(self, message: PaigeantMessage, topic: str, token: str | None, key: TrustedKey) -> None:
        """What a message that somebody has signed says is for this topic of this deployment, now, and theirs to say."""
        seal, now = message.seal, self._clock()
        if seal is None:
            raise MessageInvalid("wrong_shape", "what is signed has no seal")
        if seal.deployment != self.deployment:
            raise MessageInvalid("wrong_deployment", "it was signed for another deployment")
        if seal.topic != topic:
            raise MessageInvalid("wrong_topic", f"it was signed for topic '{seal.topic[:200]}'")
        if seal.issued_at > now + LEEWAY:
            raise MessageInvalid(
                "not_yet_valid", "it was signed later than now; compare the clocks of both hosts"
            )
        if seal.expires_at < now - LEEWAY:
            raise MessageInvalid("expired", "its time is over; the next sweep sends another")
        if seal.obo_hash != _hash_of(token):
            raise MessageInvalid(
                "wrong_token", "what stands in front of it isn't the token that it was signed with"
            )
        if not _may_send(key.roles, message, topic, seal.sent_from):
            raise MessageInvalid(
                "wrong_role", f"the key '{key.kid}' may not send this message; see its roles"
            )


def _holds(key: TrustedKey, signed: bytes, raw: bytes) -> bool:
    try:
        return bool(_algorithm(key.algorithm).verify(signed, raw, key.verifier))
    except Exception:  # the library's errors are of many kinds; whichever it is, this isn't a signature
        return False


def _may_send(roles: Roles, message: PaigeantMessage, topic: str, sent_from: str | None) -> bool:
    return roles.may_send(
        workflow=message.workflow, topic=topic, sent_from=sent_from, has_begun=_has_begun(message)
    )


def _has_begun(message: PaigeantMessage) -> bool:
    return bool(message.routing_slip.executed) or message.phase is Phase.UNDO


def _named(roles: Roles) -> str:
    parts = [
        f"{what} {', '.join(names)}"
        for what, names in (("starting", roles.dispatch), ("steps of", roles.run))
        if names
    ]
    return (
        " and ".join([*parts, *(["what an operator sends"] if roles.amend else [])])
        or "nothing: it has no role, or doesn't hold now"
    )


def _hash_of(token: str | None) -> str | None:
    return None if token is None else hashlib.sha256(token.encode()).hexdigest()


def _sign(key: Key, body: bytes) -> str:
    protected = _protected(key.algorithm, key.kid)
    raw = _algorithm(key.algorithm).sign(protected + b"." + body, key.signer)
    return f"{protected.decode()}..{_base64(raw).decode()}"


@cache
def _protected(algorithm: Algorithm, kid: str) -> bytes:
    header = {"alg": algorithm, "kid": kid, "typ": _TYPE, "crit": ["b64"], "b64": False}
    return _base64(json.dumps(header, separators=(",", ":")).encode())


def _read(signature: str) -> tuple[bytes, str, str, bytes]:
    """The protected header as it is, its algorithm and key id, and the signature itself. Raises MessageInvalid."""
    protected, _, rest = signature.partition("..")
    raw = _unbase64(rest)
    if not raw:
        raise MessageInvalid("bad_header", "its signature is no detached JWS (header..signature)")
    algorithm, kid = _header(protected)
    return protected.encode(), algorithm, kid, raw


@lru_cache(maxsize=256)
def _header(protected: str) -> tuple[str, str]:
    """The algorithm and the key that a header names: the same text for all that a key signs, so it is read once."""
    header_bytes = _unbase64(protected)
    if not header_bytes:
        raise MessageInvalid("bad_header", "its signature is no detached JWS (header..signature)")
    try:
        header = parse_strict(header_bytes, max_depth=2)
    except MessageInvalid as exc:
        raise MessageInvalid("bad_header", f"the header of its signature is no JSON object: {exc}") from None
    if not isinstance(header, dict) or header.keys() != _NAMES:
        raise MessageInvalid(
            "bad_header", f"the header of its signature isn't exactly {', '.join(sorted(_NAMES))}"
        )
    if header["typ"] != _TYPE or header["crit"] != ["b64"] or header["b64"] is not False:
        raise MessageInvalid(
            "bad_header", f"the header of its signature isn't one of a message: {_TYPE}, b64 false"
        )
    algorithm, kid = header["alg"], header["kid"]
    if not isinstance(algorithm, str) or not isinstance(kid, str) or not _is_kid(kid):
        raise MessageInvalid("bad_header", "the header of its signature names no algorithm, or no key")
    return algorithm, kid


def _is_kid(kid: str) -> bool:
    return 0 < len(kid) <= 128 and kid.isascii() and kid.isprintable()


@cache
def _algorithm(name: Algorithm) -> Any:
    from joserfc.jws import JWSRegistry

    return JWSRegistry(algorithms=[name]).get_alg(name)


def _base64(value: bytes) -> bytes:
    return base64.urlsafe_b64encode(value).rstrip(b"=")


def _unbase64(text: str) -> bytes:
    """What a text in base64url without padding stands for; nothing where it isn't the one text for it."""
    try:
        value = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
    return value if _base64(value).decode() == text else b""
