"""Hosts of one's own on this machine: network namespaces with addresses, on one bridge, whose cables can be pulled."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tests.patience import PATIENCE
from tests.services.guarded import Guarded
from tests.services.server import temporary_folder

__all__ = ["Host", "HostsFailed", "Network"]


class HostsFailed(Exception):
    """Network namespaces could not be made; the message says why and what they need."""


class Network:
    """Hosts of these names, each with an address, and this process at `address`: where their servers have to listen.

        with Network("a", "b") as network, RedisServer(host=network.address) as server:
            worker = network["a"].popen([sys.executable, ...])     # a Popen: its pid is that of the worker
            network["a"].partition()     # nothing gets from it or to it, and nobody is told, as with a pulled cable
            network["a"].heal()

    Needs root, and of Debian's packages iproute2 (make services installs it). Leaving the block kills all processes on
    the hosts, and so does the death of this process; nothing is left of the network then. Raises HostsFailed.
    """

    def __init__(self, *names: str) -> None:
        # A random one of the networks that are for tests of networks (RFC 2544): runs at the same time don't meet.
        self._prefix = f"198.{random.choice([18, 19])}.{random.randrange(256)}"
        self._bridge = f"pt{secrets.token_hex(4)}"
        self.address = f"{self._prefix}.1"
        self.names = names
        self.hosts: dict[str, Host] = {}

    def start(self) -> None:
        """Make the bridge and the hosts."""
        if os.geteuid() != 0:
            raise HostsFailed(
                "network namespaces need root, and this is not: run these tests as root, in a container for one"
            )
        missing = [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]
        if missing:
            raise HostsFailed(
                f"found no {', '.join(missing)} here; `make services` installs iproute2 on Debian"
            )
        # An address of its own: by default it has that of one of its cables, and another one when that is pulled.
        _ip(
            "link",
            "add",
            self._bridge,
            "address",
            f"02:00:{secrets.token_bytes(4).hex(':')}",
            "type",
            "bridge",
        )
        _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number, name in enumerate(self.names):
            cable = f"{self._bridge}-{number}"
            self.hosts[name] = Host(name, f"{self._prefix}.{10 + number}", cable, self._bridge)

    def close(self) -> None:
        """Kill all processes on the hosts and take the network down."""
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()
        _ip("link", "delete", self._bridge, check=False)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Host:
    """A network namespace with one cable to the bridge, a loopback and a host name of its own; made by `Network`."""

    def __init__(self, name: str, address: str, cable: str, bridge: str) -> None:
        self.name = name
        self.address = address
        self._cable = cable
        self._folder = temporary_folder("host")
        # It does nothing but be there, so that the namespace is; it says so when it has its own.
        hold = 'echo "$0" >/proc/sys/kernel/hostname && echo ready && exec sleep infinity'
        self._holder = Guarded(
            ["unshare", "--net", "--uts", "sh", "-c", hold, name],
            folder=self._folder,
            log=self._folder / "log",
            environment={"PATH": os.environ.get("PATH", os.defpath)},
            remove=self._folder,
            network=True,
            at_end=[["ip", "link", "delete", bridge]],
        )
        try:
            self._wait_until_held()
            self._plug_in(bridge)
        except BaseException:
            self.close()
            raise

    @property
    def inside(self) -> list[str]:
        """What stands before a command that is to run on this host; it becomes that command, with the same pid."""
        return [
            "nsenter",
            f"--net=/proc/{self._holder.pid}/ns/net",
            f"--uts=/proc/{self._holder.pid}/ns/uts",
            "--",
        ]

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on this host; `options` are those of subprocess.Popen."""
        return subprocess.Popen([*self.inside, *command], **options)

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """What a command on this host gave, once it has ended, well or not. Raises subprocess.TimeoutExpired."""
        return subprocess.run(
            [*self.inside, *command], env=env, timeout=timeout, capture_output=True, text=True, check=False
        )

    def partition(self) -> None:
        """Pull its cable: from now on nothing passes, either way, and connections stay as they are."""
        _ip("link", "set", self._cable, "down")

    def heal(self) -> None:
        """Plug the cable in again. What was sent meanwhile is sent again by and by, as TCP does."""
        _ip("link", "set", self._cable, "up")

    def close(self) -> None:
        """Kill all of its processes."""
        self._holder.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_held(self) -> None:
        log = self._folder / "log"
        while "ready" not in log.read_text():
            if not self._holder.is_running:
                raise HostsFailed(f"this machine gave no network namespace: {log.read_text()}")
            time.sleep(0.001)

    def _plug_in(self, bridge: str) -> None:
        namespace = str(self._holder.pid)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", self._cable, "master", bridge, "up")
        for arguments in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
        ):
            done = self.run(["ip", *arguments])
            if done.returncode:
                raise HostsFailed(f"ip {' '.join(arguments)}: {done.stderr}")


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise HostsFailed(f"ip {' '.join(arguments)}: {done.stderr}")
