"""A Postgres database with its own clock and faults: what is lost, blocked, stopped or cut off changes nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvloop
from sqlalchemy import text
from tests.integration.postgres_tables import database_with_tables, make_tables
from tests.integration.workers import working
from tests.patience import PATIENCE
from tests.services import PostgresServer, free_port
from tests.services.certificates import CertificateAuthority
from tests.services.postgres import give_away
from tests.services.proxy import Direction, Proxy
from tests.services.server import temporary_folder

from paigeant import ActivityRegistry, Paigeant, Settings, StepContext, Workflow, ledger
from paigeant.database import ENDED
from paigeant.databases.postgres import PostgresDatabase, session
from paigeant.databases.postgres import database as postgres
from paigeant.databases.postgres.bell import PostgresBell
from paigeant.databases.postgres.pipeline import Pipeline, ServerClock
from paigeant.errors import ConfigurationError, RunConflict, RunNotFound, SchemaMismatch, StoreUnavailable
from paigeant.green import elsewhere
from paigeant.heads import foreseen_heads
from paigeant.lane import Later, Tx
from paigeant.ledger import Head
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    Recorded,
    Refused,
    StepKey,
    StepResult,
    WorkerRecord,
)
from paigeant.stores.sql import SqlStore
from paigeant.table_transport import _Fetch
from paigeant.testing.conformance.bench import due, run
from paigeant.transports.postgres import PostgresTransport

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[SqlStore]:
    """A store on the database, by the server's clock."""
    store = SqlStore(PostgresDatabase(url), **options)
    await store.connect()
    try:
        yield store
    finally:
        await store.close()


async def claimed(store: SqlStore, run_id: str) -> StepResult:
    """A run is started and its step claimed; gives the result that ends it."""
    key = StepKey(run_id, "a")
    await store.record_workflow_start(run(run_id, "a"), NextStep(key, "a", "a"))
    grant = await store.claim_step(ClaimRequest(key, "w", 9))
    assert isinstance(grant, Grant)
    return StepResult(
        key, "w", grant.epoch, grant.attempt, StepStatus.COMPLETED, run=RunStatus.COMPLETED, output=b"1"
    )


def database_of(app: Paigeant) -> PostgresDatabase:
    """That of its store."""
    assert isinstance(app.store, SqlStore)
    assert isinstance(app.store.database, PostgresDatabase)
    return app.store.database


@asynccontextmanager
async def apart(url: str) -> AsyncIterator[tuple[Paigeant, Paigeant]]:
    """Two applications on one database; the first has a worker for `work`, which adds one to `n`."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work(n: int) -> int:
        return n + 1

    settings = Settings(transport_url=url, store_url=url)
    async with (
        Paigeant(settings, activities=activity) as here,
        Paigeant(settings) as there,
        working(here.worker()),
    ):
        yield here, there


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110  # for what tells nobody
            await asyncio.sleep(0.01)


# -- round trips


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has an entry for each time that somebody waits for the server: not for what is settled afterwards."""
    found: list[str] = []
    wait = Pipeline.sync

    def counted(pipeline: Pipeline) -> None:
        if (caller := sys._getframe(1).f_code.co_name) != "settle":
            found.append(caller)
        wait(pipeline)

    monkeypatch.setattr(Pipeline, "sync", counted)
    return found


async def test_a_run_takes_one_round_trip_for_each_transaction(
    postgres_tables: str, waits: list[str]
) -> None:
    """What a transaction asks goes along with its commit: how things stand is foreseen, and checked by the server."""
    async with opened(postgres_tables) as store:
        transport = PostgresTransport(store.database)
        await transport.connect()
        for name in ("first", "r"):  # the clocks of the first run are set by what the server says
            key = StepKey(name, "a")
            waits.clear()
            await store.record_workflow_start(run(name, "a"), NextStep(key, "a", "a"), is_new=True)
            await store.database.write(transport._fetch, _Fetch("a", 10, ()), durable=False)
            grant = await store.claim_step(ClaimRequest(key, "w", 9, place=0))
            assert isinstance(grant, Grant)
            assert grant.queued > 0
            result = StepResult(
                key, "w", grant.epoch, 1, StepStatus.COMPLETED, run=RunStatus.COMPLETED, place=0
            )
            assert isinstance(await store.record_step_result(result), Recorded)
            assert (await store.load_run(name)).run.status is RunStatus.COMPLETED
        assert len(waits) == 5
        await transport.close()


@pytest.mark.parametrize("place", [None, 0, 1])
async def test_what_was_foreseen_wrongly_is_looked_up(
    postgres_tables: str, waits: list[str], place: int | None
) -> None:
    """Nothing is taken or recorded on a belief that doesn't hold, nor refused."""
    async with opened(postgres_tables) as store:
        result = await claimed(store, "r")
        again = ClaimRequest(result.key, "other", 9, place)
        assert await store.claim_step(again) == Refused("taken")
        stale = replace(result, worker="other", place=place, status=StepStatus.READY)
        assert await store.record_step_result(stale) == Refused("stale")
        assert isinstance(await store.record_step_result(replace(result, place=place)), Recorded)
        assert await store.record_step_result(replace(result, place=place)) == Recorded()
        assert await store.claim_step(again) == Refused("ended")
        waits.clear()
        assert await store.claim_step(ClaimRequest(StepKey("nobody's", "a"), "w", 9, place)) == Refused(
            "unknown"
        )
        assert len(waits) == (2 if place is None else 3)


@pytest.mark.parametrize(("claims", "trips"), [(2, 1), (6, 2)])
async def test_a_few_claims_go_by_what_is_foreseen(
    postgres_tables: str, waits: list[str], claims: int, trips: int
) -> None:
    """Of many, one is soon wrong: they are looked up. All are granted either way."""
    async with opened(postgres_tables) as store:
        keys = [StepKey(f"r{number}", "a") for number in range(claims)]
        for key in keys:
            await store.record_workflow_start(run(key.workflow_id, "a"), NextStep(key, "a", "a"))
        waits.clear()
        asked = [store.claim_step(ClaimRequest(key, "w", 9, place=0)) for key in keys]
        assert all(isinstance(answer, Grant) for answer in await asyncio.gather(*asked))
        assert len(waits) == trips


@pytest.mark.parametrize("heads", [1, 2, 4])
async def test_each_part_of_what_is_foreseen_is_checked(postgres_tables: str, heads: int) -> None:
    """By the statement for one head as by that for several: nothing is done where any of them differs."""

    def handler(
        tx: Tx, requests: Sequence[list[Head]]
    ) -> list[Mapping[StepKey, Head] | Later[Mapping[StepKey, Head] | None] | None]:
        foreseen = [foreseen_heads(tx, request) for request in requests]
        return [None if found is None else Later(found[1]) for found in foreseen]

    async with opened(postgres_tables) as store:

        async def judged(heads: list[Head]) -> Mapping[StepKey, Head] | None:
            found: Mapping[StepKey, Head] | None = await store.database.write(handler, heads)
            return found

        held = [await claimed(store, f"r{number}") for number in range(heads)]
        found = [ledger.foreseen_for_record(replace(result, place=0)) for result in held]
        right = [head for head in found if head is not None]
        there = await judged(right)
        assert there is not None
        told = [replace(there[head.key], not_before=0.0, wake_at=0.0, created_at=0.0) for head in right]
        assert told == right
        last = right[-1]
        for wrong in (
            replace(last, key=StepKey("nobody's", "a")),
            replace(last, key=StepKey(last.key.workflow_id, "other")),
            replace(last, key=StepKey(last.key.workflow_id, "a", Phase.UNDO)),
            replace(last, seq=1),
            replace(last, run=RunStatus.PENDING),
            replace(last, status=StepStatus.READY),
            replace(last, epoch=last.epoch + 1),
            replace(last, attempt=last.attempt + 1),
            replace(last, worker="other"),
            replace(last, worker=None),
        ):
            # Done again, it foresees nothing.
            assert await judged([*right[:-1], wrong]) is None
        await store.release_steps("w", [(last.key, last.epoch)])
        ready = replace(last, status=StepStatus.READY, worker=None, attempt=0)
        assert await judged([*right[:-1], replace(ready, worker="w")]) is None
        assert await judged([*right[:-1], ready]) is not None


async def test_a_transaction_may_ask_for_the_time_between_two_statements(postgres_tables: str) -> None:
    """The connection that it has taken stays usable, also where the server is asked."""

    def handler(tx: Tx, requests: Sequence[None]) -> list[bool]:
        connection = tx.connection
        return [
            tx.now <= connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        ]

    async with opened(postgres_tables) as store:
        assert isinstance(store.database, PostgresDatabase)
        for clock in (ServerClock(), store.database._clock):  # one that has to be set, and one that is
            store.database._clock = clock
            assert await store.database.write(handler, None)


async def test_a_step_is_begun_after_it_was_made_whoever_tells_the_time(postgres_tables: str) -> None:
    """A process to which the server's time came late claims what another one has just recorded."""
    async with opened(postgres_tables) as one, opened(postgres_tables) as other:
        await claimed(one, "r")
        assert isinstance(other.database, PostgresDatabase)
        await other.now()
        other.database._clock._ahead -= 3.0
        first = NextStep(StepKey("later", "a"), "a", "a")
        assert await one.record_workflow_start(run("later", "a"), first, is_new=True)
        answer = await other.claim_step(ClaimRequest(first.key, "w", 3, 0))
        assert isinstance(answer, Grant)
        [row] = (await one.load_run("later")).steps
        assert row.started_at == row.created_at


async def test_a_run_that_is_said_to_be_new_and_isnt_is_found(postgres_tables: str) -> None:
    """Its key tells."""
    async with opened(postgres_tables) as store:
        first = NextStep(StepKey("r", "a"), "a", "a")
        assert await store.record_workflow_start(run("r", "a"), first, is_new=True)
        assert not await store.record_workflow_start(run("r", "a"), first, is_new=True)
        other = replace(run("r", "a"), input_hash="another")
        with pytest.raises(RunConflict):
            await store.record_workflow_start(other, first, is_new=True)


# -- opening


async def test_a_database_without_tables_is_refused(postgres_url: str) -> None:
    """Nothing makes tables on a server but the command, which the error names."""
    with pytest.raises(SchemaMismatch, match="no tables of Paigeant yet; `paigeant db upgrade` makes them"):
        await SqlStore(PostgresDatabase(postgres_url)).connect()


@pytest.mark.parametrize(
    ("found", "says"),
    [("0000", "made by another version of Paigeant than this one"), ("9999", "Install the newer version")],
)
async def test_tables_of_another_version_are_refused(postgres_tables: str, found: str, says: str) -> None:
    """A schema that this code doesn't know is left alone, and the error says what to do."""
    with psycopg.connect(postgres_tables, autocommit=True) as connection:
        [(before,)] = connection.execute("SELECT version_num FROM paigeant_version").fetchall()
        connection.execute("UPDATE paigeant_version SET version_num = %s", [found])
        try:
            with pytest.raises(SchemaMismatch, match=says):
                await SqlStore(PostgresDatabase(postgres_tables)).connect()
        finally:
            connection.execute("UPDATE paigeant_version SET version_num = %s", [before])


async def test_a_missing_database_is_named(postgres_server_url: str) -> None:
    """Whoever names a database that isn't there learns how to make it."""
    url = f"{postgres_server_url.rpartition('/')[0]}/nobody_made_this"
    with pytest.raises(
        ConfigurationError, match=r'"nobody_made_this" does not exist; make it with `createdb`'
    ):
        await SqlStore(PostgresDatabase(url)).connect()


async def test_a_server_that_can_t_be_reached_is_unavailable() -> None:
    """Nobody listening is no mistake in the settings, but a server that is down."""
    url = f"postgresql://postgres:secret@127.0.0.1:{free_port()}/x"
    with pytest.raises(StoreUnavailable, match="is the server running") as caught:
        await SqlStore(PostgresDatabase(url)).connect()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "parameter",
    [
        "sslmode=nosuch",
        "target_session_attrs=nosuch",
        "keepalives_idle=soon",
        "port=99999",
        "connect_timeout=nan",
    ],
)
async def test_a_parameter_that_cant_be_used_is_a_mistake_in_the_settings(
    postgres_tables: str, parameter: str
) -> None:
    """Waiting for a server doesn't mend it."""
    with pytest.raises(ConfigurationError, match="parameter"):
        await SqlStore(PostgresDatabase(f"{postgres_tables}?{parameter}")).connect()


async def test_a_server_that_speaks_tls_is_verified() -> None:
    """By the authority that the URL names; a file that isn't there is a mistake in the settings."""
    folder = temporary_folder("tls")
    ours, other = CertificateAuthority(folder), CertificateAuthority(folder, "other")
    ours.server()
    shown = folder / "tests-server.pem"
    shown.chmod(0o600)
    give_away(folder)
    lines = ["fsync = off", "ssl = on", f"ssl_cert_file = '{shown}'", f"ssl_key_file = '{shown}'"]
    try:
        with PostgresServer(lines=lines) as server:
            make_tables(server.url)
            url = f"{server.url}?sslmode=verify-full&sslrootcert="
            async with opened(f"{url}{ours.pem}") as store:
                assert await store.list_runs() == []
            with pytest.raises(StoreUnavailable, match=r"certificate verify failed; .*sslrootcert=/path"):
                await SqlStore(PostgresDatabase(f"{url}{other.pem}")).connect()
            with pytest.raises(ConfigurationError, match="nosuch"):
                await SqlStore(PostgresDatabase(f"{url}/nosuch.pem")).connect()
    finally:
        shutil.rmtree(folder)


async def test_a_server_without_tls_is_told_from_one_that_is_away(postgres_tables: str) -> None:
    """It runs and is reachable, and what to do is something else."""
    with pytest.raises(StoreUnavailable, match=r"does not support SSL.*; have it speak TLS"):
        await SqlStore(PostgresDatabase(f"{postgres_tables}?sslmode=require")).connect()


async def test_a_server_that_can_only_be_read_is_refused(postgres_tables: str) -> None:
    """A replica, or a database set to be read only, is of no use to a store."""
    url = f"{postgres_tables}?options=-cdefault_transaction_read_only%3Don"
    with pytest.raises(StoreUnavailable, match="only lets itself be read"):
        await SqlStore(PostgresDatabase(url)).connect()


async def test_when_it_can_only_be_read_another_server_is_looked_for(postgres_tables: str) -> None:
    """A primary that has become a replica says so at a write: the connection is left, and made anew."""
    backends = []

    def turned(tx: Tx, requests: Sequence[bool]) -> list[None]:
        backends.append(tx.connection.execute(text("SELECT pg_backend_pid()")).scalar())
        if requests[0]:
            tx.connection.execute(text("SET TRANSACTION READ ONLY"))
        tx.connection.execute(text("DELETE FROM workers"))
        return [None]

    async with opened(postgres_tables) as store:
        with pytest.raises(StoreUnavailable, match="read-only transaction"):
            await store.database.write(turned, True)
        await store.database.write(turned, False)
    assert len(set(backends)) == 2


async def test_accounts_that_are_not_let_in() -> None:
    """A wrong password and an unknown user are mistakes in the settings, told with what to do, without the password."""
    with PostgresServer(lines=["fsync = off"]) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE USER someone PASSWORD 'right'")
            (server.folder / "data" / "pg_hba.conf").write_text(
                "host all postgres all trust\nhost all all all scram-sha-256\n"
            )
            connection.execute("SELECT pg_reload_conf()")
        place = f"{server.host}:{server.port}/postgres"
        for account in ("someone:wrong", "nobody:wrong", "someone"):
            with pytest.raises(ConfigurationError, match=r"let the user in: .*; correct the user") as caught:
                await SqlStore(PostgresDatabase(f"postgresql://{account}@{place}")).connect()
            assert "wrong" not in str(caught.value)


GERMAN = {
    b"password authentication failed for user": b"Passwort-Anmeldung gescheitert: Benutzer",
    b"is not permitted to log in": b"darf sich nicht anmelden",
    b"too many connections for role": b"zu viele Verbindungen: Rolle",
    b"does not exist": b"wo ist sie nur",
}


@contextmanager
def in_german(server: PostgresServer) -> Iterator[str]:
    """The url of the server as one that speaks German: what it says is translated on the way, to the same length."""

    def pass_on(client: socket.socket) -> None:
        with client, socket.create_connection((server.host, server.port)) as link, suppress(OSError):
            while True:
                for one, other in ((client, link), (link, client)):
                    if not select.select([one], [], [], 0.01)[0]:
                        continue
                    said = one.recv(65536)
                    if not said:
                        return
                    for english, german in GERMAN.items():
                        said = said.replace(english, german.ljust(len(english)))
                    other.sendall(said)

    def meet() -> None:
        with ThreadPoolExecutor() as threads, suppress(OSError):
            while True:
                threads.submit(pass_on, listening.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        meeting = threading.Thread(target=meet)
        meeting.start()
        yield f"postgresql://postgres@127.0.0.1:{listening.getsockname()[1]}/postgres"
        listening.shutdown(socket.SHUT_RDWR)
        meeting.join()


def ask_for_passwords(server: PostgresServer, admin: psycopg.Connection[Any]) -> None:
    """Have the server let in by a password alone who has one."""
    having = admin.execute("SELECT rolname FROM pg_authid WHERE rolpassword IS NOT NULL").fetchall()
    rules = [f"host all {name} all scram-sha-256" for (name,) in having]
    rules.append("host all all all trust")
    (server.folder / "data" / "pg_hba.conf").write_text("\n".join(rules) + "\n")
    admin.execute("SELECT pg_reload_conf()")


async def test_a_refusal_is_understood_in_any_language() -> None:
    """A server speaks the language of its `lc_messages`; what no waiting mends is told at once all the same."""
    with PostgresServer(lines=["fsync = off"]) as server:
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute("CREATE USER someone PASSWORD 'right'")
            admin.execute("CREATE USER nobody NOLOGIN")
            admin.execute("CREATE USER many CONNECTION LIMIT 0")
            ask_for_passwords(server, admin)
        with in_german(server) as url:
            for wrong, kind, says in (
                (
                    url.replace("postgres@", "someone:wrong@"),
                    ConfigurationError,
                    "let the user in: .* Passwort-",
                ),
                (
                    url.replace("postgres@", "nobody@"),
                    ConfigurationError,
                    "let the user in: .* darf sich nicht",
                ),
                (f"{url}_", ConfigurationError, "wo ist sie.* make it with `createdb`"),
                (url.replace("postgres@", "many@"), StoreUnavailable, "no room .* zu viele Verbindungen"),
            ):
                with pytest.raises(kind, match=says) as caught:
                    await SqlStore(PostgresDatabase(wrong)).connect()
                assert "wrong" not in str(caught.value)


# -- what is set for the database or the user


@pytest.fixture
def altered(postgres_server_url: str) -> Iterator[Callable[[str], str]]:
    """Gives the url of a new database with tables, for the sessions of which a setting is set."""
    with database_with_tables(postgres_server_url) as url:

        def alter(setting: str) -> str:
            asked(url, f'ALTER DATABASE "{url.rpartition("/")[2]}" SET {setting}')
            return url

        yield alter


def asked(url: str, statement: str) -> Any:
    """What a statement gives, in a session of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        answer = connection.execute(statement.encode())
        return answer.fetchone() if answer.description else None


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_texts_are_utf8_whatever_the_clients_of_a_database_speak(
    altered: Callable[[str], str], encoding: str
) -> None:
    """They are written as UTF-8: taken for something else, they would be kept as other texts."""
    url = altered(f"client_encoding = '{encoding}'")
    async with opened(url) as store:
        await claimed(store, "\u00e9")
        await store.save_variable("\u00e9", "name", "\u00e9\u20ac")
        assert await store.load_variable("\u00e9", "name") == "\u00e9\u20ac"
    read = "SELECT convert_to(workflow_id || value::text, 'UTF8') FROM workflow_variables"
    assert asked(url, read) == ('\u00e9"\u00e9\u20ac"'.encode(),)


async def test_texts_are_utf8_whatever_the_environment_says(
    postgres_tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do a variable of libpq and the parameter in the URL change them."""
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    async with opened(f"{postgres_tables}?client_encoding=LATIN1") as store:
        await claimed(store, "r")
        await store.save_variable("r", "name", "\u20ac")
        assert await store.load_variable("r", "name") == "\u20ac"


async def test_a_step_sees_the_signal_that_its_run_was_locked_for(altered: Callable[[str], str]) -> None:
    """Whoever has waited for a lock sees what was done under it, whatever isolation is the database's own."""
    url = altered("default_transaction_isolation = 'repeatable read'")
    async with opened(url) as store:
        waits = replace(await claimed(store, "r"), status=StepStatus.WAITING, run=None, waits_for=("paid",))
        with psycopg.connect(url) as connection:
            connection.execute("SELECT id FROM workflow_runs FOR NO KEY UPDATE")
            connection.execute(
                "INSERT INTO workflow_signals (workflow_id, name, value, created_at, sender) "
                "VALUES ('r', 'paid', '1', 1, 'x')"
            )
            parked = asyncio.create_task(store.record_step_result(waits))
            blocked = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            await eventually(lambda: asked(url, blocked) is not None)
        assert await parked == Refused("arrived")


async def test_times_come_back_as_they_were_written(altered: Callable[[str], str]) -> None:
    """A list of runs goes on behind the last one's time: rounded, it would show that one again or leave some out."""
    async with opened(altered("extra_float_digits = -3")) as store:
        for name in ("a", "b", "c"):
            await claimed(store, name)
        [newest] = await store.list_runs(limit=1)
        older = await store.list_runs(before=(newest.created_at, newest.id))
        assert [run.id for run in older] == ["b", "a"]


async def test_no_limit_of_the_server_ends_a_session(altered: Callable[[str], str]) -> None:
    """It would do so without a word that tells it from a crash in the middle of a commit."""
    url = altered("idle_session_timeout = '1s'")
    if asked(url, "SELECT name FROM pg_settings WHERE name = 'transaction_timeout'"):  # since 17
        url = altered("transaction_timeout = '1s'")
    limits = text(
        "SELECT name, setting FROM pg_settings WHERE name IN ('idle_session_timeout', 'transaction_timeout')"
    )
    async with opened(url) as store:
        rows = await store.database.ask(lambda connection: connection.execute(limits).all())
    found = {row.name: row.setting for row in rows}
    assert "idle_session_timeout" in found
    assert set(found.values()) == {"0"}


# -- how tables are kept


_CHANGED = ("messages", "workers", "workflow_runs", "step_executions")
"""The tables whose rows are changed."""


async def test_hot_rows_stay_out_of_indexes(postgres_tables: str) -> None:
    """Messages are taken without touching an index, in tables with room for that and a vacuum that comes early."""
    with psycopg.connect(postgres_tables, autocommit=True) as connection:
        options: dict[str, list[str]] = dict(
            connection.execute(
                "SELECT relname::text, reloptions FROM pg_class WHERE relname = ANY(%s)", [list(_CHANGED)]
            ).fetchall()
        )
        indexes = " ".join(
            text
            for (text,) in connection.execute(
                "SELECT indexdef FROM pg_indexes WHERE tablename IN ('messages', 'workers')"
            )
        )
        take = (
            "UPDATE messages SET held_until = held_until + 1, holder = 'me', deliveries = deliveries + 1 "
            "WHERE message_id = 'm'"
        )
        connection.execute(
            "INSERT INTO messages (message_id, topic, body, due_at, held_until, created_at, deliveries) "
            "VALUES ('m', 'a', '', 0, 0, 0, 0)"
        )
        for _ in range(10):
            connection.execute(take)
    for table in _CHANGED:
        names = {option.partition("=")[0] for option in options[table] or ()}
        assert {"fillfactor", "autovacuum_vacuum_scale_factor"} <= names
    for column in ("held_until", "holder", "deliveries", "lease_until"):
        assert column not in indexes

    def counts() -> tuple[int, int]:  # in a session of its own: the one that writes counts at its end
        with psycopg.connect(postgres_tables) as connection:
            query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'messages'"
            [found] = connection.execute(query).fetchall()
        return found

    await eventually(lambda: counts()[0] >= 10)
    updated, hot = counts()
    assert updated == hot


# -- transactions that others get ahead of


async def test_starts_in_opposite_order_agree(postgres_tables: str) -> None:
    """Two processes that start the same runs, one forwards and one backwards, have started each once."""
    ids = [f"r{number:03}" for number in range(150)]

    async def start(store: SqlStore, run_id: str) -> bool:
        return await store.record_workflow_start(run(run_id, "a"), NextStep(StepKey(run_id, "a"), "a", "a"))

    async with opened(postgres_tables) as one, opened(postgres_tables) as other:
        forwards = asyncio.gather(*(start(one, run_id) for run_id in ids))
        backwards = asyncio.gather(*(start(other, run_id) for run_id in reversed(ids)))
        first, second = await forwards, (await backwards)[::-1]
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * len(ids)


async def test_a_deadlock_is_done_again(postgres_tables: str) -> None:
    """Of two transactions that wait for each other one is begun anew; both are done."""
    met = [threading.Event(), threading.Event()]
    tries = []

    def crossing(tx: Tx, requests: Sequence[tuple[int, str, str]]) -> list[None]:
        [(number, first, second)] = requests
        tries.append(number)
        touch = text("UPDATE workers SET process = process || :n WHERE id = :id")
        tx.connection.execute(touch, {"n": str(number), "id": first})
        met[number].set()
        assert elsewhere(partial(met[1 - number].wait, PATIENCE))
        tx.connection.execute(touch, {"n": str(number), "id": second})
        return [None]

    with psycopg.connect(postgres_tables, autocommit=True) as connection:
        connection.execute("INSERT INTO workers VALUES ('x', 'h', '', 9e9), ('y', 'h', '', 9e9)")
        async with opened(postgres_tables) as one, opened(postgres_tables) as other:
            await asyncio.gather(
                one.database.write(crossing, (0, "x", "y")), other.database.write(crossing, (1, "y", "x"))
            )
        found = connection.execute("SELECT process FROM workers").fetchall()
    assert len(tries) > 2  # begun anew, one may be ahead of the other again
    assert sorted("".join(sorted(process)) for (process,) in found) == ["01", "01"]


@pytest.mark.parametrize("asks", [False, True], ids=["sent at once", "with a question in the middle"])
async def test_what_a_transaction_did_before_an_error_of_ours_is_undone(
    postgres_tables: str, asks: bool
) -> None:
    """Also where the server has been told of no beginning: the end of a pipeline would commit it."""

    def failing(tx: Tx, requests: Sequence[None]) -> list[None]:
        tx.driver.each("INSERT INTO workers VALUES ($1, 'h', '', 9e9)", [("x",)])
        seen = tx.driver.ask("SELECT count(*) FROM workers", [])
        if asks:
            assert seen() == [(1,)]
        raise ValueError("in the middle")

    async with opened(postgres_tables) as store:
        with pytest.raises(ValueError, match="in the middle"):
            await store.database.write(failing, None)
        assert await store.list_workers() == []


async def test_a_commit_that_fails_is_an_error(postgres_tables: str) -> None:
    """The server says so with the mark that ends the transaction, after all statements have gone well."""

    def adding(tx: Tx, requests: Sequence[str]) -> list[None]:
        tx.driver.each("INSERT INTO workers VALUES ($1, 'h', '', 9e9)", [(name,) for name in requests])
        return [None] * len(requests)

    with psycopg.connect(postgres_tables, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF NEW.id = 'bad' THEN RAISE EXCEPTION 'too late'; END IF; RETURN NULL; END $$"
        )
        connection.execute(
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON workers DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        async with opened(postgres_tables) as store:
            with pytest.raises(psycopg.Error, match="too late"):
                await store.database.write(adding, "bad")
            await store.database.write(adding, "good")
        found = connection.execute("SELECT id FROM workers").fetchall()
    assert found == [("good",)]


async def test_a_sweep_waits_for_nobody(postgres_tables: str) -> None:
    """A worker whose row somebody else has is left to that, the others' steps are put back to work meanwhile."""
    async with opened(postgres_tables) as store:
        for name in ("kept", "left"):
            store.beat(WorkerRecord(name, "h", "p"), lease=-1.0, running=())
        with psycopg.connect(postgres_tables) as connection:
            connection.execute("SELECT 1 FROM workers WHERE id = 'kept' FOR UPDATE")
            swept = await store.sweep()  # else Postgres ends the wait after 4 s, with an error
            assert swept.lost == ("left",)
        assert (await store.sweep()).lost == ("kept",)


async def test_a_sweep_ends_before_its_time_does(postgres_tables: str) -> None:
    """Of many runs over their deadline, which take long to read, it ends some and leaves the others to the next."""

    class Ticking:
        """A clock by which each look at it takes long."""

        seconds = 0.0

        def now(self) -> float:
            self.seconds += 0.2
            return self.seconds

    store = SqlStore(PostgresDatabase(postgres_tables, clock=Ticking()))
    await store.connect()
    try:
        for number in range(30):
            await store.record_workflow_start(run(f"r{number}", "a", deadline=0.0), due("a", f"r{number}"))
        expired = (await store.sweep()).expired
        assert 0 < len(expired) < 30
        while swept := (await store.sweep()).expired:
            expired += swept
        assert sorted(expired) == sorted(f"r{number}" for number in range(30))
    finally:
        await store.close()


@pytest.mark.parametrize("output", [b'"%s"' % (b"a" * 99_998), b'"%s"' % secrets.token_hex(49_999).encode()])
async def test_the_bound_of_an_output_counts_its_bytes(postgres_tables: str, output: bytes) -> None:
    """However it is kept: Postgres packs what is large, if that makes it smaller."""
    async with opened(postgres_tables) as store:
        await store.record_step_result(replace(await claimed(store, "r"), output=output))
        within = await store.load_run("r", inline_bytes=100_000)
        beyond = await store.load_run("r", inline_bytes=99_999)
        assert (within.steps[0].output, sorted(within.stored)) == (output, [])
        assert (beyond.steps[0].output, sorted(beyond.stored)) == (None, ["a"])
        assert (await store.load_run("r")).steps[0].output == output


async def test_deleting_old_runs_waits_for_no_letter(postgres_tables: str) -> None:
    """A dead letter that somebody else has is left to that, who is deleting it; the runs go meanwhile."""
    async with opened(postgres_tables) as store:
        assert await store.record_workflow_start(run("r", "a"), None)
        for name in ("kept", "left"):
            await store.bury(DeadLetter(name, "t", "unhandled", "", b"", 1, "r", "a"))
        with psycopg.connect(postgres_tables) as connection:
            connection.execute("DELETE FROM dead_letters WHERE id = 'kept'")
            # else Postgres ends the wait after 4 s, with an error
            assert await store.prune_runs(before=await store.now() + 1.0) == 1
        assert await store.list_dead_letters() == []


async def test_a_table_of_others_that_keeps_a_run_is_named(postgres_url: str) -> None:
    """A user's own table may refer to runs: one that it keeps is not deleted, and the error says what to do."""
    make_tables(postgres_url)
    asked(postgres_url, "CREATE TABLE orders (run TEXT REFERENCES workflow_runs)")
    async with opened(postgres_url) as store:
        await store.record_step_result(await claimed(store, "r"))
        asked(postgres_url, "INSERT INTO orders VALUES ('r')")
        with pytest.raises(ConfigurationError, match=r'on table "orders".*ON DELETE CASCADE'):
            await store.prune_runs(before=await store.now() + 1)
        asked(postgres_url, "DELETE FROM orders")
        assert await store.prune_runs(before=await store.now() + 1) == 1


# As a server does that is asked to delete more in one statement than it can within the time for one.
_SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF (SELECT count(*) FROM gone) > 20 THEN RAISE query_canceled USING MESSAGE = 'statement timeout'; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER slow AFTER DELETE ON workflow_runs REFERENCING OLD TABLE AS gone EXECUTE FUNCTION slow()
"""


async def test_runs_of_which_many_at_once_take_too_long_are_deleted_by_few(postgres_url: str) -> None:
    """Old runs go however large they are: a transaction that the server gives up is followed by smaller ones."""
    make_tables(postgres_url)
    asked(postgres_url, _SLOW)
    async with Paigeant(Settings(transport_url=postgres_url, store_url=postgres_url)) as app:
        for number in range(60):
            assert await app.store.record_workflow_start(run(f"r{number}", "a"), None)
        with pytest.raises(StoreUnavailable, match=r"gave up a statement.*statement timeout"):
            await app.store.prune_runs(before=await app.store.now() + 1)
        assert await app.prune(older_than=0) == 60
        assert await app.store.list_runs() == []


async def test_letters_deleted_in_opposite_order_are_deleted_once(postgres_tables: str) -> None:
    """Two processes that delete the same dead letters, one forwards and one backwards, don't wait for each other."""
    ids = [f"l{number:03}" for number in range(150)]
    before = deadlocks(postgres_tables)
    async with opened(postgres_tables) as one, opened(postgres_tables) as other:
        await asyncio.gather(*(one.bury(DeadLetter(name, "t", "unhandled", "", b"", 1)) for name in ids))
        forwards = asyncio.gather(*map(one.delete_dead_letter, ids))
        backwards = asyncio.gather(*map(other.delete_dead_letter, reversed(ids)))
        first, second = await forwards, (await backwards)[::-1]
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * len(ids)
    assert deadlocks(postgres_tables) == before


def deadlocks(url: str) -> int:
    """How many the server has ended in this database so far."""
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    with psycopg.connect(url) as connection:
        [(count,)] = connection.execute(query).fetchall()
    return int(count)


async def test_a_row_that_somebody_keeps_stops_only_who_needs_it(
    postgres_tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that share a transaction with one that is blocked are done all the same."""
    monkeypatch.setitem(session._SESSION, "lock_timeout", "200ms")
    async with opened(postgres_tables) as store:
        results = [await claimed(store, run_id) for run_id in ("kept", "free", "also")]
        with psycopg.connect(postgres_tables) as connection:
            connection.execute("SELECT 1 FROM workflow_runs WHERE id = 'kept' FOR UPDATE")
            kept, *free = await asyncio.gather(
                *(store.record_step_result(result) for result in results), return_exceptions=True
            )
            assert isinstance(kept, StoreUnavailable)
            assert "somebody keeps a row" in str(kept)
            assert free == [Recorded(), Recorded()]
        assert await store.record_step_result(results[0]) == Recorded()


_FULL = """
CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.workflow_id = 'large' THEN RAISE disk_full USING MESSAGE = 'no space left on device'; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER is_full AFTER UPDATE ON step_executions FOR EACH ROW EXECUTE FUNCTION is_full()
"""


async def test_what_the_disk_has_no_room_for_keeps_nothing_else_from_being_written(postgres_url: str) -> None:
    """A large result that shares its transaction with small ones fails alone, until there is room."""
    make_tables(postgres_url)
    async with opened(postgres_url) as store:
        results = [await claimed(store, run_id) for run_id in ("large", "small", "also")]
        asked(postgres_url, _FULL)
        large, *small = await asyncio.gather(
            *(store.record_step_result(result) for result in results), return_exceptions=True
        )
        assert isinstance(large, StoreUnavailable)
        assert "no space left on device" in str(large)
        assert small == [Recorded(), Recorded()]
        asked(postgres_url, "DROP TRIGGER is_full ON step_executions")
        assert await store.record_step_result(results[0]) == Recorded()


async def test_a_session_that_is_ended_in_the_middle_is_done_again(postgres_tables: str) -> None:
    """A transaction whose session an operator ends has done nothing, and is done on another connection."""
    tries = []

    def interrupted(tx: Tx, requests: Sequence[None]) -> list[None]:
        tx.connection.execute(text("INSERT INTO workers VALUES ('x', 'h', 'p', 1)"))
        [backend] = tx.connection.execute(text("SELECT pg_backend_pid()")).scalars()
        tries.append(backend)
        if len(tries) == 1:
            with psycopg.connect(postgres_tables, autocommit=True) as connection:
                connection.execute("SELECT pg_terminate_backend(%s)", [backend])
        tx.connection.execute(text("SELECT 1"))
        return [None]

    async with opened(postgres_tables) as store:
        await store.database.write(interrupted, None)
        assert [worker.id for worker in await store.list_workers()] == ["x"]
    assert len(set(tries)) == 2


async def test_a_column_whose_type_is_changed_meanwhile_is_read(postgres_url: str) -> None:
    """Statements that were prepared for the old type are prepared anew, on another connection."""
    make_tables(postgres_url)
    async with opened(postgres_url) as store:
        await store.record_step_result(await claimed(store, "before"))
        await store.load_run("before")
        asked(postgres_url, "ALTER TABLE workflow_runs ALTER workflow TYPE VARCHAR(500)")
        asked(postgres_url, "ALTER TABLE step_executions ALTER topic TYPE VARCHAR(500)")
        assert (await store.load_run("before")).run.status is RunStatus.COMPLETED
        await store.record_step_result(await claimed(store, "after"))
        assert (await store.load_run("after")).run.status is RunStatus.COMPLETED


async def test_a_row_that_a_constraint_refuses_is_quoted_nowhere(postgres_tables: str) -> None:
    """The server tells all that is in it: the input of a run, and what is known of the person for whom it acts."""
    asked(postgres_tables, "ALTER TABLE workflow_runs ADD CONSTRAINT mine CHECK (workflow <> 'evil')")
    activity = ActivityRegistry()

    @activity.execute()
    async def look(password: str) -> None: ...

    given = {"password": "hush-4111"}
    settings = Settings(transport_url="memory://", store_url=postgres_tables)
    async with Paigeant(settings, activities=activity) as app:
        with pytest.raises(ConfigurationError, match='constraint "mine"; let that constraint') as caught:
            await app.dispatch(Workflow("evil", ["look"]), given)
        await app.dispatch(Workflow("good", ["look"]), given)
    assert "hush" not in "".join(traceback.format_exception(caught.value))


async def test_a_run_that_is_gone_is_waited_for_no_longer(postgres_tables: str) -> None:
    """As after an older state of the database was restored: nobody would ever tell of its end."""
    async with opened(postgres_tables) as store:
        await store.record_workflow_start(run("r", "a"), due("a"))
        waiting = asyncio.create_task(store.wait_ended("r"))
        await asyncio.sleep(0)
        asked(postgres_tables, "DELETE FROM workflow_runs")
        with pytest.raises(RunNotFound):
            await asyncio.wait_for(waiting, PATIENCE)


async def test_a_worker_outlasts_tables_that_are_away(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As while a backup is restored under it: what is missing is one line, no traceback, and then it goes on."""
    make_tables(postgres_url)
    activity = ActivityRegistry()

    @activity.execute()
    async def work() -> int:
        return 1

    settings = Settings(transport_url=postgres_url, store_url=postgres_url, sweep_interval=0.5)
    async with Paigeant(settings, activities=activity) as app, working(app.worker()):
        asked(postgres_url, "ALTER TABLE messages RENAME TO away")
        with caplog.at_level(logging.WARNING):
            async with asyncio.timeout(PATIENCE):
                while "can't receive from work" not in caplog.text:  # noqa: ASYNC110  # nothing else tells
                    await asyncio.sleep(0.02)
        asked(postgres_url, "ALTER TABLE away RENAME TO messages")
        result = await (await app.dispatch(Workflow("w", ["work"]), {})).wait(timeout=PATIENCE)
    assert result.output == 1
    assert 'relation "messages" does not exist' in caplog.text
    assert "Traceback" not in caplog.text


TROUBLES = {
    "password": ("ALTER USER app PASSWORD 'another'", "ALTER USER app PASSWORD 'right'"),
    "login": ("ALTER USER app NOLOGIN", "ALTER USER app LOGIN"),
    "rights": ("REVOKE ALL ON workflow_runs FROM app", "GRANT ALL ON workflow_runs TO app"),
    "tables": ("ALTER SCHEMA public RENAME TO away", "ALTER SCHEMA away RENAME TO public"),
    "room": ("ALTER USER app CONNECTION LIMIT 0", "ALTER USER app CONNECTION LIMIT -1"),
    "writing": ("ALTER USER app SET default_transaction_read_only = on", "ALTER USER app RESET ALL"),
}
"""What an administrator does while workers run, and undoes."""


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("password", "doesn't let the user in"),
        ("login", "doesn't let the user in"),
        ("rights", "permission denied for table workflow_runs; grant the user what it needs"),
        ("tables", "doesn't have the tables of this version"),
        ("room", "has no room for another connection"),
        ("writing", "only lets itself be read"),
    ],
)
async def test_no_step_suffers_from_what_an_administrator_changes(
    caplog: pytest.LogCaptureFixture, trouble: str, says: str
) -> None:
    """What would be a mistake in the settings at the start is waited out: no attempt fails, no result is lost."""
    begun, go = asyncio.Event(), asyncio.Event()
    activity = ActivityRegistry()

    @activity.execute()
    async def work(context: StepContext) -> int:
        begun.set()
        await go.wait()
        return int(await context.load_variable("n", 1))

    with PostgresServer(lines=["fsync = off"]) as server:
        make_tables(server.url)
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute("CREATE USER app PASSWORD 'right'")
            admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO app")
            admin.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app")
            ask_for_passwords(server, admin)
            url = server.url.replace("postgres@", "app:right@")
            settings = Settings(transport_url=url, store_url=url, lease=1000)

            def alter(statement: str) -> None:
                admin.execute(statement.encode())
                admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")

            async with Paigeant(settings, activities=activity) as app, working(app.worker()):
                run = await app.dispatch(Workflow("w", ["work", "work"]), {})
                await begun.wait()
                wrong, right = TROUBLES[trouble]
                with caplog.at_level(logging.WARNING):
                    alter(wrong)
                    go.set()
                    await eventually(lambda: bool(re.search(f"has to wait: .*{says}", caplog.text)))
                    alter(right)
                    result = await run.wait(timeout=PATIENCE)
                [(attempts,)] = admin.execute("SELECT max(attempt) FROM step_executions").fetchall()
    assert (result.status, attempts) == (RunStatus.COMPLETED, 1), result.error
    assert "Traceback" not in caplog.text
    assert "right@" not in caplog.text


async def test_a_connection_that_was_given_up_is_closed_without_a_word(
    caplog: pytest.LogCaptureFixture, postgres_tables: str
) -> None:
    """As the heartbeat's is that has met a database which only lets itself be read."""
    async with opened(postgres_tables) as store:
        with psycopg.connect(postgres_tables, autocommit=True) as admin:
            name = admin.info.dbname
            admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
            try:
                with pytest.raises(StoreUnavailable, match="only lets itself be read"):
                    store.beat(WorkerRecord("w", "h", "p"), lease=1.0, running=())
            finally:  # other tests have this database after this one
                admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())
    assert not caplog.records


async def test_what_is_said_of_a_failed_transaction_has_no_values(postgres_tables: str) -> None:
    """Neither its statements nor what was to be written: that are inputs and outputs of runs."""
    value = secrets.token_hex(8)

    def interrupted(tx: Tx, requests: Sequence[None]) -> list[None]:
        [backend] = tx.connection.execute(text("SELECT pg_backend_pid()")).scalars()
        with psycopg.connect(postgres_tables, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", [backend])
        tx.connection.execute(text("SELECT :value"), {"value": value})
        raise AssertionError("the session has ended")

    async with opened(postgres_tables) as store:
        with pytest.raises(StoreUnavailable, match=r"terminating connection|closed") as caught:
            await store.database.write(interrupted, None)
    assert value not in "".join(traceback.format_exception(caught.value))
    assert "SELECT" not in str(caught.value)


# -- processes that are stopped


_STOPPED = """
import asyncio, os, signal, sys, time
from paigeant import heads, rows
from paigeant.databases.postgres import PostgresDatabase, session
from paigeant.stores.sql import SqlStore
from paigeant.table_transport import _Fetch
from paigeant.errors import StoreUnavailable

session._SESSION["idle_in_transaction_session_timeout"] = "300ms"

def stop(tx, requests):
    heads.lock_runs(tx, ["r"])
    if sys.argv[2] == "reading":
        rows.statuses_of(tx, ["r"])  # an answer has come: the server waits for what follows
    else:
        tx.driver._send()  # it is in the middle of what it has to say
    if requests[0].pop("stop", False):
        print("stopping", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)  # it takes a moment until all threads have stopped: this one must not go on before
    return [None]

async def main():
    store = SqlStore(PostgresDatabase(sys.argv[1]))
    await store.connect()
    what = {"stop": True}
    while what is not None:
        try:
            what = await store.database.write(stop, what)
        except StoreUnavailable:
            pass  # it was ended when it asked for the commit: whether it was done is asked, as workers do
    await store.close()
    print("done", flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["reading", "writing"])
async def test_a_stopped_process_keeps_no_run(
    postgres_tables: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """What a process had locked when it was stopped is free for others soon; when it goes on, so does its work."""
    monkeypatch.setattr("paigeant.heads.STUCK_SECONDS", 1)
    async with opened(postgres_tables, grace=0.0) as store:
        result = await claimed(store, "r")
        child = subprocess.Popen(  # noqa: ASYNC220  # asyncio's would wait for it while it is stopped
            [sys.executable, "-c", _STOPPED, postgres_tables, where], stdout=subprocess.PIPE, text=True
        )
        try:
            await taken_from(store, child, result.key)
        finally:
            child.kill()
            child.communicate()


async def taken_from(store: SqlStore, child: subprocess.Popen[str], key: StepKey) -> None:
    """Wait until the child has stopped, take its step over, and let it go on to its end."""
    assert child.stdout is not None
    assert await asyncio.to_thread(child.stdout.readline) == "stopping\n"
    async with asyncio.timeout(PATIENCE):
        while not (await store.sweep(gone=["w"])).freed:  # noqa: ASYNC110  # the server's doing
            await asyncio.sleep(0.05)
        grant = await store.claim_step(ClaimRequest(key, "other", 9))
    assert isinstance(grant, Grant)
    os.kill(child.pid, signal.SIGCONT)
    assert await asyncio.to_thread(child.stdout.readline) == "done\n"
    assert await asyncio.to_thread(child.wait) == 0


# -- networks


@pytest.fixture
def proxied(postgres_server_url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy, and the url of a database with tables behind it."""
    with database_with_tables(postgres_server_url) as url:
        parts = psycopg.conninfo.conninfo_to_dict(url)
        with Proxy(str(parts["host"]), int(parts["port"] or 5432)) as proxy:
            yield proxy, f"{proxy.url(url)}?connect_timeout=5"


@pytest.mark.parametrize(("direction", "step"), [("to_server", 61), ("to_client", 23)])
async def test_a_commit_that_is_cut_anywhere_is_settled_by_asking_again(
    proxied: tuple[Proxy, str], direction: Direction, step: int
) -> None:
    """Whatever byte is the last to pass: the result is recorded or not, and recorded once when it is sent again."""
    proxy, url = proxied
    answered, lost, stood = 0, 0, 0
    async with opened(url) as store:
        for number in range(1000):
            result = await claimed(store, f"r{number}")
            proxy.cut_after(direction, number * step, each=True)
            cuts = proxy.cuts
            try:
                assert await store.record_step_result(result) == Recorded()
                answered += 1
            except StoreUnavailable:
                lost += 1
            proxy.resume()
            detail = await settled(lambda: store.load_run(result.key.workflow_id))  # noqa: B023
            stood += detail.run.status is RunStatus.COMPLETED
            assert await settled(lambda: store.record_step_result(result)) == Recorded()  # noqa: B023
            detail = await settled(lambda: store.load_run(result.key.workflow_id))  # noqa: B023
            assert [(row.status, row.output) for row in detail.steps] == [(StepStatus.COMPLETED, b"1")]
            if proxy.cuts == cuts:
                break
        else:
            raise AssertionError("it was always cut: the count is beyond the transaction")
    assert lost > 3
    assert stood >= answered


@pytest.mark.parametrize(("direction", "step"), [("to_server", 61), ("to_client", 23)])
async def test_a_read_that_is_cut_anywhere_is_done_again(
    proxied: tuple[Proxy, str], direction: Direction, step: int
) -> None:
    """Whatever byte is the last to pass on a connection, nobody who asks hears of it."""
    proxy, url = proxied
    async with opened(url) as store:
        key = (await claimed(store, "r")).key
        for number in range(1000):
            await store.load_run("r")  # on a connection that is open: one that can't be had is told at once
            cuts = proxy.cuts
            proxy.cut_after(direction, number * step)
            assert [row.key for row in (await store.load_run("r")).steps] == [key]
            proxy.resume()
            if proxy.cuts == cuts:
                break
        else:
            raise AssertionError("it was always cut: the count is beyond the transaction")
    assert proxy.cuts > 3


async def settled(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The answer, asked for again while it can't be had."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await ask()
            except StoreUnavailable:
                await asyncio.sleep(0.01)


async def test_silence_is_given_up(proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server from which nothing comes any more is unavailable within a limit, and used again when it is back."""
    monkeypatch.setattr(postgres, "_STUCK_SECONDS", 2.0)
    proxy, url = proxied
    async with opened(url) as store:
        result = await claimed(store, "r")
        proxy.blackhole()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(StoreUnavailable):
                await store.record_step_result(result)
            with pytest.raises(StoreUnavailable):
                await store.run_status("r")
        proxy.resume()
        assert await settled(lambda: store.record_step_result(result)) == Recorded()
        assert await store.run_status("r") is RunStatus.COMPLETED


@pytest.mark.parametrize("passed", [400, 600, 900])
async def test_silence_while_connecting_is_given_up(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch, passed: int
) -> None:
    """A server that falls silent after it has let us in is given up, too."""
    monkeypatch.setattr(postgres, "_STUCK_SECONDS", 0.5)
    proxy, url = proxied
    proxy.cut_after("to_client", passed, ending="blackhole", each=True)
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(PATIENCE):
            await SqlStore(PostgresDatabase(url)).connect()


# -- servers


async def test_a_server_that_crashes_under_load_loses_nothing() -> None:
    """Runs that were begun before, during and after three crashes of the server all end, each step recorded once."""
    activity = ActivityRegistry()

    @activity.execute(retries=9)
    async def first(n: int) -> int:
        return n + 1

    @activity.execute(retries=9)
    async def second(first: int) -> int:
        return first * 2

    work = Workflow("work", ["first", "second"])
    # What a process has written outlives it whether it was synced or not; recovery would sync the whole folder.
    with PostgresServer(lines=["fsync = off"]) as server:
        make_tables(server.url)
        settings = Settings(transport_url=server.url, store_url=server.url, grace=1.0, sweep_interval=0.2)
        async with Paigeant(settings, activities=activity) as app:
            worker = app.worker(concurrency=20)
            working = asyncio.create_task(worker.run())
            runs = []

            async def dispatch() -> None:
                for n in range(150):
                    runs.append(
                        await settled(lambda: app.dispatch(work, {"n": n}, workflow_id=f"r{n}"))  # noqa: B023
                    )

            dispatching = asyncio.create_task(dispatch())
            for crash in range(3):
                await eventually(lambda: len(runs) >= 40 * (crash + 1))  # noqa: B023
                await asyncio.to_thread(server.restart, "immediate")
            await dispatching
            async with asyncio.timeout(PATIENCE):
                results = [await settled(each.wait) for each in runs]
            await worker.stop(grace=PATIENCE)
            await working
            assert [result.output for result in results] == [(n + 1) * 2 for n in range(150)]
            details = [await each.detail() for each in runs]
            assert {len(detail.steps) for detail in details} == {2}


# -- the bell


@asynccontextmanager
async def bells(url: str, count: int) -> AsyncIterator[list[tuple[PostgresBell, list[frozenset[str]]]]]:
    """Bells on a database, each with what it has heard."""
    made = []
    for _ in range(count):
        heard: list[frozenset[str]] = []
        bell = PostgresBell({"conninfo": url, "application_name": "paigeant"}, heard.append)
        bell.open()
        made.append((bell, heard))
    try:
        await eventually(lambda: all(bell.works for bell, _ in made))
        yield made
    finally:
        for bell, _ in made:
            await bell.close()


def end_bells(url: str) -> None:
    """End the connections on which they listen."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'paigeant'"
        )


def ring(url: str, bell: PostgresBell, names: list[str]) -> None:
    """Ring from the side of this bell."""
    with psycopg.connect(url, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        for statement, values in bell.rings(names):
            connection.execute(statement, values)


def inode(number: int) -> int:
    """What an open file is, whatever numbers it has."""
    return os.fstat(number).st_ino


def links() -> list[int]:
    """The numbers under which this process has a TCP connection open."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
            if copy.family == socket.AF_INET and copy.getpeername():
                found.append(number)
    return found


def watched() -> set[int]:
    """What the event loops of this process watch, as inodes."""
    told = []
    for number in os.listdir("/proc/self/fdinfo"):
        with suppress(OSError):
            told += re.findall(
                r"^tfd:.* ino:([0-9a-f]+)", Path("/proc/self/fdinfo", number).read_text(), re.M
            )
    return {int(each, 16) for each in told}


async def test_a_ring_is_heard_by_the_others(postgres_url: str) -> None:
    """Names reach every other process, and not the one that rang."""
    async with bells(postgres_url, 3) as [(ringing, own), (_, one), (_, other)]:
        ring(postgres_url, ringing, ["again", "turned"])
        for heard in (one, other):
            await eventually(lambda: frozenset({"again", "turned"}) <= frozenset().union(*heard))  # noqa: B023
        assert "turned" not in frozenset().union(*own)


async def test_a_topic_is_heard_of_by_those_who_attend_it(postgres_url: str) -> None:
    """Whoever begins to attend one is told to look; whoever leaves it is woken no more."""
    both, asked = frozenset({"topic ä", "topic b"}), ["topic ä", "topic b"]
    async with bells(postgres_url, 3) as [(ringing, _), (one, first), (other, second)]:
        leave = [one.attend("topic ä"), one.attend("topic ä")]
        other.attend("topic b")
        await eventually(lambda: frozenset({"topic ä"}) in first and frozenset({"topic b"}) in second)
        leave.pop()()  # the other one is still there
        first.clear()
        second.clear()
        ring(postgres_url, ringing, [*asked, "turned"])
        await eventually(lambda: "turned" in both.union(*first) and "turned" in both.union(*second))
        assert frozenset().union(*first) == {"topic ä", "turned"}
        assert frozenset().union(*second) == {"topic b", "turned"}
        leave.pop()()
        one.attend("topic c")
        await eventually(lambda: frozenset({"topic c"}) in first)
        first.clear()
        ring(postgres_url, ringing, [*asked, "again"])
        await eventually(lambda: "again" in both.union(*first))
        assert frozenset().union(*first) == {"again"}


async def test_ends_of_runs_are_heard_of_by_those_who_wait_for_some(postgres_url: str) -> None:
    """A worker isn't woken by each run that ends somewhere; whoever begins to wait is told to look."""
    async with bells(postgres_url, 3) as [(ringing, _), (waiting, first), (_, second)]:
        leave = waiting.attend(ENDED)
        await eventually(lambda: frozenset({ENDED}) in first)
        first.clear()
        second.clear()
        ring(postgres_url, ringing, ["ended completed r", "turned"])
        await eventually(lambda: "turned" in frozenset().union(*first) & frozenset().union(*second))
        assert frozenset().union(*first) == {"ended completed r", "turned"}
        assert frozenset().union(*second) == {"turned"}
        leave()


async def test_an_end_that_was_not_to_be_is_not_rung_for(postgres_tables: str) -> None:
    """A result by which its run would have ended, foreseen to stand and refused, tells nobody that it has."""
    async with opened(postgres_tables) as here, opened(postgres_tables) as there:
        result = await claimed(here, "r")
        stale = replace(result, place=0, epoch=result.epoch + 1, strict=True)
        await eventually(lambda: there.database.hears_others)
        heard: list[frozenset[str]] = []
        there.database.on_change(heard.append)
        waiting = asyncio.create_task(there.wait_ended("r"))
        await eventually(lambda: frozenset({ENDED}) in heard)
        assert await here.record_step_result(stale) == Refused("stale")
        assert await here.cancel_run("r", "enough") is RunStatus.CANCELLED  # rung for on the same connection
        assert await asyncio.wait_for(waiting, PATIENCE) is RunStatus.CANCELLED


async def test_who_only_works_attends_no_ends(postgres_tables: str) -> None:
    """Whoever has waited for a run once does, until the application is left."""
    async with apart(postgres_tables) as (here, there):
        for _ in range(2):
            begun = await there.dispatch(Workflow("w", ["work"]), {"n": 1})
            assert (await begun.wait(timeout=PATIENCE)).output == 2
        attended = [database_of(app)._bell._attended for app in (here, there)]
        assert [ENDED in names for names in attended] == [False, True]
    assert not any(attended)


async def test_what_ends_in_another_schema_ends_nothing_here(postgres_url: str) -> None:
    """Of two schemas in a database, each with a run of the same id, one hears nothing of the other."""
    urls = []
    for schema in ("one", "two"):
        asked(postgres_url, f"CREATE SCHEMA {schema}")
        urls.append(f"{postgres_url}?options=-csearch_path%3D{schema}")
        make_tables(urls[-1])
    async with opened(urls[0]) as here, opened(urls[0]) as beside, opened(urls[1]) as there:
        await claimed(here, "r")
        other = await claimed(there, "r")
        waiting = asyncio.create_task(beside.wait_ended("r"))
        heard: list[frozenset[str]] = []
        beside.database.on_change(heard.append)
        await eventually(lambda: frozenset({ENDED}) in heard)
        await there.record_step_result(other)
        assert await here.cancel_run("r", "enough") is RunStatus.CANCELLED
        assert await asyncio.wait_for(waiting, PATIENCE) is RunStatus.CANCELLED
    assert "ended completed r" not in frozenset().union(*heard)


async def test_no_transaction_that_changes_rows_rings() -> None:
    """By the server's own log: a NOTIFY has the commits of all wait for one another, so it is in none that matters."""
    activity = ActivityRegistry()
    activity.execute(name="first", topic="one")(lambda: 1)
    activity.execute(name="second", topic="two")(lambda: 2)
    with PostgresServer(lines=["log_statement = 'all'", "log_line_prefix = 'at %p/%v: '"]) as server:
        make_tables(server.url)
        settings = Settings(transport_url=server.url, store_url=server.url, local_steps=1)
        async with (
            Paigeant(settings, activities=activity) as there,
            Paigeant(settings, activities=activity) as app,
            working(there.worker(topics=["one"])),
            working(app.worker(topics=["two"])),
        ):
            runs = [await app.dispatch(Workflow("w", ["first", "second"])) for _ in range(5)]
            for each in runs:
                await each.wait(PATIENCE)
        said = server.log.read_text()
    statements: dict[str, str] = {}
    for place, statement in re.findall(r"^at (\S+): LOG: (.*?)(?=^at )", said, re.MULTILINE | re.DOTALL):
        statements[place] = statements.get(place, "") + statement
    changed = [texts for texts in statements.values() if re.search("INSERT INTO|UPDATE|DELETE FROM", texts)]
    rung = [texts for texts in statements.values() if "pg_notify" in texts]
    assert len(changed) > len(runs)
    assert len(rung) > len(runs)
    assert not [texts for texts in changed if "pg_notify" in texts]


async def test_a_ring_may_be_long(postgres_url: str) -> None:
    """More names than one notification holds are all heard; one that is too long wakes everybody."""
    names = {f"ended completed {number:05}{'x' * 200}" for number in range(500)}
    async with bells(postgres_url, 2) as [(ringing, _), (listening, heard)]:
        listening.attend(ENDED)
        await eventually(lambda: frozenset({ENDED}) in heard)
        heard.clear()
        ring(postgres_url, ringing, [*names, "y" * 10_000])
        await eventually(lambda: names | {"*"} <= frozenset().union(*heard))


async def test_a_bell_that_lost_its_connections_hears_again(postgres_url: str) -> None:
    """Ended sessions are replaced, and whoever may have missed something is told to look."""
    async with bells(postgres_url, 2) as [(ringing, _), (listening, heard)]:
        listening.attend("topic a")
        await eventually(lambda: frozenset({"topic a"}) in heard)
        heard.clear()
        end_bells(postgres_url)
        await eventually(lambda: frozenset({"*"}) in heard)
        ring(postgres_url, ringing, ["again", "topic a"])
        await eventually(lambda: frozenset({"again"}) in heard and frozenset({"topic a"}) in heard)
        assert listening.works


async def test_a_bell_may_hear_nothing_for_long(altered: Callable[[str], str]) -> None:
    """The server would end its session over and over, and what is rung for meanwhile isn't heard."""
    url = altered("idle_session_timeout = '300ms'")
    sessions = "SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE application_name = 'paigeant' "
    sessions += f"AND datname = '{url.rpartition('/')[2]}'"
    async with bells(url, 2):
        before = asked(url, sessions)
        async with await psycopg.AsyncConnection.connect(url) as idle:  # younger than the bells
            with pytest.raises(psycopg.OperationalError):
                async for _ in idle.notifies(timeout=PATIENCE):
                    pass
            assert idle.broken
        assert asked(url, sessions) == before


@pytest.mark.parametrize("new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_a_lost_bell_leaves_nothing_to_the_loop(
    postgres_url: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Not even where a forked process keeps the socket open: the loop would be told of its end for ever."""

    async def main() -> None:
        async with bells(postgres_url, 1) as [(_, heard)]:
            # A loop may watch what it was told to only when it waits the next time.
            await eventually(lambda: any(inode(number) in watched() for number in links()))
            kept = [os.dup(number) for number in links() if inode(number) in watched()]  # as a fork has them
            heard.clear()
            end_bells(postgres_url)
            await eventually(lambda: frozenset({"*"}) in heard)
            assert not {inode(number) for number in kept} & watched()
        for number in kept:
            os.close(number)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def test_without_the_bell_everything_still_ends(
    postgres_tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where notifications don't come through, as behind some poolers, waiting is looking often."""
    monkeypatch.setattr(PostgresBell, "open", lambda self: None)
    async with apart(postgres_tables) as (_, there):
        begun = await there.dispatch(Workflow("w", ["work"]), {"n": 1})
        result = await begun.wait(timeout=PATIENCE)
    assert result.output == 2


# -- processes


_DISPATCH = """
import asyncio, sys
from paigeant import Paigeant, Settings, Workflow

async def main():
    settings = Settings(transport_url=sys.argv[1], store_url=sys.argv[1])
    async def dispatch():
        async with Paigeant(settings) as app:
            return (await app.dispatch(Workflow("w", ["work"]), {"n": 1}, workflow_id="same")).id
    assert await asyncio.gather(*(dispatch() for _ in range(5))) == ["same"] * 5

asyncio.run(main())
"""


async def test_a_process_has_four_sessions_at_most(postgres_tables: str) -> None:
    """However much it does at once: a pooler, and max_connections, can be reckoned with that."""
    activity = ActivityRegistry()

    @activity.execute()
    async def save(n: int, context: StepContext) -> int:
        await context.save_variable("n", n)
        return await context.once("n", lambda: n)

    settings = Settings(store_url=postgres_tables, transport_url=postgres_tables, local_steps=1)
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'paigeant'"
    async with Paigeant(settings, activities=activity) as app, working(app.worker()):
        flow = Workflow("w", ["save", "save"])
        runs = await asyncio.gather(*(app.dispatch(flow, {"n": n}) for n in range(200)))
        await asyncio.gather(*(run.wait(timeout=PATIENCE) for run in runs))
        [count] = asked(postgres_tables, query)
    assert count == 4


async def test_one_id_dispatched_by_many_is_one_run(postgres_tables: str) -> None:
    """Twenty applications in four processes that dispatch one id at the same time have one run, with one message."""
    children = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", _DISPATCH, postgres_tables)
        for _ in range(4)
    ]
    assert [await child.wait() for child in children] == [0] * 4
    with psycopg.connect(postgres_tables) as connection:
        counts = [
            connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchall()[0][0]
            for table in ("workflow_runs", "step_executions", "messages")
        ]
    assert counts == [1, 1, 1]


_WORK = """
import asyncio, os, sys
from paigeant import ActivityRegistry, Paigeant, Settings

activity = ActivityRegistry()

@activity.execute(topic="first")
async def first(n: int) -> int:
    await asyncio.sleep(0.005)
    return os.getpid()

@activity.execute(topic="second")
async def second() -> int:
    return os.getpid()

async def main():
    settings = Settings(transport_url=sys.argv[1], store_url=sys.argv[1])
    async with Paigeant(settings, activities=activity) as app:
        worker = app.worker(concurrency=2)
        task = asyncio.create_task(worker.run())
        await asyncio.to_thread(sys.stdin.read)
        await worker.stop(grace=10)
        await task

asyncio.run(main())
"""


async def test_processes_share_the_runs(postgres_tables: str) -> None:
    """Two workers in processes of their own both take part, and each step is done by one of them."""
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WORK, postgres_tables, stdin=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    settings = Settings(transport_url=postgres_tables, store_url=postgres_tables)
    pids: set[int] = set()
    async with Paigeant(settings) as app, asyncio.timeout(PATIENCE):
        work = Workflow("work", ["first", "second"])
        while len(pids) < 2:
            runs = await asyncio.gather(*(app.dispatch(work, {"n": n}) for n in range(40)))
            results = await asyncio.gather(*(each.wait() for each in runs))
            assert {result.status for result in results} == {RunStatus.COMPLETED}
            pids |= {result.outputs[step] for result in results for step in ("first", "second")}
            rows_ = [row for each in runs for row in (await each.detail()).steps]
            assert [row.attempt for row in rows_] == [1] * 80
    assert pids == {child.pid for child in children}
    for child in children:
        await child.communicate(b"")
        assert child.returncode == 0


async def test_steps_whose_claims_a_crash_of_the_server_undoes_are_done_once() -> None:
    """Claims aren't synced: the server forgets them, and that their runs have begun. What they give is recorded."""
    runs = range(30)
    with PostgresServer(lines=["wal_writer_delay = 10s"]) as server, server.database() as url:
        make_tables(url)
        activity = ActivityRegistry()
        done: list[int] = []
        all_begun, go = asyncio.Event(), asyncio.Event()

        @activity.execute()
        async def work(n: int) -> int:
            done.append(n)
            if len(done) == len(runs):
                all_begun.set()
            await go.wait()
            return n

        async with (
            Paigeant(Settings(store_url=url, transport_url=url), activities=activity) as app,
            working(app.worker()),
        ):
            begun = [await app.dispatch(Workflow("w", ["work"]), {"n": n}) for n in runs]
            await all_begun.wait()
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            go.set()
            results = await asyncio.gather(*(run.wait(PATIENCE) for run in begun))
    assert [result.output for result in results] == list(runs)
    assert sorted(done) == list(runs)
