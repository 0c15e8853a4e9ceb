"""The servers of this repository's docker-compose.yml, for machines that have docker and no programs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.services.programs import Kind

__all__ = ["is_there", "start", "stop", "url_of"]

FILE = Path(__file__).parents[2] / "docker-compose.yml"

PORTS: dict[Kind, int] = {"postgres": 5432, "redis": 6379, "rabbitmq": 5672}


def is_there() -> bool:
    """Whether there are a docker that answers, with its command compose, and a file for it."""
    return (
        FILE.exists()
        and shutil.which("docker") is not None
        and _compose("version").returncode == 0
        and _run("docker", "info").returncode == 0
    )


def start(kind: Kind) -> str:
    """Start this service, and give its url when it is ready. Raises RuntimeError with what docker says."""
    _compose("up", "--detach", "--wait", kind, check=True)
    described = json.loads(_compose("config", "--format", "json", check=True).stdout)
    return url_of(kind, described["services"][kind])


def stop(kind: Kind) -> None:
    """Stop this service; its data stays."""
    _compose("stop", kind)


def url_of(kind: Kind, service: dict[str, Any]) -> str:
    """Where a service is that docker compose describes so, with the account that its environment makes."""
    environment = service.get("environment") or {}
    published = [port["published"] for port in service.get("ports", []) if port["target"] == PORTS[kind]]
    address = f"127.0.0.1:{published[0] if published else PORTS[kind]}"
    match kind:
        case "postgres":
            user = environment.get("POSTGRES_USER", "postgres")
            password = environment.get("POSTGRES_PASSWORD")
            account = f"{user}:{password}" if password else user
            return f"postgresql://{account}@{address}/{environment.get('POSTGRES_DB', user)}"
        case "redis":
            return f"redis://{address}/0"
        case "rabbitmq":
            user = environment.get("RABBITMQ_DEFAULT_USER", "guest")
            return f"amqp://{user}:{environment.get('RABBITMQ_DEFAULT_PASS', 'guest')}@{address}/"


def _compose(*args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    done = _run("docker", "compose", "--file", str(FILE), *args)
    if check and done.returncode:
        raise RuntimeError(f"docker compose {' '.join(args)}: {done.stderr}")
    return done


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
