"""Private RabbitMQ servers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.services.programs import program
from tests.services.server import Server, ServerFailed, free_port

__all__ = ["RabbitCluster", "RabbitServer"]

GREETING = b"AMQP\x00\x00\x09\x01"


class RabbitServer(Server):
    """A RabbitMQ without plugins, user and password guest, from any address.

    `lines` are lines of rabbitmq.conf: `["consumer_timeout = 5000"]`. `advanced` are settings of the application
    rabbit in Erlang terms, for what rabbitmq.conf doesn't know: a consumer timeout is only looked at once a minute,
    with `advanced={"channel_tick_interval": "1000"}` once a second.

    Its durable queues with persistent messages outlast a stop and a kill, for it keeps its node name, folder and ports.
    Each has its own epmd, so none hears of the others. Starting takes about 2 seconds, stopping one or more.

    3.10.8 forgets half of a quorum queue that it has declared less than a second before a kill: the queue is listed
    afterwards, but never elects its leader, so that consuming and publishing hang or are refused, until it is deleted
    (which takes 5 seconds) and declared again. Where that isn't the point of a test, it calls `write_down` before.
    """

    name = "rabbitmq"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        lines: Sequence[str] = (),
        advanced: Mapping[str, str] | None = None,
        folder: Path | None = None,
        owner: int | None = None,
        node: str = "paigeant@localhost",
        epmd_port: int | None = None,
    ) -> None:
        super().__init__(host=host, port=port, lines=lines, folder=folder, owner=owner)
        self.advanced = dict(advanced or {})
        self.node = node
        self._distribution_port = free_port()
        self._epmd_port = epmd_port or free_port()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.host}:{self.port}/"

    def ctl(self, *args: str) -> str:
        """What `rabbitmqctl` says: `ctl("list_queues", "name", "messages")`. Takes a second or two.

        Raises ServerFailed with its complaint.
        """
        done = subprocess.run(
            [str(program("rabbitmqctl")), "--quiet", *args],
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ServerFailed(f"rabbitmqctl {' '.join(args)}: {done.stderr or done.stdout}")
        return done.stdout

    def write_down(self) -> None:
        """Have it write to the disk which quorum queues there are, which otherwise it does in its own time."""
        self.ctl("eval", "[dets:sync(Table) || Table <- dets:all()].")

    def _prepare(self) -> None:
        lines = [f"listeners.tcp.1 = {self.host}:{self.port}", "loopback_users = none", *self.lines]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        settings = ", ".join(f"{{{name}, {value}}}" for name, value in self.advanced.items())
        (self.folder / "advanced.config").write_text(f"[{{rabbit, [{settings}]}}].\n")
        (self.folder / "enabled_plugins").write_text("[].\n")

    def _command(self) -> list[str]:
        return [str(program("rabbitmq-server"))]

    def _environment(self) -> Mapping[str, str]:
        return {
            "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]),
            "HOME": str(self.folder),  # for the cookie
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),  # nor that of an installed service
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # its script becomes the server, instead of watching over it
            "ERL_CRASH_DUMP_SECONDS": "0",  # what its log says is enough
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }

    def _is_ready(self) -> bool:
        # The listeners are opened last, when the virtual host and its queues are there.
        with socket.create_connection((self.host, self.port), timeout=30.0) as one:
            one.sendall(GREETING)
            return (
                re.match(rb"\x01\x00\x00", one.recv(7)) is not None
            )  # a method on channel 0: Connection.Start


class Epmd(Server):
    """Tells the nodes of a cluster where the others are, and outlives each of them."""

    name = "epmd"

    @property
    def url(self) -> str:
        return f"{self.host}:{self.port}"

    def _prepare(self) -> None:
        """It has no files."""

    def _command(self) -> list[str]:
        return [shutil.which("epmd") or "epmd", "-address", self.host, "-port", str(self.port)]

    def _is_ready(self) -> bool:
        with socket.create_connection((self.host, self.port), timeout=30.0):
            return True


class RabbitCluster:
    """Three nodes of RabbitMQ on one host, which know each other; each may be killed and started again.

        with RabbitCluster() as cluster:       # takes half a minute
            first, *others = cluster.nodes

    Quorum queues have a replica on each. A node that was killed needs the others to come back.
    """

    def __init__(self) -> None:
        self._epmd = Epmd()
        names = [f"{name}@localhost" for name in ("one", "two", "three")]
        self.nodes = [RabbitServer(node=name, epmd_port=self._epmd.port) for name in names]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._epmd)
            for node in self.nodes:
                cookie = node.folder / ".erlang.cookie"
                cookie.write_text("paigeant")
                cookie.chmod(0o400)
                stack.enter_context(node)
                if node is not self.nodes[0]:
                    node.ctl("stop_app")
                    node.ctl("join_cluster", self.nodes[0].node)
                    node.ctl("start_app")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def write_down(self) -> None:
        """Have each node write to the disk which quorum queues there are."""
        for node in self.nodes:
            node.write_down()
