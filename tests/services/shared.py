"""One server of each kind for a whole run of pytest, shared by all its processes and started when first asked for.

What these servers give is for ordinary tests: they may be used, and may not be stopped, flushed or reconfigured.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.services import docker
from tests.services.postgres import PostgresServer
from tests.services.programs import Kind, ServerMissing, is_installed
from tests.services.rabbitmq import RabbitServer
from tests.services.redis import RedisServer
from tests.services.server import Server, temporary_folder, wait_for_end
from tests.services.session import session_folder, session_owner

__all__ = ["VARIABLES", "shared_url", "stop_shared"]

VARIABLES: dict[Kind, str] = {
    "postgres": "TEST_POSTGRES_URL",
    "redis": "TEST_REDIS_URL",
    "rabbitmq": "TEST_RABBITMQ_URL",
}

_started: list[Server] = []
"""Kept, for what is forgotten while it runs is warned of."""


def shared_url(kind: Kind) -> str:
    """Where the shared server of this kind is. Raises ServerMissing, or what went wrong with its start, each time."""
    with (session_folder() / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = session_folder() / f"{kind}.json"
        if not file.exists():
            file.write_text(json.dumps(_begin(kind)))
        found: dict[str, Any] = json.loads(file.read_text())
    if "error" in found:
        raise ServerMissing(kind, found["error"])
    return str(found["url"])


def stop_shared() -> None:
    """Stop what `shared_url` has started in this session, in whichever process."""
    for file in session_folder().glob("*.json"):
        found = json.loads(file.read_text())
        if "guard" in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found["guard"], signal.SIGTERM)
            wait_for_end(found["guard"])
        if "docker" in found:
            docker.stop(found["docker"])
    for server in _started:
        server.close()


def _begin(kind: Kind) -> dict[str, Any]:
    # What a first attempt has cost is not spent again by each test: the error is kept as well.
    try:
        if is_installed(kind):
            # a new one: whoever tried before may have been killed in the midst of it
            server = _server(kind, temporary_folder(kind, inside=session_folder()), session_owner())
            server.remove = session_folder()
            _started.append(server)
            server.start()
            return {"url": server.url, "guard": server.guard_pid}
        if docker.is_there():
            return {"url": docker.start(kind), "docker": kind}
        return {"url": os.environ[VARIABLES[kind]]}
    except KeyError as error:
        return {"error": f"Its programs and docker are missing, and {error.args[0]} is not set."}
    except Exception as error:
        return {"error": str(error)}


def _server(kind: Kind, folder: Path, owner: int) -> Server:
    match kind:
        case "postgres":
            # Nobody cuts the power of these, and files that nobody waits for make room for the tests that do.
            lines = ["fsync = off", "full_page_writes = off"]
            return PostgresServer(folder=folder, owner=owner, lines=lines)
        case "redis":
            return RedisServer(folder=folder, owner=owner, appendonly=False)
        case "rabbitmq":
            return RabbitServer(folder=folder, owner=owner)
