"""URLs and texts as they may be shown: without what is secret in them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from urllib.parse import parse_qsl, unquote, unquote_plus

__all__ = ["is_encrypted", "is_local", "scrubbed", "secrets_of", "without_password"]

_PARAMETER = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|passphrase|secret|token)=)([^&#\s]*)", re.I)
_IN_TEXT = re.compile(r"(\w://[^\s:/@'\"]*:)[^\s]*@")
_SHORT = 4
"""A secret of fewer characters may be part of any word."""

_NOTHING: Mapping[str, str] = MappingProxyType({})
_LIBPQ = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "sslmode": "PGSSLMODE"}


def without_password(url: str) -> str:
    """`url` with stars for its password and for the parameters that hold secrets."""
    url = _PARAMETER.sub(r"\1***", url)
    head, at, tail = url.rpartition("@")
    scheme, _, user = head.partition("://")
    return f"{scheme}://{user.partition(':')[0]}:***@{tail}" if at and ":" in user else url


def scrubbed(text: str, urls: Iterable[str] = ()) -> str:
    """`text`, such as a library's error, without passwords of URLs in it and without those of `urls` anywhere in it."""
    for secret in sorted({secret for url in urls for secret in secrets_of(url)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _PARAMETER.sub(r"\1***", _IN_TEXT.sub(r"\1***@", text))


def is_local(url: str, environment: Mapping[str, str] = _NOTHING) -> bool:
    """Whether what is sent there doesn't leave this host: a file, memory, a local socket, or a loopback address.

    `environment`: for Postgres also the variables such as PGHOST, which libpq reads where the URL leaves something
    open. Each server that is named has to be on this host. What a service file, a sentinel or a node of a cluster
    names may be anywhere, so none of them counts as local.
    """
    scheme, _, rest = url.partition("://")
    if scheme in ("memory", "sqlite"):
        return True
    if scheme == "postgresql":
        told = _told_to_libpq(rest, environment)
        hosts = [host for name in ("host", "hostaddr") for host in told.get(name, "").split(",")]
        return not told.get("service") and all(map(_is_here, hosts))
    authority, _, query = _parts(rest)
    told = dict(parse_qsl(query, keep_blank_values=True))
    leads_on = "sentinel" in told or told.get("cluster", "false").lower() != "false"
    return not leads_on and all(_is_here(_host(place)) for place in authority.split(","))


def is_encrypted(url: str, environment: Mapping[str, str] = _NOTHING) -> bool:
    """Whether what is sent there can't be read on the way, as far as URL and `environment` (see `is_local`) tell."""
    scheme, _, rest = url.partition("://")
    if scheme == "postgresql":
        return _told_to_libpq(rest, environment).get("sslmode") in ("require", "verify-ca", "verify-full")
    return scheme in ("rediss", "amqps")


def _parts(rest: str) -> tuple[str, str, str]:
    """Servers, path and query of a broker's URL, by the rules of RFC 3986."""
    rest, _, _ = rest.partition("#")
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    return authority.rpartition("@")[2], path, query


def _told_to_libpq(rest: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What libpq goes by: the parameters of the URL, then variables of the environment.

    It reads a URL otherwise than RFC 3986 has it: a `?` may stand in a password, a `#` means nothing, several servers
    have commas in between, and what the query says stands above that. See "Connection URIs" in its manual.
    """
    user, at, servers = rest.partition("@")
    if at and "/" not in user:
        rest = servers
    place, _, query = rest.partition("?")
    hosts = ",".join(_host(server) for server in place.partition("/")[0].split(","))
    told = {"host": unquote(hosts)} if hosts else {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        told.update({"sslmode": "require"} if (name, value) == ("ssl", "true") else {name: value})
    if service := told.get("service") or environment.get("PGSERVICE"):
        return {**told, "service": service}  # it stands above the other variables, and may say what they do
    others = {name: environment[variable] for name, variable in _LIBPQ.items() if variable in environment}
    return {**others, **told}


def _host(server: str) -> str:
    """The host of host:port, or of [address]:port."""
    return server[1:].partition("]")[0] if server.startswith("[") else server.partition(":")[0]


def _is_here(host: str) -> bool:
    if not host or host.lower() == "localhost" or host[0] in "/@":  # the latter are sockets, for libpq alone
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def secrets_of(url: str) -> Iterator[str]:
    """What is secret in a URL, as it stands there and as it is meant."""
    user, _, password = url.rpartition("@")[0].partition("://")[2].partition(":")
    for secret in (password, *(value for _, value in _PARAMETER.findall(url))):
        if len(secret) >= _SHORT and secret != user:  # guest:guest hides nothing but the user's name
            yield from (secret, unquote_plus(secret))
