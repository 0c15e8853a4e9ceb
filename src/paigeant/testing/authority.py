"""An authorization server in memory: signs tokens of people, keeps grants, exchanges tokens. No request is sent."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from paigeant.authority import Freshness
from paigeant.behalf import Behalf, TokenVerifier
from paigeant.clock import Clock, SystemClock
from paigeant.errors import ExchangeRefused, GrantInvalid, TokenExpired
from paigeant.identity import GrantHandle, Issuer
from paigeant.secret import SecretToken

__all__ = ["MemoryAuthority"]


class MemoryAuthority:
    """Who issues tokens in a test of a run that acts for somebody: `MemoryApp(activity, authority=MemoryAuthority())`.

    Its tokens are real ones, signed and verified like others. `exchanged` tells what was exchanged, as (subject,
    audience, scopes). The time is that of the application's clock.
    """

    name = "https://authority.test"
    audience = "https://paigeant.test"

    def __init__(self) -> None:
        self.clock: Clock = SystemClock()
        self.exchanged: list[tuple[str, str, tuple[str, ...]]] = []
        from joserfc.jwk import ECKey  # here, because most tests act for nobody

        self._key = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, private=True)
        self._key.ensure_kid()
        self._kept: dict[str, tuple[str, tuple[str, ...], str]] = {}

    def token(self, subject: str, *scopes: str, lifetime: float = 300.0) -> SecretToken:
        """An access token of somebody for the application, which is good for `lifetime` seconds."""
        return self._sign(subject, self.audience, scopes, lifetime)

    def grant(self, subject: str, *scopes: str, workflow_id: str) -> GrantHandle:
        """The handle of a grant that is kept here for one run."""
        handle = f"grant-{secrets.token_hex(6)}"
        self._kept[handle] = subject, scopes, workflow_id
        return GrantHandle(handle, subject, self.name, scopes)

    def revoke(self, grant: GrantHandle) -> None:
        """Take a grant back: steps that need it wait for another one."""
        self._kept.pop(grant.handle, None)

    def behalf(self, clock: Clock) -> Behalf:
        """What an application needs to act for those who have a grant here."""
        self.clock = clock
        issuer = Issuer(self.name, f"{self.name}/jwks", ("ES256",))
        verifier = TokenVerifier({self.name: issuer}, {self.name: self}, self.audience, clock)
        return Behalf(verifier, self, self, self)

    # -- what applications ask

    def freshness(self) -> Freshness:
        return Freshness()

    async def find(self, kid: str) -> Mapping[str, Any] | None:
        return self._key.as_dict(private=False) if kid == self._key.kid else None

    async def subject_token(self, handle: str, *, workflow_id: str) -> SecretToken:
        subject, scopes, bound = self._kept.get(handle, ("", (), ""))
        if not subject or bound != workflow_id:
            raise GrantInvalid("the grant is over, unknown, or another run's")
        return self.token(subject, *scopes)

    async def exchange(self, subject: SecretToken, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        verifier = self.behalf(self.clock).verifier
        assert verifier is not None, "it trusts itself"
        try:
            found = await verifier.verify(subject)
        except TokenExpired as exc:
            raise GrantInvalid(str(exc)) from exc
        if found.missing(scopes):
            raise ExchangeRefused(f"'{found.subject}' hasn't granted {', '.join(found.missing(scopes))}")
        self.exchanged.append((found.subject, audience, scopes))
        return self._sign(found.subject, audience, scopes, 300.0)

    async def own_token(self, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        return self._sign("the service", audience, scopes, 300.0)

    def _sign(self, subject: str, audience: str, scopes: tuple[str, ...], lifetime: float) -> SecretToken:
        from joserfc import jwt

        now = self.clock.now()
        claims = {
            "iss": self.name,
            "sub": subject,
            "aud": audience,
            "iat": int(now),
            "exp": int(now + lifetime),
            "jti": secrets.token_hex(8),
            "scope": " ".join(scopes),
        }
        header = {"alg": "ES256", "kid": self._key.kid, "typ": "at+jwt"}
        return SecretToken(jwt.encode(header, claims, self._key))
