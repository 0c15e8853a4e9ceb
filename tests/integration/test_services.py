"""The servers that tests get are real, keep their data, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, LiteralString

import aio_pika
import psycopg
import pytest
import redis
from tests.patience import PATIENCE
from tests.services import (
    PostgresServer,
    RabbitServer,
    RedisServer,
    Server,
    ServerFailed,
    guard,
    new_database,
)
from tests.services.server import wait_for_end

ROOT = Path(__file__).parents[2]


async def put(url: str, queue: str, body: bytes) -> None:
    """Into a durable quorum queue, confirmed."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, queue)


async def take(url: str, queue: str) -> bytes:
    """The next message of the queue, once its leader has been elected after a start."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        found = await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})
        async with found.iterator(timeout=PATIENCE) as messages:
            async for message in messages:
                async with message.process():
                    return message.body
    raise AssertionError("the queue gave nothing")


async def keep(message: aio_pika.abc.AbstractIncomingMessage) -> None:
    """Do not ack it."""


def query(url: str, statement: LiteralString) -> list[tuple[object, ...]]:
    """What the database answers."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A Postgres to do harm to."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    """A RabbitMQ to do harm to."""
    with RabbitServer(lines=["consumer_timeout = 3000"], advanced={"channel_tick_interval": "500"}) as server:
        yield server


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
def test_postgres_keeps_what_is_committed(
    postgres: PostgresServer, mode: Literal["fast", "immediate", "kill"]
) -> None:
    """Stopped, crashed or killed, it comes back on its port with its data."""
    with postgres.database() as url:
        query(url, "CREATE TABLE t AS SELECT 1 AS a")
        if mode == "kill":
            postgres.kill()
        else:
            postgres.stop(mode)
        assert not postgres.is_running
        with pytest.raises(psycopg.OperationalError):
            query(url, "SELECT 1")
        postgres.start()
        assert query(url, "SELECT a FROM t") == [(1,)]


def test_postgres_is_durable_and_takes_settings() -> None:
    """fsync is on unless lines of its configuration say otherwise."""
    with PostgresServer(lines=["work_mem = '5MB'"]) as server:
        assert query(server.url, "SHOW fsync") == [("on",)]
        assert query(server.url, "SHOW work_mem") == [("5MB",)]
        assert query(server.url, "SHOW max_connections") == [("300",)]


def test_a_new_database_is_dropped_though_somebody_is_connected(postgres_server_url: str) -> None:
    """It is empty, and its end waits for nobody."""
    count: LiteralString = "SELECT count(*) FROM pg_database WHERE datname = 'paigeant_test_left'"
    with new_database(postgres_server_url, "paigeant_test_left") as url:
        assert query(url, "SELECT count(*) FROM pg_stat_user_tables") == [(0,)]
        held = psycopg.connect(url)
        assert query(postgres_server_url, count) == [(1,)]
    assert query(postgres_server_url, count) == [(0,)]
    with contextlib.suppress(psycopg.Error):
        held.close()


def test_databases_are_apart(postgres_url: str) -> None:
    """The fixture gives an empty database in which a test may do as it likes."""
    query(postgres_url, "CREATE TABLE workflow_runs ()")
    assert query(postgres_url, "SELECT relname::text FROM pg_stat_user_tables") == [("workflow_runs",)]


def test_redis_keeps_what_it_has_acknowledged() -> None:
    """Killed or stopped, it comes back with all it has said yes to; with appendonly=False it forgets."""
    for appendonly in (True, False):
        with RedisServer(appendonly=appendonly, lines=["maxmemory 77mb"]) as server:
            client = redis.Redis.from_url(server.url)
            assert client.config_get("maxmemory") == {"maxmemory": str(77 * 1024 * 1024)}
            for again in (server.kill, server.stop):
                client.set("a", again.__name__)
                again()
                with pytest.raises(redis.ConnectionError):
                    client.get("a")
                server.start()
                assert client.get("a") == (again.__name__.encode() if appendonly else None)
            client.close()


async def test_rabbitmq_keeps_persistent_messages(rabbit: RabbitServer) -> None:
    """Killed or stopped, it comes back with what it has confirmed."""
    for number, again in enumerate(
        (rabbit.stop, rabbit.kill)
    ):  # the queue has to be old for a kill: see RabbitServer
        await put(rabbit.url, "kept", b"%d" % number)
        await asyncio.to_thread(again)
        with pytest.raises(ConnectionError):
            await aio_pika.connect(rabbit.url)
        await asyncio.to_thread(rabbit.start)
        assert await take(rabbit.url, "kept") == b"%d" % number


async def test_rabbitmq_takes_a_shortened_consumer_timeout(rabbit: RabbitServer) -> None:
    """Lines of rabbitmq.conf and advanced settings hold: who doesn't ack for too long loses the channel."""
    await put(rabbit.url, "slow", b"message")
    began = time.monotonic()
    async with await aio_pika.connect(rabbit.url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("slow", durable=True, arguments={"x-queue-type": "quorum"})
        closed = asyncio.Event()
        channel.close_callbacks.add(lambda *_: closed.set())
        await queue.consume(keep)
        await closed.wait()
    assert 2 < time.monotonic() - began < PATIENCE


SERVERS: list[type[Server]] = [PostgresServer, RedisServer, RabbitServer]


@pytest.mark.parametrize("kind", SERVERS)
def test_a_killed_test_leaves_nothing(kind: type[Server]) -> None:
    """Neither processes nor files of a server outlive the process that made it, even when that gets a SIGKILL."""
    program = f"""
import time
from tests.services import {kind.__name__}

server = {kind.__name__}()
server.start()
print(server.guard_pid, server.folder, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        guard_pid, folder = owner.stdout.readline().split()
        pids = guard.descendants(int(guard_pid))
        assert pids
        owner.kill()
    assert all(wait_for_end(pid, seconds=10) for pid in [int(guard_pid), *pids])
    assert not Path(folder).exists()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_killed_guard_takes_the_server_with_it(kind: type[Server]) -> None:
    """The one process that watches over a server isn't one that can be lost."""
    with kind() as server:
        assert server.pid is not None
        assert server.guard_pid is not None
        all_of_it = guard.descendants(server.guard_pid)
        os.kill(server.guard_pid, signal.SIGKILL)
        try:
            assert wait_for_end(server.pid, seconds=10)
        finally:
            for pid in all_of_it:  # the kernel kills the server, but not its epmd
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_kill_leaves_no_process(rabbit: RabbitServer) -> None:
    """Daemons and orphans of the server die with it."""
    assert rabbit.guard_pid is not None
    pids = guard.descendants(rabbit.guard_pid)
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids}
    assert "epmd" in names  # a daemon, which has left its parent and its session
    rabbit.kill()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    rabbit.start()


def test_frozen_and_thawed(postgres: PostgresServer) -> None:
    """A frozen server accepts and answers nothing; thawed it goes on with the sessions it has."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        postgres.freeze()
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            psycopg.connect(postgres.url, connect_timeout=2)
        postgres.thaw()
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (PostgresServer, "syntax error"),
        (RedisServer, "no such setting"),
        (RabbitServer, "failed_to_parse_configuration_file"),
    ],
)
def test_a_server_that_cannot_start_says_why(kind: type[Server], why: str) -> None:
    """The end of its log is in the error, which comes at once, and nothing is left."""
    server = kind(lines=["no such setting"])
    with pytest.raises(ServerFailed, match=why), server:
        pass
    assert not server.is_running
    assert not server.folder.exists()


def test_one_shared_server_for_all_processes() -> None:
    """Processes of a session that ask at the same time get the same server, which ends with the session."""
    ask = "from tests.services import shared_url; print(shared_url('redis'))"
    program = f"""
import subprocess, sys
from tests.services.session import begin_session, end_session, session_folder
from tests.services.shared import stop_shared

begin_session()
workers = [subprocess.Popen([sys.executable, "-c", {ask!r}], stdout=subprocess.PIPE, text=True) for _ in range(3)]
print({{worker.communicate()[0].strip() for worker in workers}}.pop(), flush=True)
sys.stdin.readline()
stop_shared()
end_session()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdout is not None
        client = redis.Redis.from_url(session.stdout.readline().strip())
        assert client.ping()  # though the process that has started it is gone
        session.communicate("\n")
        with pytest.raises(redis.ConnectionError):
            client.ping()
        client.close()


_ASK = """
from tests.services import shared_url
from tests.services.session import begin_session, end_session
from tests.services.shared import stop_shared

begin_session()
try:
    print(shared_url("redis"))
finally:
    stop_shared()
    end_session()
"""


def ask_without_programs(*, path: str = "/nowhere", **environment: str) -> subprocess.CompletedProcess[str]:
    """Ask for the shared Redis where its program can't be found, nor docker but in `path`."""
    return subprocess.run(
        [sys.executable, "-c", _ASK],
        cwd=ROOT,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_server_fails_and_says_what_to_do() -> None:
    """The message names all the ways to have one."""
    done = ask_without_programs()
    assert done.returncode != 0
    for way in ("make services", "redis-server", "docker compose", "TEST_REDIS_URL"):
        assert way in done.stderr


_DOCKER = """#!/bin/sh
echo "$*" >> "$0.log"
case "$*" in *config*) echo '{"services": {"redis": {"ports": [{"target": 6379, "published": "16379"}]}}}';; esac
"""


def test_without_programs_docker_compose_starts_the_server(tmp_path: Path) -> None:
    """It is waited for, asked where its port is, and stopped in the end; the environment isn't looked at.

    The docker here only notes what it is told, as there is no daemon for it on most machines.
    """
    docker = tmp_path / "docker"
    docker.write_text(_DOCKER)
    docker.chmod(0o755)
    done = ask_without_programs(path=str(tmp_path), TEST_REDIS_URL="redis://elsewhere:1234/5")
    assert done.stdout.strip() == "redis://127.0.0.1:16379/0", done.stderr
    told = (tmp_path / "docker.log").read_text().splitlines()
    compose = f"compose --file {ROOT / 'docker-compose.yml'}"
    assert told[-3:] == [
        f"{compose} up --detach --wait redis",
        f"{compose} config --format json",
        f"{compose} stop redis",
    ]


def test_without_programs_the_environment_names_the_server() -> None:
    """The last way to have one."""
    done = ask_without_programs(TEST_REDIS_URL="redis://elsewhere:1234/5")
    assert done.stdout.strip() == "redis://elsewhere:1234/5"
