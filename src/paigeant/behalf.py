"""Behalf: how a step acts for a person: verifies their token just before use, exchanges it, waits for a fresh one.

A token lives in memory and on the wire. When a step needs one and has none that is valid, it is parked until somebody
grants again; its attempt doesn't count. What is verified stands in `identity.py`, who is asked in `authority.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from paigeant.authority import GrantStore, KeySource, ServiceTokens, TokenExchanger
from paigeant.clock import Clock, SystemClock
from paigeant.errors import (
    ConfigurationError,
    ExchangeRefused,
    GrantInvalid,
    InputInvalid,
    KeyUnknown,
    ScopeMissing,
    TokenExpired,
    TokenRejected,
)
from paigeant.identity import (
    GRANT_SIGNAL,
    MANDATE,
    GrantHandle,
    Issuer,
    Mandate,
    SecurityContext,
    check_claims,
    check_scopes,
    check_signature,
    read_token,
    scopes_in,
)
from paigeant.secret import OBO_TOKEN, SecretToken

if TYPE_CHECKING:
    from paigeant.place import Place

__all__ = ["Acting", "Behalf", "TokenVerifier"]

_UNSET = "no `token_url` with `client_id` and `client_secret` or `client_key` is set"

_CLOCKS_DIFFER = 0.5
"""Seconds by which two spans may differ that began and ended together: one is the store's, the other this host's."""


@dataclass(frozen=True, slots=True)
class TokenVerifier:
    """Whose tokens are accepted here: `issuers` by their exact names, their `keys`, for this service's `audience`."""

    issuers: Mapping[str, Issuer]
    keys: Mapping[str, KeySource]
    audience: str
    clock: Clock = field(default_factory=SystemClock)

    async def verify(self, token: SecretToken) -> SecurityContext:
        """For whom the token lets this service act, now.

        Raises TokenRejected, TokenExpired, AuthorityUnavailable: KeyUnknown for a key that may be so new that the last
        look at the key set didn't show it.
        """
        draft = read_token(token)
        issuer = self.issuers.get(draft.issuer)
        if issuer is None:
            raise TokenRejected(
                "issuer", f"nobody called '{draft.issuer[:200]}' is among the issuers accepted here"
            )
        source = self.keys[issuer.name]
        key = await source.find(draft.kid)
        if key is None:
            raise KeyUnknown(issuer.jwks_url, draft.kid, **source.freshness()._asdict())
        check_signature(token, draft, key, issuer)
        return check_claims(draft, audience=self.audience, now=self.clock.now())


@dataclass(frozen=True, slots=True)
class Behalf:
    """What a process has to act for people. Each part may be missing: whatever needs it then says so."""

    verifier: TokenVerifier | None = None
    grants: GrantStore | None = None
    exchanger: TokenExchanger | None = None
    own: ServiceTokens | None = None

    async def mandate(self, given: object, *, carries: bool) -> tuple[Mandate, SecretToken | None]:
        """What is recorded of a token or a grant handle, and the token that travels.

        A token is verified where there is a verifier. Otherwise what it says is only noted: each step that needs it
        verifies it, and holds a later one against that. Raises InputInvalid, TokenRejected, TokenExpired,
        AuthorityUnavailable.
        """
        if isinstance(given, GrantHandle):
            return Mandate.of(given), None
        if isinstance(given, str):
            given = SecretToken(given)
        if not isinstance(given, SecretToken):
            raise InputInvalid(
                f"a run acts on behalf of whom a token or a GrantHandle says, found {type(given).__name__}"
            )
        if not carries:
            raise InputInvalid(
                "a token can't travel through a database, where its message is a row; hand over a GrantHandle, or use "
                "a message broker as transport_url"
            )
        if self.verifier is not None:
            found = await self.verifier.verify(given)
            return Mandate(found.subject, found.issuer or "", found.scopes), given
        draft = read_token(given)
        subject = draft.claims.get("sub")
        if not isinstance(subject, str) or not subject:
            raise TokenRejected("subject", "it doesn't say for whom it was issued")
        return Mandate(subject, draft.issuer, scopes_in(draft.claims)), given


class _Subject(NamedTuple):
    """A person's token that is valid now, and what it allows. `handle`: the grant that it came for, if it did."""

    token: SecretToken
    found: SecurityContext
    handle: str | None
    is_fresh: bool = True


@dataclass(slots=True, eq=False)
class Acting:
    """An attempt of a step that acts for somebody, or that undoes what was done for them.

    `reload` gives the headers of the run as they are recorded now. `allowed` are the scopes that the activity names.
    """

    behalf: Behalf
    workflow_id: str
    mandate: Mandate | None
    reload: Callable[[], Awaitable[Mapping[str, str]]]
    allowed: tuple[str, ...] = ()
    is_undo: bool = False
    is_renewed: bool = False
    """Whether the mandate is another one than that which came with the message."""
    secrets: list[SecretToken] = field(default_factory=list)
    """The tokens that this attempt has had in its hands: no text that it leaves may have one of them in it."""
    _token: SecretToken | None = None
    _valid: _Subject | None = None
    _spent: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self._token is not None:
            self.secrets.append(self._token)

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers of the next message: with the mandate that holds now, and without a token that is spent."""
        left = {name: text for name, text in headers.items() if name != OBO_TOKEN or self._token is not None}
        return left if self.mandate is None else {**left, MANDATE: self.mandate.dump()}

    async def require(self, place: Place) -> SecurityContext | None:
        """For whom the activity may be called, verified now; raises unless all of its scopes are granted.

        Waits for a fresh grant while there is no valid token. A compensation is the service's own doing: None.
        """
        if self.is_undo:
            if self.behalf.own is None:
                raise ScopeMissing(
                    f"the compensation names scopes, which the service gets as itself, and {_UNSET}"
                )
            return None
        needed = ", ".join(self.allowed)
        if self.mandate is None:
            raise ScopeMissing(
                f"the activity needs the scopes {needed}, and its run acts for nobody; "
                "dispatch it with on_behalf_of="
            )
        # Known without asking anybody: no token can have more than was granted at dispatch.
        self._check(self.mandate.identity, self.mandate.identity.missing(self.allowed))
        found = (await self._subject(place)).found
        self._check(found, found.missing(self.allowed))
        return found

    def _check(self, found: SecurityContext, missing: tuple[str, ...]) -> None:
        if missing:
            raise ScopeMissing(
                f"'{found.subject}' hasn't granted {', '.join(missing)}; the activity needs "
                f"{', '.join(self.allowed)}, granted are {', '.join(found.scopes) or 'none'}"
            )

    async def token(self, place: Place, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        """A fresh token for `audience`, with `scopes` and no others, for one call. See `StepContext.token`."""
        if not isinstance(audience, str) or not audience:
            raise InputInvalid(f"an audience is a non-empty text, found {audience!r}")
        scopes = check_scopes(scopes)
        if not scopes:
            raise InputInvalid("a token is asked for with the scopes that the call needs; name at least one")
        beyond = [scope for scope in scopes if scope not in self.allowed] if self.allowed else []
        if beyond:
            raise ScopeMissing(
                f"{', '.join(beyond)}: not among the scopes that the activity names: {', '.join(self.allowed)}"
            )
        if self.is_undo:
            if self.behalf.own is None:
                raise ConfigurationError(f"{_UNSET}, where the service gets tokens of its own")
            return self._kept(await self.behalf.own.own_token(audience=audience, scopes=scopes))
        if self.mandate is None:
            raise ScopeMissing(
                "the run acts for nobody, so there is no token; dispatch it with on_behalf_of="
            )
        if self.behalf.exchanger is None:
            raise ConfigurationError(f"{_UNSET}, where tokens are exchanged for others")
        while True:
            subject = await self._subject(place)
            missing = subject.found.missing(scopes)
            if missing:
                raise ScopeMissing(
                    f"'{subject.found.subject}' hasn't granted {', '.join(missing)}; granted are "
                    f"{', '.join(subject.found.scopes) or 'none'}"
                )
            try:
                with place.journal.parking.working(object()):
                    token = await self.behalf.exchanger.exchange(
                        subject.token, audience=audience, scopes=scopes
                    )
            except GrantInvalid:
                self._spend(subject)
                continue
            if token == subject.token:
                raise ExchangeRefused(
                    "the server gave the person's own token back, which isn't for others to see"
                )
            return self._kept(token)

    # -- inside

    def _kept(self, token: SecretToken) -> SecretToken:
        self.secrets.append(token)
        return token

    def _spend(self, subject: _Subject) -> None:
        """This is no good any more, though it looked so. Another call may have found that out, and gone on, before."""
        if self._valid is not None and self._valid.token is subject.token:
            self._valid = None
        if subject.handle is None:
            self._token = None
        elif subject.is_fresh:  # else its end may just have come, and the grant gives another one
            self._spent.add(subject.handle)

    async def _subject(self, place: Place) -> _Subject:
        """The person's token and what it allows, valid now. The step is left while there is none."""
        while True:
            try:
                with place.journal.parking.working(object()):
                    found = await self._at_hand()
            except KeyUnknown as exc:
                await self._await_key(place, exc)
                continue
            if found is not None:
                return found
            await self._renew(place)

    async def _at_hand(self) -> _Subject | None:
        """What is valid of what this attempt was given; None when it has nothing more to try."""
        verifier, mandate = self.behalf.verifier, self.mandate
        assert mandate is not None, "who acts for nobody isn't asked"
        if verifier is None:
            raise ConfigurationError(
                "no `token_issuers` and `token_audience` are set, without which no token can be verified"
            )
        known = self._valid
        if known is not None and verifier.clock.now() < (known.found.expires_at or 0.0):
            return known._replace(is_fresh=False)
        token, handle = self._token, mandate.handle
        if token is not None:
            try:
                found = mandate.bound(await verifier.verify(token))
            except TokenExpired:
                self._token = None
            else:
                self._valid = _Subject(token, found, None)
                return self._valid
        if handle is None or handle in self._spent:
            return None
        if self.behalf.grants is None:
            raise ConfigurationError(f"{_UNSET}, or `grant_url`, where a token is had for a grant handle")
        try:
            token = self._kept(await self.behalf.grants.subject_token(handle, workflow_id=self.workflow_id))
            self._valid = _Subject(token, mandate.bound(await verifier.verify(token)), handle)
        except (TokenExpired, GrantInvalid):
            self._spent.add(handle)
            return None
        return self._valid

    async def _await_key(self, place: Place, unknown: KeyUnknown) -> None:
        """Leave the step until there may be news of its token's key. It costs no attempt, for it is nobody's failure.

        The message keeps the token. Raises TokenRejected once the key set has been fetched anew since the step first
        asked for the key, and still lacks it; KeyUnknown when it can't be fetched.
        """
        waited = place.journal.now() - await place.instant(place.spelled(f"key {unknown.kid}"))
        if unknown.is_away:
            raise unknown
        if not unknown.again_in or unknown.age + _CLOCKS_DIFFER < waited:
            raise TokenRejected("key", f"{unknown.url} publishes no key '{unknown.kid[:100]}'")
        await place.sleep(place.name("a new key"), unknown.again_in)

    async def _renew(self, place: Place) -> None:
        """Take up the grant that has come meanwhile, or leave the step until one comes."""
        while True:
            recorded = Mandate.read(await self.reload())
            if recorded is not None and recorded.handle is not None and recorded.handle not in self._spent:
                self.mandate, self.is_renewed = recorded, True
                return
            await place.signal(place.name("grant"), GRANT_SIGNAL, timeout=None, what="a fresh grant")
