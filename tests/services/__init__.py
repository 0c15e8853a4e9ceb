"""Real servers for tests.

For ordinary tests there are fixtures (tests/conftest.py), which share one server of each kind in a run of pytest:

    postgres_url                             a new, empty database for each test
    postgres_server_url, redis_url, rabbitmq_url
                                             shared with other tests: use names of your own there, flush nothing

Tests that stop, kill, freeze or configure a server start one of their own; see `Server` for all that it can do:

    with PostgresServer(lines=["synchronous_commit = on"]) as server:
        with server.database() as url: ...
        server.restart("immediate")
    with RedisServer(lines=["maxmemory 20mb"]) as server: ...
    with RabbitServer(lines=["consumer_timeout = 5000"], advanced={"channel_tick_interval": "1000"}) as server: ...

What stands between a client and a server is `tests.services.proxy.Proxy`: it cuts, delays and swallows at any byte.
`tests.services.hosts.Network` makes hosts with addresses of their own, whose cables can be pulled.

`python -m tests.services` (make services) says which servers there are, and installs those that are missing.
"""

from tests.services.postgres import PostgresServer, new_database
from tests.services.programs import ServerMissing
from tests.services.rabbitmq import RabbitServer
from tests.services.redis import RedisServer
from tests.services.server import Server, ServerFailed, free_port
from tests.services.shared import shared_url

__all__ = [
    "PostgresServer",
    "RabbitServer",
    "RedisServer",
    "Server",
    "ServerFailed",
    "ServerMissing",
    "free_port",
    "new_database",
    "shared_url",
]
