"""Where the servers are: what a URL says of them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from redis.asyncio import Connection, ConnectionPool, SSLConnection
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from paigeant.clock import is_duration
from paigeant.errors import ConfigurationError
from paigeant.urls import begin_of, check_parameters, check_readable, parts_of

__all__ = ["Place", "one_line"]

_SCHEMES = ("redis", "rediss")
_OWN = ("namespace", "sentinel", "cluster", "sentinel_username", "sentinel_password")
"""The parameters that are ours; the others are redis-py's."""

_NOT_TAKEN = ("host", "port", "protocol", "decode_responses", "himport_registry", "retry")
"""Of what redis-py reads in a URL: that is chosen elsewhere."""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says. Its text is never shown: it may hold a password."""

    nodes: tuple[Address, ...]
    options: dict[str, Any] = field(repr=False)
    """What redis-py's connections take."""
    is_tls: bool
    is_cluster: bool
    service: str | None
    """The name by which sentinels know the primary; the nodes are these sentinels then."""
    sentinel_options: dict[str, Any] = field(repr=False)
    namespace: str | None

    @property
    def where(self) -> str:
        """The addresses, for messages."""
        return ", ".join(f"{_bracketed(name)}:{port}" for name, port in self.nodes)

    @property
    def scheme(self) -> str:
        return "rediss" if self.is_tls else "redis"

    @property
    def user(self) -> str:
        """Who logs in, for messages."""
        name = self.options.get("username")
        return f"user '{name}'" if name else "the default user"

    @classmethod
    def read(cls, url: str) -> Place:
        """The place that `url` names. Raises ConfigurationError for one that can't work."""
        if url.partition("://")[0] not in _SCHEMES:
            raise ConfigurationError(f"expected a redis:// or rediss:// URL, found {begin_of(url) or 'none'}")
        check_readable(url)
        check_parameters(url, (*_OWN, *_of_library()))
        parts = parts_of(url)
        own, others = _parameters(parts.query)
        service = own.get("sentinel")
        is_cluster = own.get("cluster", "false").lower() in ("1", "true", "yes")
        default = 6379 if service is None else 26379
        nodes = tuple(_address(each, default) for each in parts.servers.split(",") if each)
        nodes = nodes or (("localhost", default),)
        database = parts.path.strip("/")
        _check(nodes, database, service, is_cluster=is_cluster)
        name, port = nodes[0]
        others.pop("protocol", None)  # see Servers: it is chosen there
        login = f"{parts.login}@" if parts.login else ""
        one = f"{url.partition('://')[0]}://{login}{_bracketed(name)}:{port}/{database}?{urlencode(others)}"
        options, is_tls = _options(one)
        begin = "sentinel_"
        of_sentinels = {name.removeprefix(begin): own[name] for name in own if name.startswith(begin)}
        return cls(nodes, options, is_tls, is_cluster, service, of_sentinels, own.get("namespace"))


def _parameters(query: str) -> tuple[dict[str, str], dict[str, str]]:
    """Those that are ours, and redis-py's."""
    own: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, _, value in (pair.partition("=") for pair in query.split("&") if pair):
        (own if name in _OWN else others)[name] = unquote(value)
    return own, others


def _check(nodes: tuple[Address, ...], database: str, service: str | None, *, is_cluster: bool) -> None:
    if is_cluster and service is not None:
        raise ConfigurationError("transport_url has both sentinel= and cluster=; a server is one of them")
    if len(nodes) > 1 and service is None and not is_cluster:
        raise ConfigurationError(
            "transport_url names several servers; say what they are: ?sentinel=NAME for sentinels that know the "
            "primary by NAME, ?cluster=true for nodes of a cluster"
        )
    if database and not database.isdecimal():
        raise ConfigurationError("the path of a redis URL is the number of a database, such as /0")
    if is_cluster and database.strip("0"):
        raise ConfigurationError(
            "a redis cluster has the database 0 only; leave the number out of transport_url"
        )


def _options(url: str) -> tuple[dict[str, Any], bool]:
    """What redis-py reads in the URL of one server, and whether that is TLS."""
    try:
        pool = ConnectionPool.from_url(url, protocol=2)
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RedisError) as exc:
        # The text of such an error may have the value. The names have been checked.
        words = set(re.findall(r"\w+", str(exc)))
        named = [name for name in parse_qs(urlsplit(url).query) if name in words]
        which = f"the parameter {named[0]}, which" if named else "a parameter that"
        raise ConfigurationError(f"transport_url has {which} can't be used as it is there") from None
    options = dict(pool.connection_kwargs)
    # What is said to the server is bytes, in UTF-8 where it is text, and so are its answers.
    for name in (*_NOT_TAKEN, "encoding", "encoding_errors"):
        options.pop(name, None)
    for name in ("socket_timeout", "socket_connect_timeout"):
        if name in options and not is_duration(options[name]):
            raise ConfigurationError(
                f"the parameter {name} of transport_url is in seconds, above 0 and below 100 years"
            )
    return options, pool.connection_class is SSLConnection


@cache
def _of_library() -> frozenset[str]:
    """The parameters that redis-py takes."""
    makers = (AbstractConnection, Connection, SSLConnection, ConnectionPool)
    return frozenset(
        name
        for maker in makers
        for name, parameter in inspect.signature(maker).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    )


def _address(text: str, default: int) -> Address:
    try:
        parts = urlsplit(f"//{text}")
        name, port = parts.hostname, parts.port
    except ValueError:
        _refuse_address()
    if not name or (":" in text and port is None and not text.endswith("]")):
        _refuse_address()
    return name, port or default


def _refuse_address() -> NoReturn:
    # What stands there may be a part of a password, so it isn't shown.
    raise ConfigurationError(
        "transport_url names no server that can be read; expected redis://user:password@host:port/0, "
        "with / ? # @ [ ] and % in a password written as %2F %3F %23 %40 %5B %5D and %25"
    ) from None


def _bracketed(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def one_line(text: str) -> str:
    """A library's text as a part of a sentence of ours."""
    return " ".join(text.split()).rstrip(".")
