"""Runs that act for a person, against a real authorization server: what is checked, and when a step waits."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import ECKey
from pydantic_ai import Agent, RunContext
from pydantic_ai.models.test import TestModel
from tests.integration.workers import working
from tests.observers import Seen
from tests.patience import PATIENCE
from tests.security.authority import Authority
from tests.security.desk import MAIL, flow, settings_of

from paigeant import (
    ActivityRegistry,
    GrantHandle,
    Paigeant,
    PaigeantMessage,
    RoutingSlip,
    RunConflict,
    RunStatus,
    SecretToken,
    Settings,
    Sleep,
    Step,
    StepContext,
    WaitFor,
    Workflow,
)
from paigeant.behalf import Behalf
from paigeant.errors import InputInvalid, InvalidTransition, MessageTooLarge, TokenExpired, TokenRejected
from paigeant.identity import GRANT_SIGNAL, MANDATE, check_claims, read_token
from paigeant.jwks import REFRESH_SECONDS
from paigeant.keyfiles import write_private
from paigeant.keys import Key, KeyRing
from paigeant.secret import OBO_TOKEN
from paigeant.slip import Phase, StepStatus
from paigeant.store import StepKey
from paigeant.testing import ManualClock, MemoryApp


class Office:
    """Activities that note for whom they are called, and the tokens that they get."""

    def __init__(self) -> None:
        self.registry = ActivityRegistry()
        self.seen: list[Any] = []
        self.tokens: list[SecretToken] = []
        self.before: Callable[[], None] = lambda: None
        self.registry.execute()(self.note)
        self.registry.execute(scopes=["mail.read"], retries=0)(self.read)
        self.registry.execute(scopes=["mail.read", "mail.send"], retries=2)(self.send)
        self.registry.execute(retries=0)(self.fail)
        self.registry.compensate("note", scopes=["note.undo"])(self.forget)

    async def note(self, context: StepContext) -> str:
        """Needs nobody."""
        self.seen.append("note")
        return "noted" if context.identity is None else context.identity.subject

    async def forget(self, context: StepContext) -> None:
        """Undo a note, as the service itself."""
        self.tokens.append(await context.token(audience=MAIL, scopes=["note.undo"]))
        self.seen.append("forget")

    async def read(self, context: StepContext) -> list[Any]:
        """Tells who it is called for."""
        found = context.identity
        assert found is not None
        self.seen.append("read")
        return [found.subject, found.scopes, context.attempt]

    async def send(self, context: StepContext) -> str:
        """Calls another service with a token of its own for that."""
        self.before()
        self.seen.append("send")
        self.tokens.append(await context.token(audience=MAIL, scopes=["mail.send"]))
        return "sent"

    async def fail(self) -> None:
        """Turn the run round."""
        raise ValueError("no")


@pytest.fixture
def office() -> Office:
    """An office for a test."""
    return Office()


@pytest.fixture
def watcher() -> Seen:
    """What is told."""
    return Seen()


@pytest.fixture
async def app(
    authority: Authority, office: Office, clock: ManualClock, watcher: Seen
) -> AsyncIterator[MemoryApp]:
    """A service of the authority with a worker."""
    observers = [watcher]
    async with MemoryApp(office.registry, clock=clock, observers=observers, **settings_of(authority)) as app:
        yield app


def grant_of(authority: Authority, *scopes: str, workflow_id: str = "r") -> GrantHandle:
    """A grant of Ann's for a run, kept by the authority."""
    handle = authority.grant("ann", *scopes, workflow_id=workflow_id)
    return GrantHandle(handle, "ann", authority.url, scopes)


async def test_a_step_knows_for_whom_it_acts(app: MemoryApp, authority: Authority) -> None:
    """An activity that names scopes gets the identity of the token; scopes are those of token and dispatch."""
    token = authority.token("ann", "mail.read", "calendar")
    run = await app.dispatch(flow("note", "read"), on_behalf_of=token, workflow_id="r")
    await app.drain()
    result = await run.wait()
    assert result.status is RunStatus.COMPLETED, result.error
    assert result.outputs == {"note": "ann", "read": ["ann", ["mail.read", "calendar"], 1]}
    found = await run.identity()
    assert found is not None
    assert (found.subject, found.issuer, found.scopes) == ("ann", authority.url, ("mail.read", "calendar"))


async def test_without_scopes_nobody_is_asked(app: MemoryApp, authority: Authority) -> None:
    """A run whose activities name no scopes runs without any token, and without a request to anybody."""
    run = await app.dispatch(flow("note"))
    await app.drain()
    assert (await run.wait()).output == "noted"
    assert not authority.asked("/jwks")
    assert not authority.asked("/token")


@pytest.mark.parametrize("steps", [["read"], ["send"]])
async def test_scopes_that_nobody_granted(app: MemoryApp, office: Office, steps: list[str]) -> None:
    """An activity with scopes isn't called in a run that acts for nobody: a permanent failure that says so."""
    run = await app.dispatch(flow(*steps))
    await app.drain()
    result = await run.wait()
    assert result.status is RunStatus.FAILED
    assert "ScopeMissing: the activity needs the scopes mail.read" in str(result.error)
    assert office.seen == []


async def test_a_missing_scope_is_a_permanent_failure(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """The activity isn't called, no further attempt is made, and the error names what is missing and what is there."""
    run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read"))
    await app.drain()
    result = await run.wait()
    assert result.error is not None
    assert "'ann' hasn't granted mail.send; the activity needs mail.read, mail.send" in result.error
    assert office.seen == []
    assert [row.attempt for row in (await run.detail()).steps] == [1]


async def test_a_call_gets_a_token_of_its_own(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """`context.token` exchanges for one audience with fewer scopes; the service is the actor in the new one."""
    run = await app.dispatch(
        flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send", act={"sub": "front"})
    )
    await app.drain()
    assert (await run.wait()).output == "sent"
    found = check_claims(read_token(office.tokens[0]), audience=MAIL, now=clock.now())
    assert (found.subject, found.scopes, found.audience, found.actors) == (
        "ann",
        ("mail.send",),
        (MAIL,),
        ("desk", "front"),
    )


@pytest.mark.parametrize("form", ["token-exchange", "jwt-bearer"])
@pytest.mark.parametrize("proof", ["secret", "key"])
async def test_ways_to_exchange(
    authority: Authority, office: Office, clock: ManualClock, form: str, proof: str
) -> None:
    """Both forms work, with a client's secret and with its key; the first one with a token of the actor as well."""
    settings = {**settings_of(authority), "token_form": form, "token_actor": form == "token-exchange"}
    if proof == "key":
        key = ECKey.generate_key("P-256", private=True)
        authority.clients["desk"] = key
        del settings["client_secret"]
        settings["client_key"] = key.as_pem(private=True).decode()
    async with MemoryApp(office.registry, clock=clock, **settings) as app:
        run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
        await app.drain()
        result = await run.wait()
    assert result.output == "sent", result.error
    asked = authority.asked("/token")[-1].form
    assert asked["grant_type"].endswith(form)
    assert ("actor_token" in asked) is (form == "token-exchange")
    assert ("client_assertion" in asked) is (proof == "key")


async def test_a_long_run_outlives_its_token(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock, watcher: Seen
) -> None:
    """A step whose token has expired waits, with nothing called and no attempt counted, until a fresh one is sent."""
    token = authority.token("ann", "mail.read", lifetime=60)
    workflow = Workflow("flow", [Sleep(3600), "read"])
    run = await app.dispatch(workflow, on_behalf_of=token, workflow_id="r")
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    row = (await run.detail()).steps[-1]
    assert (row.status, row.attempt) == (StepStatus.WAITING, 0)
    waiting = [event for event in watcher.events if event.name == "step.waiting" and event.step == "read"]
    assert [event.more["waits_for"] for event in waiting] == [[GRANT_SIGNAL]]
    assert office.seen == []
    await run.grant(authority.token("ann", "mail.read"))
    await app.drain()
    result = await run.wait()
    assert result.outputs["read"] == ["ann", ["mail.read"], 1]


async def test_a_token_that_expires_in_the_queue(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """A message that waits for longer than its token lasts parks its step: nobody is asked, nothing called."""
    begins = datetime.fromtimestamp(clock.now() + 55, UTC)
    token = authority.token("ann", "mail.read", "mail.send", lifetime=10)
    run = await app.dispatch(flow("send"), on_behalf_of=token, start_at=begins)
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    assert (await run.detail()).steps[0].attempt == 0
    assert office.seen == []
    assert not authority.asked("/token")
    with pytest.raises(InputInvalid, match="doesn't travel before its run is due"):
        await app.dispatch(flow("send"), on_behalf_of=authority.token(), start_at=begins + timedelta(hours=1))


async def test_a_handle_outlives_tokens(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """A run with a grant handle carries no token, and gets a fresh one for each step that needs one."""
    steps: list[str | Step] = ["read", Sleep(86400), "send"]
    grant = grant_of(authority, "mail.read", "mail.send")
    run = await app.dispatch(Workflow("flow", steps), on_behalf_of=grant, workflow_id="r")
    await app.drain()
    result = await run.wait()
    assert result.output == "sent", result.error
    refreshed = [one for one in authority.asked("/token") if one.form["grant_type"] == "refresh_token"]
    assert len(refreshed) == 2


async def test_a_handle_is_bound_to_its_run(app: MemoryApp, authority: Authority, office: Office) -> None:
    """A handle that was left for another run gives nothing: the step waits for a grant of its own."""
    grant = grant_of(authority, "mail.read", workflow_id="another")
    run = await app.dispatch(flow("read"), on_behalf_of=grant, workflow_id="r")
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    assert office.seen == []


async def test_a_fresh_handle_is_kept_for_the_steps_behind(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """After a grant was taken back, another handle wakes the step, and the steps behind it use it at once."""
    run = await app.dispatch(
        flow("read", "send"), on_behalf_of=grant_of(authority, "mail.read", "mail.send"), workflow_id="r"
    )
    authority.grants.clear()
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    fresh = grant_of(authority, "mail.read", "mail.send")
    assert await run.grant(fresh, sender="Ann") in (RunStatus.WAITING, RunStatus.RUNNING)
    await app.drain()
    assert (await run.wait()).output == "sent"
    asked = [one.form["refresh_token"] for one in authority.asked("/token") if "refresh_token" in one.form]
    assert asked[-2:] == [fresh.handle, fresh.handle]
    signals = [(signal.name, signal.value, signal.sender) for signal in (await run.detail()).signals]
    assert signals == [(GRANT_SIGNAL, b"null", "Ann")]


async def test_a_handle_that_comes_early_is_found(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """A handle that came while nobody waited is used by a step whose message still has the old one."""
    workflow = Workflow("flow", [WaitFor("go"), "read"])
    run = await app.dispatch(workflow, on_behalf_of=authority.token("ann", "mail.read"), workflow_id="r")
    await app.drain()
    await run.grant(grant_of(authority, "mail.read"))
    await run.signal("go")
    await app.drain()
    assert (await run.wait()).status is RunStatus.COMPLETED
    assert office.seen == ["read"]


async def test_a_grant_that_is_taken_back_while_the_step_works(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """A refused exchange (invalid_grant) parks the step as an expired token does; a fresh grant lets it go on."""
    token = authority.token("ann", "mail.read", "mail.send")
    office.before = authority.keys.clear  # the authority disowns what it has signed
    run = await app.dispatch(flow("send"), on_behalf_of=token, workflow_id="r")
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    assert (await run.detail()).steps[0].attempt == 0
    office.before = lambda: None
    authority.rotate()
    app.clock.advance(60)
    await run.grant(authority.token("ann", "mail.read", "mail.send"))
    await app.drain()
    assert (await run.wait()).output == "sent"


async def test_calls_beside_each_other(authority: Authority, clock: ManualClock) -> None:
    """Calls that find out together that a token is no good take up the same handle, and none of them spends it."""
    registry = ActivityRegistry()

    @registry.execute(scopes=["mail.send"], retries=0)
    async def three(context: StepContext) -> int:
        authority.keys.clear()  # the authority disowns what it has signed, and signs anew
        authority.rotate()
        clock.advance(61)
        asked = (context.token(audience=MAIL, scopes=["mail.send"]) for _ in range(3))
        return len({token.reveal() for token in await asyncio.gather(*asked)})

    async with MemoryApp(registry, clock=clock, **settings_of(authority)) as app:
        begins = datetime.fromtimestamp(clock.now() + 50, UTC)
        token = authority.token("ann", "mail.send")
        run = await app.dispatch(flow("three"), on_behalf_of=token, workflow_id="r", start_at=begins)
        await run.grant(grant_of(authority, "mail.send"))  # while a message with the token is under way
        await app.drain()
        assert (await run.wait()).output == 3
    refused = [one.form for one in authority.asked("/token") if one.form.get("subject_token") == token]
    assert len(refused) == 3


async def test_the_deadline_ends_the_waiting(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """A run whose grant never comes ends at its deadline, and is undone by the service itself, without its person."""
    token = authority.token("ann", "mail.read", lifetime=60)
    workflow = Workflow("flow", ["note", Sleep(600), "read"], deadline=7200)
    run = await app.dispatch(workflow, on_behalf_of=token)
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    clock.advance(7200)
    await app.drain()
    assert (await run.wait()).status is RunStatus.COMPENSATED
    assert office.seen == ["note", "forget"]
    assert authority.asked("/token")[-1].form["grant_type"] == "client_credentials"


async def test_a_message_from_the_rows_has_no_token(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """What is sent anew from the rows (here for an operator) has no token: the step waits for one, as if expired."""
    authority.widens = ("admin",)
    token = authority.token("ann", "mail.read", "mail.send", lifetime=86400)
    run = await app.dispatch(flow("send"), on_behalf_of=token)
    await app.drain()
    assert await run.status() is RunStatus.FAILED
    authority.widens = ()
    await run.retry()
    await app.drain()
    assert await run.status() is RunStatus.WAITING
    assert office.seen == ["send"]
    await run.grant(token)
    await app.drain()
    assert (await run.wait()).output == "sent"


async def test_a_retry_carries_the_token(app: MemoryApp, authority: Authority, office: Office) -> None:
    """Another attempt by the policy gets the token of the first, which travels with its message."""
    failing = iter([ValueError("once")])

    def fail_once() -> None:
        for error in failing:
            raise error

    office.before = fail_once
    run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
    await app.drain()
    assert (await run.wait()).output == "sent"


@pytest.mark.parametrize("trouble", [500, 503, 429])
async def test_an_authority_that_is_away_costs_attempts(
    app: MemoryApp, authority: Authority, office: Office, trouble: int
) -> None:
    """While the exchange fails for no fault of the token, the step is tried again by its policy."""

    def away() -> None:
        authority.status = trouble if len(office.seen) == 0 else None

    office.before = away
    run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
    await app.drain()
    result = await run.wait()
    assert result.output == "sent", result.error
    assert (await run.detail()).steps[0].attempt == 2


async def test_an_exchange_that_widens_is_refused(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """A token with more scopes than were asked for isn't handed out, and the step fails for good."""
    authority.widens = ("admin",)
    run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
    await app.drain()
    assert "gave a token that can do more than was asked for: admin" in str((await run.wait()).error)
    assert office.tokens == []


async def test_an_exchange_for_another_audience_is_refused(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """A token that is good elsewhere than asked for isn't handed out."""
    authority.audience = "https://elsewhere.example"
    run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
    await app.drain()
    assert "for another audience" in str((await run.wait()).error)
    assert office.tokens == []


async def test_stale_keys_verify_while_the_key_set_is_away(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """Keys that were fetched go on for a day; after that the step fails closed, whatever its token says."""
    token = authority.token("ann", "mail.read", lifetime=1e6)
    run = await app.dispatch(flow("read"), on_behalf_of=token)
    await app.drain()
    assert (await run.wait()).status is RunStatus.COMPLETED
    authority.status = 500
    app.dispatcher.behalf = Behalf()  # so that it is verified where it is executed
    clock.advance(23 * 3600)
    run = await app.dispatch(flow("read"), on_behalf_of=token)
    await app.drain()
    assert (await run.wait()).status is RunStatus.COMPLETED
    clock.advance(3600)
    run = await app.dispatch(flow("read"), on_behalf_of=token)
    await app.drain()
    assert "KeysUnavailable" in str((await run.wait()).error)
    assert office.seen == ["read", "read"]


async def test_a_rotated_key(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """A token signed with a key that was published since verifies."""
    for _ in range(2):
        run = await app.dispatch(flow("read"), on_behalf_of=authority.token("ann", "mail.read"))
        await app.drain()
        assert (await run.wait()).status is RunStatus.COMPLETED
        authority.rotate()
        clock.advance(61)


@pytest.mark.parametrize("travels", [True, False], ids=["token", "handle"])
async def test_a_key_that_is_newer_than_the_key_set(
    app: MemoryApp,
    authority: Authority,
    office: Office,
    clock: ManualClock,
    watcher: Seen,
    travels: bool,
) -> None:
    """Right after a rotation a step waits until the set may be asked for again, and loses no attempt."""
    await verified_once(app, authority)
    authority.rotate()
    app.dispatcher.behalf = Behalf()  # so that the worker is who finds out
    asked = len(authority.asked("/jwks"))
    given = authority.token("ann", "mail.read") if travels else grant_of(authority, "mail.read")
    run = await app.dispatch(flow("read"), on_behalf_of=given, workflow_id="r")
    await app.drain(advance=False)
    assert (await run.detail()).steps[0].status is StepStatus.WAITING
    assert len(authority.asked("/jwks")) == asked, "it was asked less than a minute ago"
    await app.drain()
    assert (await run.wait()).output == ["ann", ["mail.read"], 1]
    assert len(authority.asked("/jwks")) == asked + 1
    assert [event.name for event in watcher.events if event.workflow_id == "r"].count("step.retrying") == 0


async def test_a_key_that_nobody_publishes(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """Once the key set has been fetched anew without the key, the token is no proof: there is no further attempt."""
    await verified_once(app, authority)
    foreign = ECKey.generate_key("P-256", {"use": "sig", "alg": "ES256"}, private=True)
    foreign.ensure_kid()
    token = authority.token("ann", "mail.read", "mail.send", key=foreign)
    app.dispatcher.behalf = Behalf()
    run = await app.dispatch(flow("send"), on_behalf_of=token)
    began = clock.now()
    await app.drain()
    assert "TokenRejected: key: " in str((await run.wait()).error)
    assert (await run.detail()).steps[0].attempt == 1
    assert clock.now() - began < REFRESH_SECONDS + 1
    assert "send" not in office.seen


async def test_an_unknown_key_while_the_key_set_is_away(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """Whether there is such a key can't be told: that is a failure, and tried again by the policy."""
    await verified_once(app, authority)
    authority.rotate()
    authority.status = 500
    app.dispatcher.behalf = Behalf()
    run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
    await app.drain()
    assert "KeyUnknown" in str((await run.wait()).error)
    assert (await run.detail()).steps[0].attempt == 3
    assert "send" not in office.seen


async def verified_once(app: MemoryApp, authority: Authority) -> None:
    """A run has been verified, so that the key set was fetched just now."""
    run = await app.dispatch(flow("read"), on_behalf_of=authority.token("ann", "mail.read"))
    await app.drain()
    assert (await run.wait()).status is RunStatus.COMPLETED


async def test_a_grant_of_somebody_else(app: MemoryApp, authority: Authority) -> None:
    """A run goes on only with a grant of the person for whom it was dispatched."""
    run = await app.dispatch(
        flow("read"), on_behalf_of=grant_of(authority, "mail.read", workflow_id="x"), workflow_id="r"
    )
    await app.drain()
    with pytest.raises(InputInvalid, match="acts for 'ann'"):
        await run.grant(authority.token("eve", "mail.read"))
    with pytest.raises(InputInvalid, match="acts for 'ann'"):
        await run.grant(GrantHandle("h", "eve", authority.url, ("mail.read",)))


async def test_a_grant_that_nobody_takes(app: MemoryApp, authority: Authority) -> None:
    """A token is refused by a run of which no step waits for one, since it isn't kept; a run for nobody takes none."""
    run = await app.dispatch(flow("note"))
    with pytest.raises(InputInvalid, match="acts for nobody"):
        await run.grant(authority.token("ann", "mail.read"))
    run = await app.dispatch(Workflow("w", [WaitFor("go")]), on_behalf_of=authority.token("ann", "mail.read"))
    await app.drain()
    with pytest.raises(InvalidTransition, match=r"no step of run .* waits for a grant"):
        await run.grant(authority.token("ann", "mail.read"))
    with pytest.raises(InputInvalid, match=r"Run\.grant"):
        await run.signal(GRANT_SIGNAL, None)


async def test_an_id_belongs_to_one_person(app: MemoryApp, authority: Authority) -> None:
    """The same dispatch for the same person is the same run, and for another one a conflict."""
    for _ in range(2):
        token = authority.token("ann", "mail.read")
        run = await app.dispatch(flow("read"), on_behalf_of=token, workflow_id="r")
        assert run.id == "r"
    for other in (None, authority.token("eve", "mail.read")):
        with pytest.raises(RunConflict):
            await app.dispatch(flow("read"), on_behalf_of=other, workflow_id="r")


async def test_a_token_from_another_event_loop(authority: Authority, clock: ManualClock) -> None:
    """Code that runs a loop of its own in a thread, as `agent.run_sync` does, gets tokens like any other."""
    registry = ActivityRegistry()

    @registry.execute(scopes=["mail.send"], retries=0)
    def plain(context: StepContext) -> str:
        return str(asyncio.run(context.token(audience=MAIL, scopes=["mail.send"])))

    async with MemoryApp(registry, clock=clock, **settings_of(authority)) as app:
        run = await app.dispatch(flow("plain"), on_behalf_of=authority.token("ann", "mail.send"))
        await app.drain()
        assert (await run.wait()).output == "***"


async def test_what_dispatch_refuses(app: MemoryApp, authority: Authority) -> None:
    """A token that isn't good is refused at dispatch, where it is still known who brought it."""
    with pytest.raises(TokenExpired):
        await app.dispatch(flow("read"), on_behalf_of=authority.token("ann", lifetime=-60))
    with pytest.raises(TokenRejected, match="audience"):
        await app.dispatch(flow("read"), on_behalf_of=authority.token("ann", audience="https://other"))
    with pytest.raises(InputInvalid, match="on_behalf_of= says for whom"):
        await app.dispatch(flow("read"), headers={MANDATE: "{}"})
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJl"
    with pytest.raises(InputInvalid, match="a header holds a token"):
        await app.dispatch(flow("read"), headers={"authorization": f"Bearer {token}"})
    with pytest.raises(InputInvalid, match="a correlation id holds a token"):
        await app.dispatch(flow("read"), correlation_id=token)
    with pytest.raises(InputInvalid, match="a run's id holds a token"):
        await app.dispatch(flow("read"), workflow_id=token)
    with pytest.raises(InputInvalid, match="a token or a GrantHandle"):
        await app.dispatch(flow("read"), on_behalf_of=7)  # type: ignore[arg-type]


def chain(*names: str) -> dict[str, Any]:
    """Actors one behind the other."""
    return {"sub": names[0], **({"act": chain(*names[1:])} if names[1:] else {})}


BAD: dict[str, dict[str, Any]] = {
    "issuer": {"iss": "https://evil.example"},
    "audience": {"aud": "https://other.example"},
    "sender_constrained": {"cnf": {"jkt": "x"}},
    "actors": {"act": chain("a", "b", "c", "d", "e", "f")},
    "not_yet": {"nbf": 4e9},
}


@pytest.mark.parametrize("reason", BAD)
async def test_a_token_that_never_will_be_good(
    app: MemoryApp, authority: Authority, office: Office, reason: str
) -> None:
    """What a dispatcher couldn't check is checked where it is executed: a permanent failure with its reason."""
    app.dispatcher.behalf = Behalf()  # one that trusts nobody, as in another service
    token = authority.token("ann", "mail.read", **BAD[reason])
    run = await app.dispatch(flow("note", "read"), on_behalf_of=token)
    await app.drain()
    result = await run.wait()
    assert f"TokenRejected: {reason}:" in str(result.error)
    assert [row.attempt for row in (await run.detail()).steps if row.step == "read"] == [1]
    assert "read" not in office.seen


async def test_a_token_of_somebody_else_in_the_message(
    app: MemoryApp, authority: Authority, office: Office
) -> None:
    """A good token of another person than the run acts for, put into its message, is refused for good."""
    run = await app.dispatch(flow("read"), on_behalf_of=grant_of(authority, "mail.read", workflow_id="x"))
    await app.drain()
    keys = await app.store.record_grant(run.id)
    await app.forwarder.send_again(keys, token=SecretToken(authority.token("eve", "mail.read")))
    await app.drain()
    assert "TokenRejected: subject: " in str((await run.wait()).error)
    assert office.seen == []


async def test_a_later_token_widens_nothing(app: MemoryApp, authority: Authority, office: Office) -> None:
    """Scopes of a token beyond those that were granted at dispatch don't count."""
    token = authority.token("ann", "mail.read", lifetime=60)
    run = await app.dispatch(Workflow("w", [Sleep(600), "read", "send"]), on_behalf_of=token)
    await app.drain()
    await run.grant(authority.token("ann", "mail.read", "mail.send", "admin"))
    await app.drain()
    result = await run.wait()
    assert result.outputs["read"] == ["ann", ["mail.read"], 1]
    assert "hasn't granted mail.send" in str(result.error)


async def test_a_token_inside_of_what_is_recorded(authority: Authority, clock: ManualClock) -> None:
    """What `once` does may use a token; the record has its result alone, and a further attempt asks for none."""
    registry = ActivityRegistry()
    tokens: list[SecretToken] = []

    @registry.execute(scopes=["mail.send"], retries=1)
    async def mail(context: StepContext) -> str:
        async def call() -> str:
            tokens.append(await context.token(audience=MAIL, scopes=["mail.send"]))
            return "called"

        done = await context.once("call", call)
        if context.attempt == 1:
            raise ValueError("after the call")
        return str(done)

    async with MemoryApp(registry, clock=clock, **settings_of(authority)) as app:
        run = await app.dispatch(flow("mail"), on_behalf_of=authority.token("ann", "mail.send"))
        await app.drain()
        assert (await run.wait()).output == "called"
        units = await app.store.load_units((await run.detail()).steps[0].key)
    assert len(tokens) == 1
    assert units == {"call": b'"called"'}


async def test_a_token_as_an_output_is_refused(authority: Authority, clock: ManualClock) -> None:
    """An activity that leaves a token in anything that is recorded fails, and none of it is."""
    registry = ActivityRegistry()

    @registry.execute(scopes=["mail.send"], retries=0)
    async def whole(context: StepContext) -> Any:
        return await context.token(audience=MAIL, scopes=["mail.send"])

    @registry.execute(scopes=["mail.send"], retries=0)
    async def text(context: StepContext) -> str:
        return (await context.token(audience=MAIL, scopes=["mail.send"])).reveal()

    @registry.execute(scopes=["mail.send"], retries=0)
    async def variable(context: StepContext) -> None:
        token = await context.token(audience=MAIL, scopes=["mail.send"])
        await context.save_variable("kept", {"a": [token.reveal()]})

    @registry.execute(scopes=["mail.send"], retries=0)
    async def unit(context: StepContext) -> None:
        async def call() -> str:
            return (await context.token(audience=MAIL, scopes=["mail.send"])).reveal()

        await context.once("call", call)

    @registry.execute(scopes=["mail.send"], retries=0)
    async def question(context: StepContext) -> None:
        token = await context.token(audience=MAIL, scopes=["mail.send"])
        await context.ask("Is it good?", about=token.reveal())

    @registry.execute(scopes=["mail.send"], retries=0)
    async def step(context: StepContext) -> None:
        token = await context.token(audience=MAIL, scopes=["mail.send"])
        context.append(Step("whole", args={"a": token.reveal()}))

    @registry.execute(scopes=["mail.send"], retries=0)
    async def condition(context: StepContext) -> None:
        token = await context.token(audience=MAIL, scopes=["mail.send"])
        context.append(Step("whole", when=f"sent == '{token.reveal()}'"))

    @registry.execute(scopes=["mail.send"], retries=0)
    async def raw(context: StepContext) -> bytes:
        token = await context.token(audience=MAIL, scopes=["mail.send"])
        return f"GET / HTTP/1.1\r\nAuthorization: Bearer {token.reveal()}\r\n".encode()

    @registry.execute(scopes=["mail.send"], retries=0)
    async def asked(context: StepContext) -> None:
        token = await context.token(audience=MAIL, scopes=["mail.send"])
        await context.ask(f"Is {token.reveal()} good?")

    async with MemoryApp(registry, clock=clock, **settings_of(authority)) as app:
        for name in ("whole", "text", "variable", "unit", "question", "asked", "step", "condition", "raw"):
            run = await app.dispatch(flow(name), on_behalf_of=authority.token("ann", "mail.send"))
            await app.drain()
            assert "OutputInvalid" in str((await run.wait()).error), name
            assert "eyJ" not in str(await run.detail())
            assert "eyJ" not in str(await app.store.load_units((await run.detail()).steps[0].key))
            assert not await run.requests(only_open=False)


class Opaque:
    """Exchanges for tokens that only their receiver can read, of few letters as some servers have them."""

    TEXT = "at/9q+Zk3vR=="

    async def exchange(self, subject: SecretToken, *, audience: str, scopes: tuple[str, ...]) -> SecretToken:
        """The same for all."""
        return SecretToken(self.TEXT)


async def test_a_token_as_a_name_is_refused(authority: Authority, clock: ManualClock) -> None:
    """One may be so short that it fits into a name, under which other things are recorded."""
    registry = ActivityRegistry()

    async def named(how: str, context: StepContext) -> None:
        token = (await context.token(audience=MAIL, scopes=["mail.send"])).reveal()
        match how:
            case "variable":
                await context.save_variable(f"for {token}", 1)
            case "unit":
                await context.once(token, str)
            case "signal":
                await context.wait_for(token, timeout=5.0)
            case "step":
                context.append(Step("named", id=f"named-{token}", args={"how": "none"}))
            case "question":
                await context.ask(f"Is {token} good?")

    registry.execute(scopes=["mail.send"], retries=0)(named)
    app = MemoryApp(registry, clock=clock, **settings_of(authority))
    app.behalf = replace(app.behalf, exchanger=Opaque())
    async with app:
        for how in ("variable", "unit", "signal", "step", "question"):
            run = await app.dispatch(
                flow("named"), {"how": how}, on_behalf_of=authority.token("ann", "mail.send")
            )
            await app.drain()
            assert "OutputInvalid" in str((await run.wait()).error), how
            units = await app.store.load_units((await run.detail()).steps[0].key)
            assert "9q+Zk3vR" not in f"{await run.detail()}{units}"
            assert not await run.requests(only_open=False)


async def test_the_reason_of_a_cancel_is_kept_like_an_error(app: MemoryApp, watcher: Seen) -> None:
    """It is often the text of one, and becomes the run's."""
    run = await app.dispatch(Workflow("w", [WaitFor("word", id="wait")]), workflow_id="r")
    await app.drain()
    await run.cancel("401 for Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2ln, password=hush\0")
    assert (await run.detail()).run.error == "401 for Bearer ***, password=***"
    assert "hush" not in repr(watcher.events)


async def test_a_compensation_is_the_service_itself(
    app: MemoryApp, authority: Authority, office: Office, clock: ManualClock
) -> None:
    """It needs nobody's token, and gets one of the service's own."""
    run = await app.dispatch(flow("note", "fail"), on_behalf_of=authority.token("ann", "mail.read"))
    await app.drain()
    assert (await run.wait()).status is RunStatus.COMPENSATED
    found = check_claims(read_token(office.tokens[0]), audience=MAIL, now=clock.now())
    assert (found.subject, found.scopes) == ("desk", ("note.undo",))


@pytest.mark.parametrize("signing", [None, "require"])
async def test_a_dispatch_that_fails_shows_no_token(
    authority: Authority, office: Office, clock: ManualClock, signing: str | None
) -> None:
    """Not in a traceback with the values of all variables, such as services for errors record."""
    write_private(Path("paigeant-keys.json"), KeyRing((Key.generate(now=1.0),)).as_dict())
    settings = {**settings_of(authority), "signing": signing, "max_message_bytes": 1024}
    token = SecretToken(authority.token("ann", "mail.read"))
    workflow = Workflow("flow", [Step("read", id=f"read-{number}") for number in range(50)])
    async with MemoryApp(office.registry, clock=clock, **settings) as app:
        with pytest.raises(MessageTooLarge) as caught:
            await app.dispatch(workflow, on_behalf_of=token)
    found = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = "".join(str(frame.locals) for frame in found.stack)
    assert "read-49" in shown, "values are shown"
    assert token.reveal()[-20:] not in shown


async def test_what_is_to_be_undone_carries_no_token(
    authority: Authority, office: Office, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service undoes things as itself, perhaps elsewhere: nobody there needs to see the person's token."""
    sent: list[tuple[Phase, bool]] = []
    async with MemoryApp(office.registry, clock=clock, local_steps=1, **settings_of(authority)) as app:
        publish = app.transport.publish

        async def watched(topic: str, message: PaigeantMessage, *, delay: float = 0.0) -> None:
            sent.append((message.phase, OBO_TOKEN in message.headers))
            await publish(topic, message, delay=delay)

        monkeypatch.setattr(app.transport, "publish", watched)
        run = await app.dispatch(flow("note", "fail"), on_behalf_of=authority.token("ann", "mail.read"))
        await app.drain()
        assert (await run.wait()).status is RunStatus.COMPENSATED
    assert sent == [(Phase.DO, True), (Phase.DO, True), (Phase.UNDO, False)]


async def test_a_compensation_without_a_token_url(office: Office, clock: ManualClock) -> None:
    """One that names scopes fails for good where the service can't get tokens of its own; it isn't called."""
    async with MemoryApp(office.registry, clock=clock) as app:
        run = await app.dispatch(flow("note", "fail"))
        await app.drain()
        assert (await run.wait()).status is RunStatus.COMPENSATION_FAILED
    assert office.seen == ["note"]


@pytest.mark.parametrize("missing", ["token_url", "token_issuers"])
async def test_what_isn_t_set_is_named(
    authority: Authority, office: Office, clock: ManualClock, missing: str
) -> None:
    """A worker that lacks a setting says which, instead of acting without a check."""
    known = settings_of(authority)
    for name in ("token_issuers", "token_audience") if missing == "token_issuers" else ("token_url",):
        del known[name]
    async with MemoryApp(office.registry, clock=clock, **known) as app:
        run = await app.dispatch(flow("send"), on_behalf_of=authority.token("ann", "mail.read", "mail.send"))
        await app.drain()
        assert missing in str((await run.wait()).error)
    assert office.tokens == []


async def test_an_agent_with_scopes(authority: Authority, clock: ManualClock) -> None:
    """An agent's step is begun only with a token that has its scopes."""
    registry = ActivityRegistry()
    agent = Agent(TestModel(custom_output_text="done"), name="clerk")
    registry.agent(agent, prompt="Go", scopes=["mail.read"])
    async with MemoryApp(registry, clock=clock, retries=0, **settings_of(authority)) as app:
        for scope, status in (("mail.read", RunStatus.COMPLETED), ("mail.send", RunStatus.FAILED)):
            run = await app.dispatch(flow("clerk"), on_behalf_of=authority.token("ann", scope))
            await app.drain()
            assert (await run.wait()).status is status


async def test_a_conversation_with_a_token_is_refused(authority: Authority, clock: ManualClock) -> None:
    """Nor is a token kept in the messages of an agent, for a step that may continue them."""
    registry = ActivityRegistry()
    agent = Agent(TestModel(custom_output_text="done"), name="clerk", deps_type=StepContext)

    @agent.tool(metadata={"paigeant": {"inline": True}})
    async def show(ctx: RunContext[StepContext]) -> str:
        return (await ctx.deps.token(audience=MAIL, scopes=["mail.send"])).reveal()

    def deps(context: StepContext) -> StepContext:
        return context

    registry.agent(agent, prompt="Go", scopes=["mail.send"], deps=deps)

    @registry.execute()
    async def after() -> None: ...

    async with MemoryApp(registry, clock=clock, retries=0, **settings_of(authority)) as app:
        run = await app.dispatch(
            flow("clerk", "after"), on_behalf_of=authority.token("ann", "mail.send"), workflow_id="r"
        )
        await app.drain()
        assert "OutputInvalid: the conversation holds a token" in str((await run.wait()).error)
        assert "eyJ" not in str(await app.store.load_units(StepKey("r", "clerk")))


async def test_what_may_be_done_once_at_most_fails_with_a_token(
    authority: Authority, clock: ManualClock
) -> None:
    """The person who decides reads how it failed, without the token that it was called with."""
    registry = ActivityRegistry()
    agent = Agent(TestModel(), name="clerk", deps_type=StepContext)

    @agent.tool(metadata={"paigeant": {"at_most_once": True}})
    async def mail(ctx: RunContext[StepContext]) -> str:
        token = await ctx.deps.token(audience=MAIL, scopes=["mail.send"])
        raise ConnectionError(f"no answer to {token.reveal()}")

    def deps(context: StepContext) -> StepContext:
        return context

    registry.agent(agent, prompt="Go", scopes=["mail.send"], deps=deps)
    async with MemoryApp(registry, clock=clock, retries=0, **settings_of(authority)) as app:
        run = await app.dispatch(
            flow("clerk"), on_behalf_of=authority.token("ann", "mail.send"), workflow_id="r"
        )
        await app.drain()
        [request] = await run.requests()
        assert b"it failed: ConnectionError: no answer to ***" in request.asked
        assert "eyJ" not in str(await app.store.load_units(StepKey("r", "clerk")))


async def test_a_token_never_enters_a_database(authority: Authority, office: Office) -> None:
    """Where messages are rows, a token is refused at dispatch and in a grant, and left out of a message on its way."""
    authority.now = time.time
    settings = Settings(**settings_of(authority), retries=0)
    async with Paigeant(settings, activities=office.registry) as app:
        with pytest.raises(InputInvalid, match="can't travel through a database"):
            await app.dispatch(flow("read"), on_behalf_of=authority.token("ann", "mail.read"))
        run = await app.dispatch(flow("read"), on_behalf_of=grant_of(authority, "mail.read"), workflow_id="r")
        with pytest.raises(InputInvalid, match="can't travel through a database"):
            await run.grant(authority.token("ann", "mail.read"))
        message = PaigeantMessage("m", "r", RoutingSlip(), headers={"obo_token": "secret"})
        assert app.forwarder.letter(message, "read", epoch=0).message.headers == {}
        async with working(app.worker()):
            assert (await run.wait(PATIENCE)).output == ["ann", ["mail.read"], 1]
