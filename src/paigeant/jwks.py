"""Jwks: public keys that somebody publishes under a URL, fetched seldom and trusted for a day at most without news.

It knows nothing of tokens and messages: whoever verifies asks for a key by its id, and decides what it is good for.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from paigeant.authority import Freshness
from paigeant.clock import Clock, SystemClock
from paigeant.codec import parse_strict
from paigeant.errors import AuthorityUnavailable, KeysUnavailable, MessageInvalid
from paigeant.https import check_url, request

__all__ = ["Jwks", "read_jwks"]

log = logging.getLogger("paigeant.jwks")

Jwk = Mapping[str, Any]

FRESH_SECONDS = 300.0
"""So long keys are used without asking again: a key that is withdrawn is unknown after it."""

STALE_SECONDS = 24 * 3600.0
"""So long the last keys hold while the server can't be asked. After that nothing is verified any more."""

REFRESH_SECONDS = 60.0
"""The server is asked once in so many seconds, however many ids come that it doesn't know."""

FIRST_SECONDS = 5.0
"""The same while nothing has ever been fetched: without any key nothing goes on."""

_MOST_KEYS = 100
_MOST_DEPTH = 5
_PUBLIC = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class Jwks:
    """The keys at `url`. One for each URL and process, so that all who verify share what was fetched."""

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self.url = check_url(url, "the URL of a key set")
        self.clock = clock or SystemClock()
        self._keys: Mapping[str, Jwk] = MappingProxyType({})
        self._fetched_at = -math.inf
        self._asked_at = -math.inf
        self._asking = asyncio.Lock()

    async def find(self, kid: str) -> Jwk | None:
        """The public key of this id as a JWK; None when it isn't among the published ones.

        Raises KeysUnavailable when the server can't be asked, and what it said last is a day old.
        """
        known = kid in self._keys
        # Whoever has a key goes on with it while another one asks; whoever has none waits for the answer.
        if not (known and self._age() < FRESH_SECONDS) and (
            self._may_ask() or (self._asking.locked() and not known)
        ):
            async with self._asking:
                if self._may_ask():
                    await self._refresh()
        if self._age() >= STALE_SECONDS:
            raise KeysUnavailable(self.url)
        return self._keys.get(kid)

    def freshness(self) -> Freshness:
        """How old the last fetched set is, and in how many seconds the server may be asked for another."""
        return Freshness(
            self._age(),
            max(self._asked_at + self._pause() - self.clock.now(), 1.0),
            self._asked_at > self._fetched_at,
        )

    def _age(self) -> float:
        # A clock that was set back mustn't keep keys fresh until it is there again, nor stop it from asking.
        return abs(self.clock.now() - self._fetched_at)

    def _may_ask(self) -> bool:
        return abs(self.clock.now() - self._asked_at) >= self._pause()

    def _pause(self) -> float:
        return FIRST_SECONDS if math.isinf(self._fetched_at) else REFRESH_SECONDS

    async def _refresh(self) -> None:
        before, self._asked_at = self._asked_at, self.clock.now()
        try:
            reply = await request(self.url)
            if reply.status != 200:
                raise AuthorityUnavailable(self.url, f"it answered with status {reply.status}")
            try:
                self._keys = read_jwks(reply.body)
            except MessageInvalid as exc:
                raise AuthorityUnavailable(self.url, f"its answer is no key set: {exc}") from exc
        except AuthorityUnavailable as exc:
            log.warning("jwks.not_fetched: %s; %d keys are kept", exc, len(self._keys))
        except BaseException:  # cut off: nobody has been told anything
            self._asked_at = before
            raise
        else:
            self._fetched_at = max(self.clock.now(), self._asked_at)


def read_jwks(body: bytes) -> dict[str, Jwk]:
    """The public signature keys of a JWK set (RFC 7517) by their ids. Raises MessageInvalid for what is none.

    Left out are keys without an id, for encryption, of unknown kinds, symmetric or private: nobody can trust a key that
    everybody can read. Of two with one id the first counts.
    """
    value = parse_strict(body, max_depth=_MOST_DEPTH)
    listed = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(listed, list) or len(listed) > _MOST_KEYS:
        raise MessageInvalid("wrong_shape", f'a key set is {{"keys": [...]}} with at most {_MOST_KEYS} keys')
    keys: dict[str, Jwk] = {}
    for key in listed:
        if isinstance(key, dict) and _is_usable(key):
            keys.setdefault(key["kid"], MappingProxyType(key))
    return keys


def _is_usable(key: dict[str, Any]) -> bool:
    kid, kind = key.get("kid"), key.get("kty")
    if not isinstance(kid, str) or not kid or key.get("use", "sig") != "sig" or _PRIVATE & key.keys():
        return False
    if "key_ops" in key and "verify" not in (key["key_ops"] if isinstance(key["key_ops"], list) else ()):
        return False
    needed = _PUBLIC.get(kind) if isinstance(kind, str) else None
    return needed is not None and all(isinstance(key.get(name), str) for name in needed)
