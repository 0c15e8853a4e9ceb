"""`paigeant db` on a Postgres server, and what every command says of one that it can't use."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import subprocess
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import text
from tests.integration import warm
from tests.integration.processes import PAIGEANT
from tests.services import PostgresServer, free_port

from paigeant.databases import open_database
from paigeant.errors import SchemaMismatch, StoreUnavailable
from paigeant.tables import SCHEMA_VERSION, VERSION_TABLE, metadata


def command(url: str, *args: str) -> subprocess.CompletedProcess[str]:
    """What a command gives with this database as store and transport."""
    return warm.run(*args, environment=_env(url))


def _env(url: str) -> dict[str, str]:
    urls = {"PAIGEANT_STORE_URL": url, "PAIGEANT_TRANSPORT_URL": url}
    return {**os.environ, **urls, "TERM": "dumb", "COLUMNS": "400"}


def tables(url: str) -> set[str]:
    """The tables that are there."""
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {name for (name,) in found}


def test_tables_are_made_shown_and_taken_away(postgres_url: str) -> None:
    """`db upgrade` makes the tables, once; `db current` tells where they are; `db downgrade` takes them away."""
    assert json.loads(command(postgres_url, "db", "current", "--json").stdout)["current"] is None
    refused = command(postgres_url, "runs", "list")
    assert refused.returncode == 2
    assert "`paigeant db upgrade` makes them" in refused.stderr
    for before in (None, SCHEMA_VERSION):
        done = command(postgres_url, "db", "upgrade", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["before"], told["current"]) == (before, SCHEMA_VERSION)
    assert tables(postgres_url) == {*metadata.tables, VERSION_TABLE}
    assert command(postgres_url, "runs", "list").returncode == 0
    assert json.loads(command(postgres_url, "db", "current", "--json").stdout)["current"] == SCHEMA_VERSION
    assert command(postgres_url, "db", "downgrade", "base").returncode == 0
    assert tables(postgres_url) == {VERSION_TABLE}


@pytest.mark.parametrize("level", ["read committed", "serializable"])
async def test_two_upgrades_at_once_are_one(postgres_url: str, level: str) -> None:
    """Services that start together may all bring the tables up to date; nobody fails, whatever isolation is usual."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        name = postgres_url.rpartition("/")[2]
        connection.execute(
            f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'".encode()
        )
    children = [
        await asyncio.create_subprocess_exec(*PAIGEANT, "db", "upgrade", env=_env(postgres_url))
        for _ in range(4)
    ]
    assert [await child.wait() for child in children] == [0] * 4
    assert tables(postgres_url) == {*metadata.tables, VERSION_TABLE}


def test_tables_are_made_however_short_of_time_transactions_are(postgres_url: str) -> None:
    """What a database allows the transactions of others ends no migration."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        name = postgres_url.rpartition("/")[2]
        connection.execute(f'ALTER DATABASE "{name}" SET idle_in_transaction_session_timeout = 1'.encode())
    for args in (("upgrade",), ("current",), ("downgrade", "base")):
        done = command(postgres_url, "db", *args)
        assert done.returncode == 0, done.stderr


def test_a_session_that_the_server_has_ended_is_an_error_of_ours(postgres_url: str) -> None:
    """Such as one that was idle for too long, in the middle of a transaction."""

    def outstay() -> None:
        with open_database(postgres_url).as_it_is() as connection:
            [process] = connection.execute(text("SELECT pg_backend_pid()")).scalars()
            connection.execute(text("SET idle_in_transaction_session_timeout = 1"))
            with psycopg.connect(postgres_url, autocommit=True) as other:
                while other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [process]).fetchone():
                    pass
            connection.execute(text("SELECT 1"))

    # Sometimes the client learns of the end before it has read the reason.
    with pytest.raises(StoreUnavailable, match=r"idle-in-transaction timeout|server closed the connection"):
        outstay()


def test_a_foreign_table_is_left_alone(postgres_url: str) -> None:
    """A table of ours by name that another program made is not touched; the error says where else to go."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE workers (name text)")
    done = command(postgres_url, "db", "upgrade")
    assert done.returncode == 2
    assert "has a table 'workers' that Paigeant did not make" in done.stderr
    assert tables(postgres_url) == {"workers"}


def test_migrations_of_the_application_are_left_alone(postgres_url: str) -> None:
    """An application that has its own tables by Alembic may share its schema: neither meets the other's version."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('0001')")
    assert json.loads(command(postgres_url, "db", "current", "--json").stdout)["current"] is None
    for args in (("db", "upgrade"), ("runs", "list"), ("db", "downgrade", "base")):
        done = command(postgres_url, *args)
        assert done.returncode == 0, done.stderr
    assert tables(postgres_url) == {VERSION_TABLE, "alembic_version"}
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]


def test_a_schema_of_its_own(postgres_url: str) -> None:
    """The tables can live beside others' in a schema that the URL names, which has to be made before."""
    url = f"{postgres_url}?options=-csearch_path%3Dpaigeant"
    missing = command(url, "db", "upgrade")
    assert missing.returncode == 2
    assert "CREATE SCHEMA" in missing.stderr
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE SCHEMA paigeant")
        connection.execute("CREATE TABLE workers (name text)")
    assert command(url, "db", "upgrade").returncode == 0
    assert command(url, "runs", "list", "--json").stdout.strip() == "[]"
    assert tables(postgres_url) == {"workers"}


@pytest.mark.parametrize(
    "args", [("db", "upgrade"), ("db", "current"), ("db", "downgrade"), ("runs", "list")]
)
def test_newer_tables_are_left_alone(postgres_url: str, args: tuple[str, ...]) -> None:
    """Tables that newer code has made are used by nothing but that; looking is allowed."""
    assert command(postgres_url, "db", "upgrade").returncode == 0
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE paigeant_version SET version_num = '9999'")
    done = command(postgres_url, *args)
    if args == ("db", "current"):
        assert f": 9999 (newest: {SCHEMA_VERSION})\n" in done.stdout
        assert done.stdout.startswith(f"Postgres database '{postgres_url.rpartition('/')[2]}' at ")
    assert done.returncode == 2
    assert "Install the newer version, or name another database" in done.stderr


@pytest.mark.parametrize(
    "args", [("db", "upgrade"), ("db", "current"), ("runs", "list"), ("config", "check")]
)
def test_a_server_that_is_down_is_exit_code_3(args: tuple[str, ...]) -> None:
    """A server that can't be reached is told from a mistake, and its password is never shown."""
    done = command(f"postgresql://someone:hidden@127.0.0.1:{free_port()}/x", *args)
    assert done.returncode == 3, done.stderr
    lines = (done.stderr + done.stdout).lower().splitlines()
    assert {line.count("is the server running") for line in lines if "can't use" in line} == {1}
    assert "hidden" not in done.stderr + done.stdout


def test_a_table_that_was_dropped_is_told(postgres_url: str) -> None:
    """A worker that misses one names `db upgrade`, which can't make it anew; nor may `db current` say all is well."""
    assert command(postgres_url, "db", "upgrade").returncode == 0
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP TABLE workflow_signals")
    for args in ("upgrade", "current"):
        done = command(postgres_url, "db", args)
        assert done.returncode == 2
        assert "has lost its table 'workflow_signals'; restore it from a backup" in done.stderr


def test_current_tells_tables_that_are_missing(postgres_url: str) -> None:
    """Nothing makes the tables on a server by itself, so one without them doesn't fit."""
    done = command(postgres_url, "db", "current")
    assert (done.returncode, ": none (newest: " in done.stdout) == (2, True)
    assert "`paigeant db upgrade` brings them up to date" in done.stderr
    assert command(postgres_url, "db", "upgrade").returncode == 0
    assert command(postgres_url, "db", "current").returncode == 0


def test_tables_of_newer_code_are_told_before_alembic_begins(
    postgres_store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No line of Alembic's stands before the error."""
    with psycopg.connect(postgres_store_url) as connection:
        connection.execute("UPDATE paigeant_version SET version_num = '9999'")
    database = open_database(postgres_store_url)
    caplog.set_level("INFO")
    with pytest.raises(SchemaMismatch), database.as_it_is() as connection:
        database.prepare(connection)
    assert [record.name for record in caplog.records if record.name.startswith("alembic")] == []


@pytest.mark.parametrize("args", [("db", "upgrade"), ("runs", "list")])
def test_a_missing_database_is_exit_code_2(postgres_server_url: str, args: tuple[str, ...]) -> None:
    """A database that isn't there is a mistake in the settings."""
    done = command(f"{postgres_server_url.rpartition('/')[0]}/nobody_made_this", *args)
    assert done.returncode == 2
    assert "make it with `createdb`" in done.stderr


def test_a_user_who_may_only_read_is_told_and_may_read() -> None:
    """`config check` says which rights a worker lacks, and how to give them; listings need no more than reading."""
    with PostgresServer(lines=["fsync = off"]) as server:
        assert command(server.url, "db", "upgrade").returncode == 0
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE USER reader")
            connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
            url = server.url.replace("postgres@", "reader@")
            for listing in ("runs", "topics", "dead-letters"):
                done = command(url, listing, "list")
                assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr
            checked = command(url, "config", "check")
            assert checked.returncode == 2
            assert "the user 'reader'" in checked.stdout
            assert "lacks DELETE, INSERT, UPDATE on dead_letters" in checked.stdout
            tables, sequences = re.findall(r'GRANT [^;]* TO "reader"', checked.stdout)[:2]
            connection.execute(tables)
            checked = command(url, "config", "check")
            assert checked.returncode == 2
            assert "lacks USAGE on public.messages_id_seq, and rights on 2 others" in checked.stdout
            connection.execute(sequences)
            assert command(url, "config", "check").returncode == 0
            connection.execute("ALTER USER reader NOLOGIN")
        refused = command(url, "config", "check")
        assert refused.returncode == 2
        assert "doesn't let the user in" in refused.stdout


def test_who_may_make_no_tables_is_told_what_lacks(postgres_url: str) -> None:
    """Since version 15 the schema public is its owner's alone; where in a statement of ours it failed helps nobody."""
    user = f"plain_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE USER {user}".encode())
        try:
            done = command(postgres_url.replace("postgres@", f"{user}@"), "db", "upgrade")
        finally:
            connection.execute(f"DROP USER {user}".encode())
    assert done.returncode == 2
    assert "permission denied for schema public; GRANT the user USAGE on it, and CREATE" in done.stderr
    assert "LINE" not in done.stderr


def test_no_tables_are_made_where_texts_are_no_utf8(postgres_server_url: str) -> None:
    """Nothing could be kept in them."""
    name = f"ascii_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0".encode())
        try:
            done = command(f"{postgres_server_url.rpartition('/')[0]}/{name}", "db", "upgrade")
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    assert done.returncode == 2
    assert "keeps texts as SQL_ASCII; expected a database made with ENCODING 'UTF8'" in done.stderr


def test_a_database_that_only_the_environment_names_is_named(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What libpq takes from its variables is told as if it stood in the URL."""
    parts = urlsplit(postgres_url)
    monkeypatch.setenv("PGHOST", str(parts.hostname))
    monkeypatch.setenv("PGPORT", str(parts.port))
    monkeypatch.setenv("PGUSER", "postgres")
    monkeypatch.setenv("PGDATABASE", parts.path[1:])
    done = command("postgresql://", "runs", "list")
    assert f"database '{parts.path[1:]}' at {parts.hostname}:{parts.port} has no tables" in done.stderr
