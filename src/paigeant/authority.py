"""What acting for a person needs of the world: keys to verify with, tokens for handles, tokens for other audiences.

Adapters are in `jwks.py` and `exchange.py`. Whatever they ask, they prove who the service is; what they get is a
SecretToken, used for one call and recorded nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from paigeant.secret import SecretToken

__all__ = ["Freshness", "GrantStore", "KeySource", "ServiceTokens", "TokenExchanger"]


class Freshness(NamedTuple):
    """How new what is known of keys is: `age` seconds, with no news for `again_in` more, 0 where it is always new.

    `is_away`: whoever publishes them couldn't be asked the last time.
    """

    age: float = 0.0
    again_in: float = 0.0
    is_away: bool = False


class KeySource(Protocol):
    """The keys of one issuer."""

    def freshness(self) -> Freshness:
        """How new the keys are in which `find` looks."""
        ...

    async def find(self, kid: str) -> Mapping[str, Any] | None:
        """The public key of this id as a JWK, None when there is none. Raises KeysUnavailable."""
        ...


@runtime_checkable
class GrantStore(Protocol):
    """Keeps what people have granted, each grant for one run, and gives tokens for it."""

    async def subject_token(self, handle: str, *, workflow_id: str) -> SecretToken:
        """A fresh token of the person for this very service.

        Raises GrantInvalid when the grant is over, unknown, or another run's; AuthorityUnavailable.
        """
        ...


@runtime_checkable
class TokenExchanger(Protocol):
    """Exchanges a person's token for one that is good for another service only, with no more rights."""

    async def exchange(self, subject: SecretToken, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        """A token for `audience` with `scopes` and no others.

        Raises GrantInvalid when the person's token isn't accepted any more, ExchangeRefused when this will never be
        given, AuthorityUnavailable.
        """
        ...


@runtime_checkable
class ServiceTokens(Protocol):
    """Gives tokens of the service's own identity."""

    async def own_token(self, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        """A token of this service for `audience`. Raises ExchangeRefused, AuthorityUnavailable."""
        ...
