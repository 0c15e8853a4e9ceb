"""The servers of this repository's docker-compose.yml, for machines that have docker and no programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

__all__ = ["is_there", "start", "stop"]

FILE = Path(__file__).parents[2] / "docker-compose.yml"

URLS = {
    "postgres": "postgresql://postgres:postgres@127.0.0.1:5432/postgres",
    "redis": "redis://127.0.0.1:6379/0",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672/",
}


def is_there() -> bool:
    """Whether there are a docker that answers and a file for it."""
    return FILE.exists() and shutil.which("docker") is not None and _run("docker", "info").returncode == 0


def start(service: str) -> str:
    """Start this service, and give its url when it is ready. Raises RuntimeError with what docker says."""
    done = _compose("up", "--detach", "--wait", service)
    if done.returncode:
        raise RuntimeError(f"docker compose up {service}: {done.stderr}")
    return URLS[service]


def stop(service: str) -> None:
    """Stop this service; its data stays."""
    _compose("stop", service)


def _compose(*args: str) -> subprocess.CompletedProcess[str]:
    return _run("docker", "compose", "--file", str(FILE), *args)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
