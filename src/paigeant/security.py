"""The keys of an installation. Signing comes later and lives here then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from paigeant.errors import ConfigurationError

if TYPE_CHECKING:
    from joserfc.jwk import OKPKey

__all__ = ["Key", "KeyRing"]


@dataclass(frozen=True, slots=True)
class Key:
    """An Ed25519 key pair. `kid` is its RFC 7638 thumbprint, `created_at` seconds since 1970 (UTC)."""

    kid: str
    created_at: float
    _jwk: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Key({self.kid!r})"  # the private part must not get into a log

    @classmethod
    def generate(cls, *, now: float) -> Self:
        """A new key pair."""
        key = _okp().generate_key("Ed25519", private=True)
        return cls(
            key.thumbprint(),
            now,
            {str(name): str(value) for name, value in key.as_dict(private=True).items()},
        )

    @property
    def public(self) -> dict[str, str]:
        """The public part as a JWK, with its `kid`: what others may know."""
        return {**{name: value for name, value in self._jwk.items() if name != "d"}, "kid": self.kid}


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of an installation, the oldest first. The newest is active; the others are kept to verify with."""

    keys: tuple[Key, ...] = ()

    @property
    def active(self) -> Key:
        """The key to sign with. Raises ConfigurationError for an empty ring."""
        if not self.keys:
            raise ConfigurationError("the key ring is empty; `paigeant keys generate` makes a key")
        return self.keys[-1]

    def rotate(self, key: Key) -> KeyRing:
        """The ring with `key` as its active one."""
        return replace(self, keys=(*self.keys, key))

    def find(self, kid: str) -> Key | None:
        """The key of this id, active or not."""
        return next((key for key in self.keys if key.kid == kid), None)

    def as_dict(self) -> dict[str, Any]:
        """The ring as JSON holds it, private parts included: for a file that only its owner can read."""
        keys = [{"kid": key.kid, "created_at": key.created_at, "jwk": dict(key._jwk)} for key in self.keys]
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


def _key(entry: object) -> Key:
    try:
        if not isinstance(entry, dict):
            raise TypeError(f"found {type(entry).__name__}")
        key = _okp().import_key(entry["jwk"])
        kid, created_at = str(entry["kid"]), float(entry["created_at"])
    except Exception as exc:  # the library raises errors of many kinds for a key that is none
        raise ConfigurationError(
            f"the key ring holds something that is no Ed25519 key: {type(exc).__name__}"
        ) from exc
    if key.as_dict(private=False).get("crv") != "Ed25519" or "d" not in entry["jwk"]:
        raise ConfigurationError(f"key '{kid}' of the key ring is not a private Ed25519 key")
    if key.thumbprint() != kid:
        raise ConfigurationError(f"key '{kid}' of the key ring has another thumbprint: {key.thumbprint()}")
    return Key(kid, created_at, dict(entry["jwk"]))


def _okp() -> type[OKPKey]:
    from joserfc.jwk import OKPKey  # here, because every context imports this module and few need a key

    return OKPKey
