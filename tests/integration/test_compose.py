"""The health checks of docker-compose.yml, done on this machine's own servers: they tell which of them runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.services import PostgresServer, RabbitServer, RedisServer, Server
from tests.services.programs import program

SERVICES = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text())["services"]

SERVERS: dict[str, tuple[Callable[[], Server], list[str]]] = {
    "postgres": (PostgresServer, ["--port", "{port}"]),
    "redis": (RedisServer, ["-p", "{port}"]),
    "rabbitmq": (RabbitServer, []),
}
"""How each is made, and what a check needs to find one that isn't at its usual port."""


@pytest.mark.parametrize("name", SERVERS)
def test_a_health_check_tells_whether_the_server_runs(name: str) -> None:
    """With 0 while it runs, with another code when it doesn't: what `docker compose up --wait` waits for."""
    make, where = SERVERS[name]
    _, command, *args = SERVICES[name]["healthcheck"]["test"]
    with make() as server:
        place = [part.format(port=server.port) for part in where]
        # RabbitMQ's own commands find it by what stands in the environment.
        env = {**os.environ, **server._environment()}

        def check() -> int:
            line = [str(program(command)), *place, *args]
            return subprocess.run(
                line, env=env, capture_output=True, check=False, cwd=server.folder
            ).returncode

        assert check() == 0
        server.stop()
        assert check() != 0
