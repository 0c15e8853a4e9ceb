"""The transports, a file or a package each. `open_transport` gives the one that a URL names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs

from paigeant.errors import ConfigurationError
from paigeant.extras import how_to_install
from paigeant.urls import begin_of, check_readable, parts_of

if TYPE_CHECKING:
    from paigeant.clock import Clock
    from paigeant.database import Database
    from paigeant.envelope import Envelope
    from paigeant.transport import Transport

__all__ = ["SCHEMES", "open_transport"]

_ADAPTERS = {
    "memory": ("memory", "MemoryTransport"),
    "sqlite": ("sqlite", "SqliteTransport"),
    "postgresql": ("postgres", "PostgresTransport"),
    "redis": ("redis", "RedisStreamTransport"),
    "rediss": ("redis", "RedisStreamTransport"),
    "amqp": ("rabbitmq", "RabbitMQTransport"),
    "amqps": ("rabbitmq", "RabbitMQTransport"),
}
SCHEMES = tuple(_ADAPTERS)


def open_transport(
    url: str,
    *,
    database: Database | None = None,
    clock: Clock | None = None,
    envelope: Envelope | None = None,
    namespace: str = "paigeant",
    queue_type: Literal["quorum", "classic"] = "quorum",
) -> Transport:
    """The transport that `url` names, yet to be connected. `database`: the open one to share with a store.

    `envelope` seals and opens messages. `namespace` begins the names of a broker's queues and keys; `queue_type`
    is that of RabbitMQ's queues. What the URL itself says of the two stands above that.
    Raises ConfigurationError for a URL of an unknown scheme, and where the library that it needs isn't installed.
    """
    scheme = url.partition("://")[0]
    if scheme not in _ADAPTERS:
        raise ConfigurationError(
            f"transport_url begins with {begin_of(url) or 'no scheme'}, for which there is no transport; "
            "expected one of " + ", ".join(f"{name}://" for name in SCHEMES)
        )
    check_readable(url)
    adapter = _adapter(scheme)
    made: Transport
    match scheme:
        case "memory":
            made = adapter(clock=clock, envelope=envelope)
        case "sqlite" | "postgresql":
            from paigeant.databases import open_database

            made = adapter(database or open_database(url, clock=clock), envelope=envelope)
        case "redis" | "rediss":
            made = adapter(url, namespace=namespace, envelope=envelope)
        case _:
            told = parse_qs(parts_of(url).query)
            made = adapter(
                url,
                namespace=None if "namespace" in told else namespace,
                envelope=envelope,
                queue_type=None if "queue_type" in told else queue_type,
                clock=clock,
            )
    return made


def _adapter(scheme: str) -> Any:
    module, name = _ADAPTERS[scheme]
    try:
        return getattr(import_module(f"paigeant.transports.{module}"), name)
    except ImportError as exc:
        raise ConfigurationError(
            f"{scheme}:// needs a library that is not installed ({exc.name or exc}); "
            f"expected: {how_to_install(module)}"
        ) from exc
