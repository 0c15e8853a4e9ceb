"""Private Redis servers of special kinds: a cluster, a primary with a replica and a sentinel, one that speaks TLS."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from tests.patience import PATIENCE
from tests.services import RedisServer, ServerFailed, free_port
from tests.services.programs import program

__all__ = ["Cluster", "Sentinels", "redis_cluster", "redis_sentinels", "redis_tls", "wait_until"]

_NODE = [
    "cluster-enabled yes",
    "cluster-node-timeout 3000",
]  # on a busy machine one may be silent for a while
_LAST_PORT = 22_000  # of a node: 10,000 above begin the ports of outgoing connections


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Return once `holds` gives something true. Raises ServerFailed when it doesn't in the end."""
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(RedisError, OSError):
            if holds():
                return
        if time.monotonic() > until:
            raise ServerFailed(f"waited {PATIENCE:.0f} s in vain until {what}")
        time.sleep(0.02)


# --- a cluster ---


@dataclass(frozen=True)
class Cluster:
    """Three primaries that share the slots, and their replicas."""

    nodes: Sequence[RedisServer]

    @property
    def url(self) -> str:
        return f"redis://{','.join(f'{node.host}:{node.port}' for node in self.nodes)}?cluster=true"

    def client(self, node: RedisServer) -> Redis:
        return Redis(host=node.host, port=node.port)

    def primary(self, key: str) -> RedisServer:
        """The node that serves `key` now, as the one says that is alive and the last of all."""
        with self.client([node for node in self.nodes if node.is_running][-1]) as client:
            slot = client.execute_command("CLUSTER KEYSLOT", key)
            port = next(
                first[1]
                for begin, end, first, *_ in client.execute_command("CLUSTER SLOTS")
                if begin <= slot <= end
            )
        return next(node for node in self.nodes if node.port == port)

    def move_slot(self, key: str) -> None:
        """Move the slot of `key`, with all that is in it, from the node that has it to the next one."""
        source = self.nodes.index(self.primary(key))
        self.hand_over(key, self.nodes[(source + 1) % len(self.nodes)])()

    def hand_over(self, key: str, target: RedisServer) -> Callable[[], None]:
        """Begin to move the slot of `key` to `target`, where all that is in it is then; gives what ends the move."""
        source = self.primary(key)
        with self.client(source) as giver, self.client(target) as taker:
            slot = giver.execute_command("CLUSTER KEYSLOT", key)
            giving, taking = (each.execute_command("CLUSTER MYID") for each in (giver, taker))
            taker.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", giving)
            giver.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", taking)
            while keys := giver.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
                giver.execute_command("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)

        def end() -> None:
            for node in dict.fromkeys((target, source, *self.nodes)):
                with self.client(node) as client:
                    client.execute_command("CLUSTER SETSLOT", slot, "NODE", taking)

        return end

    @contextlib.contextmanager
    def joined(self) -> Iterator[RedisServer]:
        """One more node, which serves no slot yet."""
        with RedisServer(port=_node_port(), lines=_NODE) as node, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.client(each)) for each in (*self.nodes, node)]
            clients[-1].execute_command("CLUSTER MEET", self.nodes[0].host, self.nodes[0].port)
            wait_until(
                lambda: all(
                    (found := client.execute_command("CLUSTER INFO"))["cluster_state"] == "ok"
                    and int(found["cluster_known_nodes"]) == len(clients)
                    for client in clients
                ),
                "all know the new node",
            )
            yield node


@contextlib.contextmanager
def redis_cluster(*, replicas: int = 0) -> Iterator[Cluster]:
    """A cluster of three primaries, each with so many replicas, ready for use."""
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(RedisServer(port=_node_port(), lines=_NODE)) for _ in range(3 + 3 * replicas)
        ]
        cluster = Cluster(nodes)
        addresses = [f"{node.host}:{node.port}" for node in nodes]
        _run(
            "redis-cli",
            "--cluster",
            "create",
            *addresses,
            "--cluster-replicas",
            str(replicas),
            "--cluster-yes",
        )
        clients = [stack.enter_context(cluster.client(node)) for node in nodes]
        wait_until(
            lambda: all(
                client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for client in clients
            ),
            "the cluster serves all slots",
        )
        wait_until(
            lambda: all(len(each) == 3 + replicas for each in clients[0].execute_command("CLUSTER SLOTS")),
            "each primary has its replicas",
        )
        yield cluster


def _node_port() -> int:
    """A free port, and so is the one 10,000 above, where the node speaks with the others."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as one:
            if port < _LAST_PORT:
                one.bind(("127.0.0.1", port + 10_000))
                return port


# --- sentinels ---


class _SentinelServer(RedisServer):
    def _prepare(self) -> None:
        lines = [f"bind {self.host}", f"port {self.port}", f"dir {self.folder}", *self.lines]
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _command(self) -> list[str]:
        return [*super()._command(), "--sentinel"]


@dataclass(frozen=True)
class Sentinels:
    """A primary and its replica, both with a password, and a sentinel that watches them."""

    first: RedisServer
    second: RedisServer
    sentinel: RedisServer
    password: str

    @property
    def url(self) -> str:
        gone = f"127.0.0.1:{free_port()}"  # one of the sentinels named may be away
        return f"redis://:{self.password}@{gone},127.0.0.1:{self.sentinel.port}/0?sentinel=main"

    def primary(self) -> int:
        """The port of the primary as the sentinel has it now."""
        with Redis(port=self.sentinel.port) as client:
            return int(client.sentinel_get_master_addr_by_name("main")[1])


@contextlib.contextmanager
def redis_sentinels() -> Iterator[Sentinels]:
    """All of it ready: the replica is in step, and the sentinel knows it."""
    password = "not-a-secret"
    ours = [f"requirepass {password}", f"masterauth {password}", "repl-diskless-sync-delay 0"]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(RedisServer(lines=ours))
        follow = [*ours, f"replicaof {first.host} {first.port}"]
        second = stack.enter_context(RedisServer(lines=follow))
        watch = [
            f"sentinel monitor main {first.host} {first.port} 1",
            f"sentinel auth-pass main {password}",
            "sentinel down-after-milliseconds main 2000",
            "sentinel failover-timeout main 5000",
        ]
        sentinel = stack.enter_context(_SentinelServer(lines=watch))
        client = stack.enter_context(Redis(port=second.port, password=password))
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica is in step")
        observer = stack.enter_context(Redis(port=sentinel.port))
        wait_until(
            lambda: any(
                "disconnected" not in str(each["flags"]) and "s_down" not in str(each["flags"])
                for each in observer.sentinel_slaves("main")
            ),
            "the sentinel knows the replica",
        )
        yield Sentinels(first, second, sentinel, password)


# --- TLS ---


class _TlsServer(RedisServer):
    """Listens with TLS on its port and without on another, which only its start needs."""

    def _prepare(self) -> None:
        self.plain_port = free_port()
        super()._prepare()
        text = (self.folder / "redis.conf").read_text()
        text = text.replace(f"port {self.port}\n", f"port {self.plain_port}\ntls-port {self.port}\n", 1)
        (self.folder / "redis.conf").write_text(text)

    def _is_ready(self) -> bool:
        with Redis(port=self.plain_port) as client:
            return bool(client.ping())


@contextlib.contextmanager
def redis_tls(folder: Path) -> Iterator[tuple[RedisServer, Path]]:
    """A server that speaks TLS, with its certificate, which signs itself and is made in `folder`."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    _run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject,
         "-keyout", str(key), "-out", str(certificate))  # fmt: skip
    lines = [
        f"tls-cert-file {certificate}",
        f"tls-key-file {key}",
        f"tls-ca-cert-file {certificate}",
        "tls-auth-clients no",
    ]
    with _TlsServer(lines=lines) as server:
        yield server, certificate


def _run(*command: str) -> None:
    name, *rest = command
    path = str(program(name)) if name.startswith("redis") else name
    done = subprocess.run([path, *rest], capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise ServerFailed(f"{name} ended with {done.returncode}: {done.stdout}{done.stderr}")
