"""What can be wrong at the servers, and what to do about it: redis-py's errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as TimedOut

from paigeant.errors import ConfigurationError, TopicUnavailable, TransportUnavailable
from paigeant.transports.redis.place import Place, one_line

__all__ = ["FAILURES", "LOST", "TROUBLE", "explained", "no_memory", "refusal", "told"]

LOST = (Disconnected, OSError, RuntimeError, AttributeError, TypeError)
"""What a lost connection raises. A write on one that is closed is a RuntimeError of uvloop's, and an AttributeError or
TypeError of asyncio's in Python 3.12 and 3.13.0 to 3.13.5 (github.com/python/cpython/issues/136234); redis-py passes
them on."""

TROUBLE = (RedisError, RedisClusterException, *LOST)
"""What redis-py raises."""

FAILURES = (*TROUBLE, TransportUnavailable)
"""What may be over after a while."""

_REFUSALS = (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    NoPermissionError,
)


@contextlib.contextmanager
def told(place: Place) -> Iterator[None]:
    """Raises TransportUnavailable for redis-py's errors in the block."""
    try:
        yield
    except TROUBLE as exc:
        if isinstance(exc, NoPermissionError) or str(exc).startswith("WRONGTYPE"):
            raise TopicUnavailable(explained(exc, place)) from exc
        raise TransportUnavailable(explained(exc, place)) from exc


def refusal(exc: BaseException, place: Place) -> ConfigurationError | TransportUnavailable:
    """What `connect` raises: settings that can't work, or a server that isn't there now."""
    # What a node of a cluster has said stands in the errors behind, if at all.
    for said in _behind(exc):
        if _is_refusal(said):
            return ConfigurationError(explained(said, place))
    text = one_line(str(exc))
    if "DB index is out of range" in text or "invalid DB index" in text:
        return ConfigurationError(f"redis at {place.where} has no such database: {text}")
    if "Cluster mode is not enabled" in text:
        return ConfigurationError(
            f"redis at {place.where} is no cluster; remove cluster=true from transport_url"
        )
    if place.service is not None and "SENTINEL" in text and "unknown command" in text:
        return ConfigurationError(
            f"one of redis at {place.where} is no sentinel; name sentinels in transport_url (their port is 26379 "
            f"mostly), or the primary itself without sentinel={place.service}"
        )
    return TransportUnavailable(explained(exc, place))


def _is_refusal(exc: BaseException) -> bool:
    """Whether it is about who asks."""
    return isinstance(exc, _REFUSALS) or str(exc).startswith("NOAUTH")


def _behind(exc: BaseException | None) -> Iterator[BaseException]:
    """The error, that which led to it, ..."""
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def explained(exc: BaseException, place: Place) -> str:
    """What is wrong at the server, and what to do."""
    where, text = place.where, one_line(str(exc))
    match exc:
        case TransportUnavailable():
            return text
        case _ if _is_refusal(exc):
            return (
                f"redis at {where} refuses {place.user}: {text}; "
                "check the user name and password in transport_url, and what the ACL of that user allows"
            )
        case OutOfMemoryError():
            return no_memory(where)
        case ReadOnlyError():
            return f"redis at {where} is a replica now and can't be written to: name its primary, or its sentinels"
        case BusyLoadingError():
            return f"redis at {where} is still loading its data: try again when it has"
        case MasterNotFoundError():
            return (
                f"no sentinel of {where} names a healthy primary '{place.service}': check the name and that "
                "they run; if they ask for a password, give sentinel_password"
            )
        case ResponseError() if text.startswith("MISCONF"):
            return f"redis at {where} can't write to its disk and takes no messages: see its log ({text})"
        case AskError():
            return f"redis at {where} moves these keys to {exc.host}:{exc.port}: they are looked for there"
        case ResponseError():
            return f"redis at {where} refuses: {text}"
        case TimedOut() | TimeoutError():
            return (
                f"redis at {where} doesn't answer: check that it runs, that the network lets it be reached, and "
                f"whether it speaks TLS ({place.scheme}:// was asked for)"
            )
        case _:
            return f"redis at {where} can't be reached: {text or type(exc).__name__}; {_hint(text.lower())}"


def no_memory(where: str) -> str:
    """What to do about a server that is full."""
    return f"redis at {where} has no memory left: raise its maxmemory, or let workers catch up"


def _hint(text: str) -> str:
    if "max number of clients" in text:
        return "raise its maxclients, or find out who has so many connections (CLIENT LIST)"
    if "certificate" in text:
        return "check its certificate, and name the authority that signed it with ssl_ca_certs=/path"
    if "ssl" in text:
        return "it seems not to speak TLS: write redis:// instead of rediss://"
    return "check that it runs, that the address is right, and whether it speaks TLS (rediss://)"
