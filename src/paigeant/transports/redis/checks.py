"""Whether servers will do, as far as they say it themselves: asked once, when the transport connects."""

from __future__ import annotations

import contextlib
import logging

from redis.exceptions import NoPermissionError, ResponseError

from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.transports.redis.line import Line
from paigeant.transports.redis.place import Place
from paigeant.transports.redis.servers import Servers
from paigeant.transports.redis.trouble import no_memory

__all__ = ["check", "check_room"]

log = logging.getLogger("paigeant.transports.redis")

_OLDEST_VERSION = (6, 2)


async def check(servers: Servers) -> None:
    """Raises ConfigurationError for servers that can't carry messages, or would lose them."""
    for where, line in servers.lines():
        info = await _info(line)
        _check_kind(where, info, servers.place)
        policy = info.get("maxmemory_policy") or await _policy(line)
        if policy is None:
            # Where not even this is answered, something else is wrong, and is told instead: no such database, say.
            with contextlib.suppress(NoPermissionError):
                await line.call(("TIME",))
        _check_policy(where, policy)


async def check_room(servers: Servers) -> None:
    """Raises TransportUnavailable for a server, or a node of the cluster, that has no memory left for messages."""
    for where, line in servers.lines():
        info = await _info(line)
        used, most = info.get("used_memory", ""), info.get("maxmemory", "")
        if used.isdecimal() and most.isdecimal() and 0 < int(most) < int(used):
            raise TransportUnavailable(no_memory(where))


def _check_kind(where: str, info: dict[str, str], place: Place) -> None:
    version = info.get("redis_version", "")
    if version and _numbers(version) < _OLDEST_VERSION:
        raise ConfigurationError(
            f"redis at {where} is version {version}, expected 6.2 or newer, which has XAUTOCLAIM; upgrade it"
        )
    if info.get("redis_mode") == "sentinel":
        raise ConfigurationError(
            f"redis at {where} is a sentinel, which holds no messages; add the name by which it knows the primary to "
            "transport_url (redis://host:26379/0?sentinel=name)"
        )
    if info.get("redis_mode") == "cluster" and not place.is_cluster:
        raise ConfigurationError(
            f"redis at {where} is a node of a cluster; add cluster=true to the parameters of transport_url"
        )
    if info.get("role") == "slave" and place.service is None:
        raise ConfigurationError(
            f"redis at {where} is a replica, which can't be written to; name its primary in transport_url, "
            "or the sentinels (redis://host:26379/0?sentinel=name)"
        )


def _check_policy(where: str, policy: str | None) -> None:
    if policy is None:
        log.warning(
            "redis at %s lets neither INFO nor CONFIG GET be read, so its maxmemory-policy is unknown; "
            "make sure that it is noeviction, else messages may be dropped",
            where,
        )
    elif policy.startswith("allkeys"):
        # The volatile policies take away only keys that expire; none of ours does.
        raise ConfigurationError(
            f"redis at {where} has maxmemory-policy {policy}, which drops whole topics when memory is short; "
            "set it to noeviction: redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf"
        )


async def _info(line: Line) -> dict[str, str]:
    try:
        text = (await line.call(("INFO",))).decode(errors="replace")
    except ResponseError:  # not permitted, or renamed
        return {}
    return dict(pair.split(":", 1) for pair in text.splitlines() if ":" in pair)


async def _policy(line: Line) -> str | None:
    try:
        answer = await line.call(("CONFIG", "GET", "maxmemory-policy"))
    except ResponseError:
        return None
    return str(answer[1].decode()) if len(answer) == 2 else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
