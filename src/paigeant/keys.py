"""Keys: pairs that sign messages, the ring that holds an installation's own, and what others' may be used for.

One algorithm a key: Ed25519 (RFC 9864), ES256 or RS256. No HMAC, whose keys could sign what they are to check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from paigeant.clock import LAST_INSTANT
from paigeant.errors import ConfigurationError

if TYPE_CHECKING:
    from joserfc.jwk import Key as Jwk

__all__ = ["ALGORITHMS", "Algorithm", "Key", "KeyRing", "Roles", "TrustedKey", "thumbprint"]

Algorithm = Literal["Ed25519", "ES256", "RS256"]
ALGORITHMS: tuple[Algorithm, ...] = ("Ed25519", "ES256", "RS256")

_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})
_RSA_BITS = 2048


@dataclass(frozen=True)
class Key:
    """A key pair. `kid` is its RFC 7638 thumbprint; instants are seconds since 1970 (UTC)."""

    kid: str
    created_at: float
    _jwk: Mapping[str, str]
    revoked_at: float | None = None

    def __repr__(self) -> str:
        return f"Key({self.kid!r})"  # the private part must not get into a log

    @classmethod
    def generate(cls, *, now: float, algorithm: Algorithm = "Ed25519") -> Self:
        """A new key pair, whose id doesn't begin with a hyphen: a command line would take it for an option."""
        key = _made(algorithm)
        while (kid := str(key.thumbprint())).startswith("-"):
            key = _made(algorithm)
        values = {str(name): str(value) for name, value in key.as_dict(private=True).items() if name != "kid"}
        return cls(kid, now, values)

    @cached_property
    def algorithm(self) -> Algorithm:
        """What it signs with."""
        return algorithm_of(self._jwk)

    @cached_property
    def signer(self) -> Jwk:
        """The library's key."""
        return _imported(self._jwk)

    @property
    def public(self) -> dict[str, str]:
        """The public part as a JWK, with its `kid` and `alg`: what others may know."""
        shown = {name: value for name, value in self._jwk.items() if name not in _PRIVATE}
        return {**shown, "kid": self.kid, "alg": self.algorithm}


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of an installation, the oldest first. The newest that isn't revoked signs; others verify."""

    keys: tuple[Key, ...] = ()

    @property
    def active(self) -> Key:
        """The key to sign with. Raises ConfigurationError when there is none."""
        for key in reversed(self.keys):
            if key.revoked_at is None:
                return key
        what = "is empty; `paigeant keys generate` makes a key"
        if self.keys:
            what = "has only revoked keys; `paigeant keys rotate` adds another"
        raise ConfigurationError(f"the key ring {what}")

    def rotate(self, key: Key) -> KeyRing:
        """The ring with `key` as its active one."""
        return replace(self, keys=(*self.keys, key))

    def revoke(self, kid: str, *, now: float) -> KeyRing:
        """The ring where nothing signed with this key counts any more. Raises ConfigurationError for an unknown one."""
        if self.find(kid) is None:
            known = ", ".join(key.kid for key in self.keys) or "none"
            raise ConfigurationError(f"the key ring has no key '{kid}'; it has: {known}")
        return KeyRing(
            tuple(
                replace(key, revoked_at=now) if key.kid == kid and key.revoked_at is None else key
                for key in self.keys
            )
        )

    def find(self, kid: str) -> Key | None:
        """The key of this id, active or not."""
        return next((key for key in self.keys if key.kid == kid), None)

    def as_dict(self) -> dict[str, Any]:
        """The ring as JSON holds it, private parts included: for a file that only its owner can read."""
        keys = [
            {
                "kid": key.kid,
                "created_at": key.created_at,
                **({} if key.revoked_at is None else {"revoked_at": key.revoked_at}),
                "jwk": dict(key._jwk),
            }
            for key in self.keys
        ]
        return {"version": 1, "keys": keys}

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """What `as_dict` gave. Raises ConfigurationError for anything else."""
        if (
            not isinstance(value, dict)
            or value.get("version") != 1
            or not isinstance(value.get("keys"), list)
        ):
            raise ConfigurationError('a key ring is {"version": 1, "keys": [...]}; this is something else')
        return cls(tuple(_key(entry) for entry in value["keys"]))


@dataclass(frozen=True, slots=True)
class Roles:
    """What a key may be used for. `dispatch`: workflows whose runs it may start; `run`: topics whose steps it may do.

    Both are patterns (`*` for any characters). `amend`: it may send whatever an operator may.
    """

    dispatch: Sequence[str] = ()
    run: Sequence[str] = ()
    amend: bool = False

    @property
    def is_all(self) -> bool:
        """Whether nothing is closed to it."""
        return self.amend or ("*" in self.run and "*" in self.dispatch)

    @property
    def is_none(self) -> bool:
        """Whether all is closed to it."""
        return not (self.dispatch or self.run or self.amend)

    def may_start(self, workflow: str) -> bool:
        """Whether a run of `workflow` may begin with a message that was signed with a key of these roles."""
        return self.amend or _fits(workflow, self.dispatch)

    def may_do(self, topic: str) -> bool:
        """Whether it may do the steps of `topic`: then what it says of them counts."""
        return self.amend or _fits(topic, self.run)

    def may_send(self, *, workflow: str, topic: str, sent_from: str | None, has_begun: bool) -> bool:
        """Whether a message for `topic` counts that was signed with a key of these roles.

        Who may do the step that is due may send its message (every sweep of its workers does). Else it takes one who
        may do the step recorded before it, of the topic `sent_from`, or, where nothing is recorded yet, one who may
        start runs of `workflow`.
        """
        if self.may_do(topic):
            return True
        if has_begun:
            return sent_from is not None and _fits(sent_from, self.run)
        return _fits(workflow, self.dispatch)


ALL_ROLES = Roles(("*",), ("*",), True)


@dataclass(frozen=True)
class TrustedKey:
    """A public key that messages may be signed with, what for, and from when to when."""

    kid: str
    jwk: Mapping[str, Any] = field(repr=False)
    roles: Roles = ALL_ROLES
    not_before: float | None = None
    not_after: float | None = None
    revoked_at: float | None = None

    @cached_property
    def algorithm(self) -> Algorithm:
        """The only one that its signatures may have."""
        return algorithm_of(self.jwk)

    def holds(self, now: float, leeway: float = 0.0) -> bool:
        """Whether `now` is within the time that it is for, or `leeway` seconds before or after that."""
        begins = now if self.not_before is None else self.not_before
        ends = now if self.not_after is None else self.not_after  # 0 is an instant, long ago
        return begins - leeway <= now <= ends + leeway

    @cached_property
    def verifier(self) -> Jwk:
        """The library's key."""
        return _imported({name: value for name, value in self.jwk.items() if name not in _PRIVATE})


def algorithm_of(jwk: Mapping[str, Any]) -> Algorithm:
    """The algorithm of a key, which its kind decides. Raises ConfigurationError for a kind that isn't used here."""
    match jwk.get("kty"), jwk.get("crv"):
        case "OKP", "Ed25519":
            return "Ed25519"
        case "EC", "P-256":
            return "ES256"
        case "RSA", None:
            return "RS256"
    raise ConfigurationError(
        f"a key of kind {jwk.get('kty')!r} {jwk.get('crv') or ''} can't sign messages; expected Ed25519, P-256 or RSA"
    )


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """The id of a key (RFC 7638). Raises ConfigurationError for what is no key that can sign messages."""
    algorithm_of(jwk)
    return str(_imported(jwk).thumbprint())


def _made(algorithm: Algorithm) -> Jwk:
    from joserfc.jwk import ECKey, OKPKey, RSAKey  # here and below, because few processes need a key

    match algorithm:
        case "Ed25519":
            return OKPKey.generate_key("Ed25519", private=True)
        case "ES256":
            return ECKey.generate_key("P-256", private=True)
        case "RS256":
            return RSAKey.generate_key(_RSA_BITS, private=True)


def _imported(jwk: Mapping[str, Any]) -> Jwk:
    from joserfc.jwk import JWKRegistry

    # Zeros in front, which are A's, make the text longer and the key no better.
    if jwk.get("kty") == "RSA" and len(str(jwk.get("n", "")).lstrip("A")) * 6 < _RSA_BITS:
        raise ConfigurationError(f"an RSA key has {_RSA_BITS} bits or more")
    try:
        # Without what others say of it: its kind alone decides what it is used for.
        key = JWKRegistry.import_key(
            {name: value for name, value in jwk.items() if name not in ("kid", "alg", "use", "key_ops")}
        )
    except Exception as exc:  # the library raises errors of many kinds for a key that is none
        raise ConfigurationError(f"this is no key: {type(exc).__name__}") from exc
    return key


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _key(entry: object) -> Key:
    if not isinstance(entry, dict) or not isinstance(entry.get("jwk"), dict):
        raise ConfigurationError("the key ring holds something that is no key")
    jwk, kid = entry["jwk"], entry.get("kid")
    try:
        created_at = float(entry["created_at"])
        revoked_at = None if entry.get("revoked_at") is None else float(entry["revoked_at"])
        if not all(0 <= instant <= LAST_INSTANT for instant in (created_at, revoked_at or 0.0)):
            raise ValueError("no date is so far away")
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise ConfigurationError(
            f"key '{kid}' of the key ring has no instant created_at, or a revoked_at that is none"
        ) from exc
    if "d" not in jwk:
        raise ConfigurationError(f"key '{kid}' of the key ring has no private part")
    if (found := thumbprint(jwk)) != kid:
        raise ConfigurationError(f"key '{kid}' of the key ring has another thumbprint: {found}")
    return Key(kid, created_at, dict(jwk), revoked_at)
