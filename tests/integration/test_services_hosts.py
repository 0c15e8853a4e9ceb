"""Hosts with addresses of their own reach the servers, until their cable is pulled, and again when it is back."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

import psycopg
import pytest
from tests.patience import PATIENCE
from tests.services import PostgresServer, RabbitServer, RedisServer, guard
from tests.services.hosts import Host, Network
from tests.services.server import wait_for_end

ROOT = Path(__file__).parents[2]

# Each line of input is answered, over one connection, by what the server at argv[1]:argv[2] answers to PING.
PINGER = """
import socket, sys

with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as one:
    print(one.getsockname()[0], socket.gethostname(), flush=True)
    for line in sys.stdin:
        one.sendall(b"PING\\r\\n")
        print(one.recv(100).decode().strip(), flush=True)
"""


class Pinger:
    """A process on a host, with a connection to a Redis that it keeps."""

    def __init__(self, host: Host, server: RedisServer) -> None:
        command = [sys.executable, "-I", "-S", "-c", PINGER, server.host, str(server.port)]
        self.process = host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[str] = self.process.stdin
        self.stdout: IO[str] = self.process.stdout
        self.hello = self.stdout.readline().split()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self) -> None:
        """Have it ping."""
        self.stdin.write("\n")
        self.stdin.flush()

    def answer(self) -> str:
        """What it got."""
        return self.stdout.readline().strip()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two hosts."""
    with Network("a", "b") as network:
        yield network


def test_a_partition_cuts_one_host_and_healing_restores_it(network: Network) -> None:
    """Processes on both hosts reach a server; without its cable one doesn't, and its connection outlasts that."""
    with (
        RedisServer(host=network.address) as server,
        Pinger(network["a"], server) as a,
        Pinger(network["b"], server) as b,
    ):
        assert a.hello == [network["a"].address, "a"]
        assert b.hello == [network["b"].address, "b"]
        for each in (a, b):
            each.ask()
            assert each.answer() == "+PONG"
        network["a"].partition()
        a.ask()
        for _ in range(100):
            b.ask()
            assert b.answer() == "+PONG"
        assert not select.select([a.stdout], [], [], 0)[0]
        network["a"].heal()
        assert a.answer() == "+PONG"


def test_every_kind_of_server_is_reached(network: Network) -> None:
    """Postgres, Redis and RabbitMQ listen on the bridge and let the hosts in."""
    with (
        PostgresServer(host=network.address) as postgres,
        RedisServer(host=network.address) as redis,
        RabbitServer(host=network.address) as rabbit,
    ):
        program = f"""
import asyncio
import aio_pika, psycopg, redis

psycopg.connect({postgres.url!r}).execute("SELECT 1")
redis.Redis.from_url({redis.url!r}).ping()

async def main():
    async with await aio_pika.connect({rabbit.url!r}) as connection:
        await connection.channel()

asyncio.run(main())
"""
        for host in network.hosts.values():
            done = host.run([sys.executable, "-W", "ignore", "-c", program])
            assert done.returncode == 0, done.stderr
        with psycopg.connect(postgres.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_killed_process_of_a_host_is_the_one_that_was_started(network: Network) -> None:
    """The pid that is known is that of the command itself, so signals hit it."""
    with network["a"].popen(["sleep", "600"]) as process:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL


def test_a_killed_test_leaves_no_host() -> None:
    """Processes on the hosts, their namespaces and the bridge end with the process that made them."""
    program = """
import time
from tests.services.hosts import Network

with Network("c") as network:
    process = network["c"].popen(["sleep", "600"])
    print(network._bridge, process.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        bridge, pid = owner.stdout.readline().split()
        pids = [int(pid), *guard.descendants(owner.pid)]
        assert len(set(pids)) >= 3  # the command, what holds the namespace, its guard
        assert Path(f"/sys/class/net/{bridge}").exists()
        owner.kill()
    assert all(wait_for_end(each, seconds=10) for each in pids)
    assert not Path(f"/sys/class/net/{bridge}").exists()
