"""The proxy lets pass, cuts, delays and swallows exactly what it is told, between real clients and real servers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from tests.patience import PATIENCE
from tests.services import PostgresServer, RedisServer, free_port
from tests.services.proxy import Direction, Proxy

PING = b"PING\r\n"
PONG = b"+PONG\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis behind the proxy."""
    with RedisServer(appendonly=False) as server:
        yield server


@pytest.fixture
def direct(server: RedisServer) -> Iterator[redis.Redis]:
    """A client that goes past the proxy."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    """A proxy before the server."""
    with Proxy(server.host, server.port) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    """A connection through the proxy, which has passed both ways."""
    one = socket.create_connection((proxy.host, proxy.port), timeout=PATIENCE)
    assert ask(one, PING) == PONG
    return one


def ask(one: socket.socket, request: bytes) -> bytes:
    """What comes back first."""
    one.sendall(request)
    return one.recv(1000)


def rest(one: socket.socket) -> tuple[bytes, Literal["reset", "close"]]:
    """All that comes, and how it ends."""
    got = b""
    try:
        while data := one.recv(1000):
            got += data
    except ConnectionResetError:
        return got, "reset"
    return got, "close"


def test_passes_on_and_counts(proxy: Proxy) -> None:
    """Untold it changes nothing, and counts bytes and connections."""
    with connect(proxy) as one, connect(proxy) as two:
        assert ask(one, PING * 2) == PONG * 2
        assert proxy.open_connections == 2
        two.shutdown(socket.SHUT_WR)
        assert rest(two) == (b"", "close")
    assert proxy.connections == 2
    assert proxy.passed == {"to_server": 4 * len(PING), "to_client": 4 * len(PONG)}
    assert proxy.cuts == 0


def test_a_large_message_passes_whole(proxy: Proxy) -> None:
    """More than all buffers hold, in both directions."""
    with redis.Redis.from_url(proxy.url("redis://127.0.0.1:1/0")) as client:
        value = bytes(range(256)) * 40_000
        client.set("large", value)
        assert client.get("large") == value


def test_its_url_is_that_of_the_server_elsewhere(proxy: Proxy) -> None:
    """Accounts, database and options stay."""
    url = proxy.url("amqp://guest:p%40ss@10.0.0.1:5672/host?heartbeat=5")
    assert url == f"amqp://guest:p%40ss@127.0.0.1:{proxy.port}/host?heartbeat=5"


@pytest.mark.parametrize("ending", ["reset", "close"])
def test_cut_ends_what_is_open(proxy: Proxy, ending: Literal["reset", "close"]) -> None:
    """With RST or FIN; whoever connects afterwards is served."""
    with connect(proxy) as one:
        proxy.cut(ending)
        assert rest(one) == (b"", ending)
        assert proxy.open_connections == 0
    with connect(proxy):
        pass


def test_blackhole_to_the_server(proxy: Proxy, direct: redis.Redis) -> None:
    """What is sent arrives only when it resumes; until then the connection looks alive."""
    with connect(proxy) as one:
        proxy.blackhole("to_server")
        one.sendall(b"SET a 1\r\n")
        one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            one.recv(1)
        assert direct.get("a") is None
        proxy.resume()
        one.settimeout(10)
        assert one.recv(100) == b"+OK\r\n"
        assert direct.get("a") == b"1"


def test_blackhole_to_the_client(proxy: Proxy, direct: redis.Redis) -> None:
    """The server does what it was asked, and nobody hears of it; not even that the server has hung up."""
    with connect(proxy) as one:
        proxy.blackhole("to_client")
        one.sendall(b"SET a 1\r\nQUIT\r\n")
        one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            one.recv(1)
        assert direct.get("a") == b"1"
        proxy.resume()
        one.settimeout(10)
        assert rest(one) == (b"+OK\r\n+OK\r\n", "close")


def test_delay(proxy: Proxy) -> None:
    """Each direction is that much later, and order is kept."""
    with connect(proxy) as one:
        proxy.delay(0.1)
        began = time.monotonic()
        assert ask(one, PING) == PONG
        assert time.monotonic() - began >= 0.2
        proxy.resume()
        proxy.delay(0.1, "to_client")
        began = time.monotonic()
        one.sendall(b"ECHO 1\r\n")
        one.sendall(b"ECHO 2\r\n")
        got = b""
        while len(got) < 14:
            got += one.recv(100)
        assert got == b"$1\r\n1\r\n$1\r\n2\r\n"
        assert time.monotonic() - began >= 0.1


def test_refuse(proxy: Proxy) -> None:
    """Nobody gets in, and who was in is out, until it resumes, on the same port."""
    with connect(proxy) as one:
        proxy.refuse()
        assert rest(one) == (b"", "reset")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((proxy.host, proxy.port), timeout=PATIENCE)
    proxy.resume()
    with connect(proxy):
        pass


def test_a_server_that_is_down_resets() -> None:
    """A client sees its connection break."""
    with Proxy("127.0.0.1", free_port()) as other, pytest.raises(ConnectionResetError):
        _connect_and_read(other)


def _connect_and_read(proxy: Proxy) -> bytes:
    with socket.create_connection((proxy.host, proxy.port), timeout=PATIENCE) as one:
        return one.recv(1)


@pytest.mark.parametrize("ending", ["reset", "close"])
def test_cut_at_every_byte_to_the_server(
    proxy: Proxy, direct: redis.Redis, ending: Literal["reset", "close"]
) -> None:
    """Exactly so many bytes of a command arrive; only the whole one has an effect."""
    command = b"INCR a\r\n"
    for count in range(len(command) + 1):
        with connect(proxy) as one:
            before = proxy.passed["to_server"]
            proxy.cut_after("to_server", count, ending=ending)
            one.sendall(command)
            assert rest(one)[1] == ending
            proxy.wait_for_cut()
            assert proxy.passed["to_server"] - before == count
    with connect(proxy):
        pass
    assert proxy.cuts == len(command) + 1
    assert direct.get("a") == b"1"


@pytest.mark.parametrize("ending", ["reset", "close"])
def test_cut_at_every_byte_to_the_client(proxy: Proxy, ending: Literal["reset", "close"]) -> None:
    """Exactly so many bytes of an answer arrive, with a reset, too, that comes right after them."""
    for count in range(len(PONG) + 1):
        with connect(proxy) as one:
            proxy.cut_after("to_client", count, ending=ending)
            one.sendall(PING)
            assert rest(one) == (PONG[:count], ending)


def test_silence_from_a_byte_on(proxy: Proxy, direct: redis.Redis) -> None:
    """A cut may be a blackhole both ways; the rest arrives when it resumes."""
    with connect(proxy) as one, connect(proxy) as two:
        proxy.cut_after("to_client", 3, ending="blackhole")
        assert ask(one, PING) == PONG[:3]
        proxy.wait_for_cut()
        one.settimeout(0.2)
        two.settimeout(0.2)
        two.sendall(b"SET a 1\r\n")
        for each in (one, two):
            with pytest.raises(TimeoutError):
                each.recv(1)
        assert direct.get("a") is None
        proxy.resume()
        one.settimeout(10)
        two.settimeout(10)
        assert one.recv(100) == PONG[3:]
        assert two.recv(100) == b"+OK\r\n"


def test_counted_over_all_connections(proxy: Proxy) -> None:
    """Without `each` all connections share one count, and all end."""
    with connect(proxy) as one, connect(proxy) as two:
        proxy.cut_after("to_client", 2 * len(PONG))
        assert ask(one, PING) == PONG
        assert ask(two, PING) == PONG
        assert rest(one) == (b"", "reset")
        assert rest(two) == (b"", "reset")


def test_counted_for_each_connection(proxy: Proxy) -> None:
    """With `each` every connection ends after its own bytes, later ones too, until it resumes."""
    with connect(proxy) as one, connect(proxy) as two:
        proxy.cut_after("to_client", len(PONG) + 1, each=True)
        assert ask(one, PING) == PONG
        assert ask(two, PING) == PONG
        one.sendall(PING)
        assert rest(one) == (PONG[:1], "reset")
        assert proxy.open_connections == 1
        with connect(proxy) as three:
            three.sendall(PING)
            assert rest(three) == (PONG[:1], "reset")
        assert proxy.cuts == 2
        proxy.resume()
        assert ask(two, PING) == PONG


def test_a_cut_that_is_forgotten_before_its_bytes_have_arrived_is_none() -> None:
    """Told to resume meanwhile, it passes on, and nothing is cut afterwards."""
    sent = b"x" * 400_000
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)  # most of it has to wait on its way
        with (
            Proxy(*listener.getsockname()) as proxy,
            socket.create_connection((proxy.host, proxy.port), timeout=PATIENCE) as one,
        ):
            theirs, _ = listener.accept()
            with theirs:
                theirs.settimeout(10)
                proxy.cut_after("to_server", len(sent), ending="blackhole")
                one.sendall(sent)
                until = time.monotonic() + PATIENCE
                while proxy.passed["to_server"] < len(sent):
                    assert time.monotonic() < until
                proxy.resume()
                one.sendall(b"y")
                got = 0
                while got <= len(sent):
                    got += len(theirs.recv(65536))
        assert proxy.cuts == 0


def test_waiting_for_a_cut_has_an_end(proxy: Proxy) -> None:
    """A cut that doesn't come is an error that says how far it got."""
    proxy.cut_after("to_server", 1)
    with pytest.raises(TimeoutError, match="no cut after"):
        proxy.wait_for_cut(0.01)


def test_nothing_is_left_of_it(server: RedisServer) -> None:
    """Closed amid a blackhole, it leaves no thread and no connection."""
    with Proxy(server.host, server.port) as proxy:
        one = connect(proxy)
        proxy.blackhole()
        one.sendall(PING)
    assert rest(one) == (b"", "reset")
    one.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "proxy"]


@pytest.mark.parametrize(
    ("direction", "length"),
    [
        ("to_server", 12),  # Query "COMMIT"
        ("to_client", 18),  # CommandComplete and ReadyForQuery
    ],
)
def test_a_commit_of_postgres_at_every_byte(postgres_url: str, direction: Direction, length: int) -> None:
    """Cut on its way there, nothing is committed; on its way back, all is; and the client can't tell which."""
    server = urlsplit(postgres_url)
    assert server.hostname is not None
    assert server.port is not None
    with (
        Proxy(server.hostname, server.port) as proxy,
        psycopg.connect(postgres_url, autocommit=True) as direct,
    ):
        direct.execute("CREATE TABLE t (n int)")
        for count in range(length):
            with psycopg.connect(proxy.url(postgres_url)) as connection:
                connection.execute("INSERT INTO t VALUES (%s)", [count])
                proxy.cut_after(direction, count)
                with pytest.raises(psycopg.OperationalError):
                    connection.commit()
        rows = direct.execute("SELECT n FROM t ORDER BY n").fetchall()
    assert [n for (n,) in rows] == (list(range(length)) if direction == "to_client" else [])


def test_servers_behind_a_proxy_are_whole(server: RedisServer) -> None:
    """A private server is reached by its own url and through a proxy alike."""
    with PostgresServer() as postgres, Proxy(postgres.host, postgres.port) as proxy:
        with psycopg.connect(proxy.url(postgres.url)) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        postgres.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(proxy.url(postgres.url))
