"""Where the programs of the servers are on this machine."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["PROGRAMS", "Kind", "ServerMissing", "find", "is_installed", "program"]

Kind = Literal["postgres", "redis", "rabbitmq"]

PROGRAMS: dict[Kind, tuple[str, ...]] = {
    "postgres": ("postgres", "initdb"),
    "redis": ("redis-server",),
    "rabbitmq": ("rabbitmq-server", "rabbitmqctl"),
}
"""What each kind of server needs."""

PLACES = [
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # Red Hat, from PGDG
    "/usr/local/opt/postgresql*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    # before PATH: what Debian has in /usr/sbin changes to the user rabbitmq, who may not read our folder
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/opt/rabbitmq/sbin",
    "/opt/homebrew/sbin",
    "/usr/local/sbin",
]


class ServerMissing(Exception):
    """A kind of server is not to be had on this machine; the message says all the ways to get it."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(
            f"{what} is not to be had here, and the tests need a real one.{detail and f' {detail}'} They look for, in"
            " this order: installed programs (on Debian or Ubuntu as root `make services` installs them: postgresql,"
            " redis-server, rabbitmq-server); `docker compose` with this repository's docker-compose.yml; the"
            " environment variables TEST_POSTGRES_URL, TEST_REDIS_URL, TEST_RABBITMQ_URL. Tests that start and kill"
            " servers of their own need the installed programs."
        )


def program(name: str) -> Path:
    """The program of this name, the newest one where there are several. Raises ServerMissing."""
    found = find(name)
    if found is None:
        find.cache_clear()  # it may be installed later
        raise ServerMissing(f"The program {name}")
    return found


def is_installed(kind: Kind) -> bool:
    """Whether all programs of this kind of server are there."""
    try:
        return all(program(name) for name in PROGRAMS[kind])
    except ServerMissing:
        return False


@cache
def find(name: str) -> Path | None:
    """The program of this name; None where there is none."""
    for place in PLACES:
        folders = sorted(Path("/").glob(place.lstrip("/")), key=_version, reverse=True)
        for folder in folders:
            if os.access(folder / name, os.X_OK):
                return folder / name
    # what only root has in its PATH, servers often are
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    return Path(found) if found else None


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(folder))]
