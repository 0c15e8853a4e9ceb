"""Paigeant: opens what the settings name, hands out a dispatcher's and a worker's work; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from paigeant.activity import ActivityRegistry
from paigeant.authority import GrantStore, ServiceTokens, TokenExchanger
from paigeant.behalf import Behalf, TokenVerifier
from paigeant.claim import Limits
from paigeant.clock import Clock, SystemClock, is_duration
from paigeant.control import Control
from paigeant.database import Database
from paigeant.dispatcher import Dispatcher
from paigeant.envelope import Envelope, PlainEnvelope
from paigeant.errors import ConfigurationError, InputInvalid, InvalidDefinition, UnknownWorkflow
from paigeant.exchange import (
    ClientAuthentication,
    ClientSecret,
    HandleGrants,
    JwtBearer,
    OwnTokens,
    PrivateKeyJwt,
    TokenEndpoint,
    TokenExchange,
)
from paigeant.forwarder import Forwarder
from paigeant.identity import GrantHandle
from paigeant.jwks import Jwks
from paigeant.observer import Event, LogLine, Observer, Observers
from paigeant.redaction import Redactor, redacted
from paigeant.retention import delete_all
from paigeant.run import Run
from paigeant.secret import SecretToken
from paigeant.settings import Settings
from paigeant.slip import RunStatus
from paigeant.store import DeadLetter, Request, Store
from paigeant.stores import open_store
from paigeant.transport import Transport
from paigeant.transports import open_transport
from paigeant.transports.routed import Route, RoutedTransport
from paigeant.urls import without_password
from paigeant.worker import ActivityWorker
from paigeant.workflow import Workflow

if TYPE_CHECKING:
    from paigeant.observers.logs.sql import SqlLog

__all__ = ["Paigeant"]

_OWN_LOG = logging.getLogger("paigeant")
_OWN_LOG.addHandler(logging.NullHandler())


class Paigeant:
    """An application's connection to its store and transport. Use it as an async context manager.

    Leaving it stops those of its workers that still run: after their `shutdown_grace`, or at once after an error.
    `activities` and `workflows` are what this process knows: to check dispatches early, and to dispatch by name.
    `observers` are told what happens here. `grants`, `exchanger` and `service_tokens` take the place of what the
    settings name. `clock` and `chance` are for tests.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        activities: ActivityRegistry | Iterable[ActivityRegistry] = (),
        workflows: Iterable[Workflow] = (),
        observers: Iterable[Observer] = (),
        clock: Clock | None = None,
        chance: Callable[[], float] = random.random,
        grants: GrantStore | None = None,
        exchanger: TokenExchanger | None = None,
        service_tokens: ServiceTokens | None = None,
    ) -> None:
        self.settings = settings or Settings()
        behalf = behalf_of(self.settings, clock)
        self.behalf = Behalf(
            behalf.verifier,
            grants or behalf.grants,
            exchanger or behalf.exchanger,
            service_tokens or behalf.own,
        )
        registries = [activities] if isinstance(activities, ActivityRegistry) else list(activities)
        self.activities = ActivityRegistry.merged(registries)
        self.workflows = self.settings.defined_workflows()
        for workflow in workflows:
            self.workflows[workflow.name] = workflow
        self._chance = chance
        envelope = envelope_of(self.settings, clock)
        self.store, self.transport = _open(self.settings, clock, envelope)
        self._workers: weakref.WeakSet[ActivityWorker] = weakref.WeakSet()
        self._logs = _logs_of(self.settings, self.store)
        self.observers = Observers([*observers, *([self._logs] if self._logs is not None else ())])
        self.transport.bury_with(self._bury)
        self.forwarder = Forwarder(
            self.store,
            self.transport,
            self.activities,
            envelope=envelope,
            inline_bytes=self.settings.inline_bytes,
            elsewhere=_elsewhere(self.transport),
        )
        self.dispatcher = Dispatcher(
            self.store,
            self.forwarder,
            self.activities,
            observers=self.observers,
            strict=self.settings.strict,
            behalf=self.behalf,
        )
        self.control = Control(self.store, self.forwarder, observers=self.observers, behalf=self.behalf)

    async def _bury(self, letter: DeadLetter) -> None:
        letter = replace(letter, detail=redacted(letter.detail))
        await self.store.bury(letter)
        self.observers.observe(
            Event(
                "delivery.rejected",
                letter.workflow_id or "",
                step=letter.step or "",
                error=letter.detail,
                more={"reason": letter.reason, "topic": letter.topic},
            )
        )

    async def __aenter__(self) -> Self:
        await self.store.connect()
        try:
            await self.transport.connect()
        except BaseException:
            await self.store.close()
            raise
        if self._logs is not None:
            self._logs.start()
            if self.log_handler is not None:
                _OWN_LOG.addHandler(self.log_handler)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # One that nobody has stopped would go on against a closed store. After an error no step is waited for.
            grace = None if kind is None else 0.0
            await asyncio.gather(*(worker.stop(grace) for worker in self._workers))
        finally:
            await self._close()

    async def _close(self) -> None:
        async with contextlib.AsyncExitStack() as end:  # whatever becomes of those before, each of them
            end.push_async_callback(self.store.close)
            if self._logs is not None:
                end.push_async_callback(asyncio.to_thread, self._logs.stop)
            if self.log_handler is not None:
                end.callback(_OWN_LOG.removeHandler, self.log_handler)
            await self.transport.close()

    async def dispatch(
        self,
        workflow: Workflow | str,
        input: Any = None,
        *,
        workflow_id: str | None = None,
        correlation_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        start_at: datetime | None = None,
        deadline: float | None = None,
        on_behalf_of: SecretToken | str | GrantHandle | None = None,
    ) -> Run:
        """Start a run of `workflow` (or of the one of that name); returns once its start is durable.

        Its first step is done at `start_at` (an aware datetime) at the earliest. `deadline` is the time in seconds that
        the run may take from then on, instead of the workflow's own.

        `on_behalf_of` says for whom the run acts: an access token of a person, which travels with its messages and is
        recorded nowhere, or the handle of a grant that a broker keeps, from which long runs get fresh tokens.

        Dispatching the same `workflow_id` with the same input again gives the same run; with another input it raises
        RunConflict. See `Dispatcher.dispatch` for what else it raises.
        """
        if isinstance(workflow, str):
            if workflow not in self.workflows:
                raise UnknownWorkflow(workflow, self.workflows)
            workflow = self.workflows[workflow]
        elif not isinstance(workflow, Workflow):
            raise InvalidDefinition(f"dispatch takes a Workflow or the name of one, found {workflow!r}")
        run_id = await self.dispatcher.dispatch(
            workflow,
            input,
            workflow_id=workflow_id,
            correlation_id=correlation_id,
            headers=headers,
            start_at=start_at,
            deadline=deadline,
            on_behalf_of=on_behalf_of,
        )
        return Run(self.control, run_id)

    def run(self, workflow_id: str) -> Run:
        """The run of this id; whether there is one is found out when it is asked something."""
        return Run(self.control, workflow_id)

    async def requests(self, *, only_open: bool = True, limit: int = 100) -> list[Request]:
        """What runs ask of people, the oldest first. `only_open`: what still waits for an answer."""
        return await self.store.list_requests(only_open=only_open, limit=limit)

    async def answer(self, request_id: str, value: Any, *, sender: str = "") -> Request:
        """Answer a request, once: the run that has asked goes on. See `Control.answer` for values and errors."""
        return await self.control.answer(request_id, value, sender=sender)

    async def approve(self, request_id: str, *, sender: str = "") -> Request:
        """Approve of what a request asks for. Raises what `answer` raises, InputInvalid for what is no approval."""
        return await self.control.approve(request_id, sender=sender)

    async def deny(self, request_id: str, reason: str = "", *, sender: str = "") -> Request:
        """Say no to what a request asks for; whoever asked gets the reason. Raises what `answer` raises."""
        return await self.control.deny(request_id, reason, sender=sender)

    async def prune(self, *, older_than: float, statuses: Collection[RunStatus | str] | None = None) -> int:
        """Delete the runs that ended more than `older_than` seconds ago, with all that belongs to them.

        Log lines and dead letters of before then that belong to no run go, too. Gives how many runs. `statuses` limits
        it to runs that ended so; an open run is never deleted. It goes by short transactions, so that workers go on
        meanwhile; when it is cut short, what it deleted so far is gone. Raises InputInvalid for what is no age or
        no state.
        """
        if older_than != 0 and not is_duration(older_than):
            raise InputInvalid(
                f"older_than is in seconds, 0 or more and below 100 years, found {older_than!r}"
            )
        wanted = None if statuses is None else _states(statuses)
        before = await self.store.now() - older_than
        if (database := _database_of(self.store)) is not None:
            from paigeant.observers.logs.sql import prune_lines

            await prune_lines(database, before)
        pruned = await delete_all(
            lambda limit: self.store.prune_runs(before=before, statuses=wanted, limit=limit)
        )
        await delete_all(lambda limit: self.store.prune_stray_letters(before=before, limit=limit))
        return pruned

    async def logs(
        self,
        workflow_id: str | None = None,
        *,
        level: str = "debug",
        step: str | None = None,
        since: datetime | None = None,
        after: int | None = None,
        limit: int = 1000,
    ) -> list[LogLine]:
        """The newest log lines that fit, in the order of what happened: of a run, of a level or above, of a step.

        `since`: from this instant on. `after`: not the newest, but those that were written after the line with this id,
        in the order in which they were, up to `limit` of them. Empty where nobody has recorded any, see the setting
        `log_sql`. Raises ConfigurationError for what is no level, InputInvalid for an instant without a time zone.
        """
        if isinstance(since, datetime) and since.tzinfo is None:
            raise InputInvalid(f"since is a datetime with a time zone, found {since!r}")
        database = _database_of(self.store)
        if database is None:
            return []
        from paigeant.observers.logs.sql import latest_lines, lines_after

        instant = None if since is None else since.timestamp()
        if after is not None:
            return await lines_after(
                database, after, workflow_id=workflow_id, level=level, step=step, since=instant, limit=limit
            )
        return await latest_lines(
            database, workflow_id=workflow_id, level=level, step=step, since=instant, limit=limit
        )

    @property
    def log_handler(self) -> logging.Handler | None:
        """Hands what is logged through `logging` on to the store, see the setting `log_sql`; None where that is off.

        While the application is open Paigeant's own loggers have it, `StepContext.log` among them. Give it to the root
        logger, or to one of yours, to have those lines recorded as well.
        """
        return None if self._logs is None else self._log_handler

    @cached_property
    def _log_handler(self) -> logging.Handler:
        from paigeant.observers.logs import LogHandler

        assert self._logs is not None
        return LogHandler([self._logs], Redactor(self.settings.urls))

    def worker(
        self,
        *activities: ActivityRegistry,
        concurrency: int | None = None,
        topics: Collection[str] | None = None,
    ) -> ActivityWorker:
        """A worker for these registries, or the application's. Raises InvalidDefinition for what can't work."""
        registry = ActivityRegistry.merged(activities) if activities else self.activities
        self.activities.adopt(registry)
        settings = self.settings
        worker = ActivityWorker(
            self.store,
            self.transport,
            registry,
            self.forwarder,
            concurrency=settings.concurrency if concurrency is None else concurrency,
            topics=topics,
            adopts=settings.adopt,
            lease=settings.lease,
            heartbeat=settings.heartbeat,
            sweep_interval=settings.sweep_interval,
            shutdown_grace=settings.shutdown_grace,
            limits=Limits(
                retry=settings.retry_policy(),
                timeout=settings.timeout,
                local_steps=settings.local_steps,
                inline_bytes=settings.inline_bytes,
                persist=settings.lease,
            ),
            observers=self.observers,
            chance=self._chance,
            behalf=self.behalf,
        )
        self._workers.add(worker)
        return worker


def _states(statuses: Collection[RunStatus | str]) -> set[RunStatus]:
    known = [status.value for status in RunStatus]
    if isinstance(statuses, str) or not set(statuses) <= set(known):
        raise InputInvalid(f"statuses are some of {', '.join(known)}, found {statuses!r}")
    return {RunStatus(status) for status in statuses}


def store_of(settings: Settings, clock: Clock | None = None) -> Store:
    """The store that the settings name, yet to be connected."""
    return open_store(
        settings.store_url, clock=clock, grace=settings.grace, inline_bytes=settings.inline_bytes
    )


def envelope_of(settings: Settings, clock: Clock | None = None) -> Envelope:
    """How the settings have messages sealed. Raises ConfigurationError for keys that can't be read."""
    settings.check_exposure()
    if settings.signing in (None, "off"):
        # Not set, it is off because no message leaves this host: `check_exposure` would have raised.
        return PlainEnvelope(settings.max_message_bytes, is_local=settings.signing is None)
    from paigeant.keyfiles import FileKeys  # here, because few processes sign
    from paigeant.signing import SignedEnvelope

    now = (clock or SystemClock()).now
    return SignedEnvelope(
        FileKeys.of(settings.key_ring(), settings.trusted(), clock=now),
        deployment=settings.deployment,
        requires=settings.signing == "require",
        lifetime=settings.message_lifetime,
        clock=now,
        limit_bytes=settings.max_message_bytes,
    )


def _logs_of(settings: Settings, store: Store) -> SqlLog | None:
    if settings.log_sql == "off":
        return None
    database = _database_of(store)
    if database is None:
        raise ConfigurationError(
            f"log_sql is {settings.log_sql}, and store_url is memory://, which keeps no log lines; "
            "expected a database, or log_sql: off"
        )
    from paigeant.observers.logs.sql import SqlLog

    return SqlLog(database, level=settings.log_sql, redactor=Redactor(settings.urls))


def _database_of(store: Store) -> Database | None:
    return getattr(store, "database", None)


def transport_of(
    settings: Settings,
    url: str,
    clock: Clock | None = None,
    *,
    envelope: Envelope | None = None,
    database: Database | None = None,
) -> Transport:
    """The transport at `url`, one of those that the settings name, yet to be connected."""
    return open_transport(
        url,
        database=database,
        clock=clock,
        envelope=envelope,
        namespace=settings.namespace,
        queue_type=settings.rabbitmq_queue_type,
    )


def behalf_of(settings: Settings, clock: Clock | None = None) -> Behalf:
    """What the settings say of acting on behalf of people; nothing is asked of anybody yet."""
    verifier = None
    if settings.token_issuers and settings.token_audience is not None:
        issuers = settings.issuers()
        keys = {name: Jwks(issuer.jwks_url, clock=clock) for name, issuer in issuers.items()}
        verifier = TokenVerifier(issuers, keys, settings.token_audience, clock or SystemClock())
    client = _client(settings, clock)
    if client is None or settings.token_url is None:
        return Behalf(verifier)
    endpoint = TokenEndpoint(settings.token_url, client)
    own = OwnTokens(endpoint)
    exchanger: TokenExchanger
    if settings.token_form == "jwt-bearer":
        exchanger = JwtBearer(endpoint)
    else:
        exchanger = TokenExchange(
            endpoint, actor=own.actor(settings.token_audience) if settings.token_actor else None
        )
    grants = HandleGrants(
        endpoint if settings.grant_url is None else TokenEndpoint(settings.grant_url, client)
    )
    return Behalf(verifier, grants, exchanger, own)


def _client(settings: Settings, clock: Clock | None) -> ClientAuthentication | None:
    if settings.client_id is None:
        return None
    if settings.client_key is not None:
        key = settings.client_key.get_secret_value()
        return PrivateKeyJwt(settings.client_id, key, settings.client_key_algorithm, clock or SystemClock())
    if settings.client_secret is not None:
        return ClientSecret(settings.client_id, SecretToken(settings.client_secret.get_secret_value()))
    return None


def _open(settings: Settings, clock: Clock | None, envelope: Envelope) -> tuple[Store, Transport]:
    """The store and the transport; one database for both where both URLs name it."""
    store = store_of(settings, clock)
    database = _database_of(store)

    def transport(url: str) -> Transport:
        shared = database if url == settings.store_url else None
        return transport_of(settings, url, clock, envelope=envelope, database=shared)

    own = transport(settings.transport_url)
    if own.joins(store):
        store.publish_with(own)
    if not settings.routes:
        return store, own
    others = {
        url: Route(without_password(url), transport(url))
        for url in settings.routes.values()
        if url != settings.transport_url
    }
    return store, RoutedTransport(own, {pattern: others.get(url) for pattern, url in settings.routes.items()})


def _elsewhere(transport: Transport) -> Callable[[str], bool]:
    if isinstance(transport, RoutedTransport):
        return lambda topic: transport.route(topic) is not None
    return lambda topic: False
