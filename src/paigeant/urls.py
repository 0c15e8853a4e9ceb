"""URLs that can be read in one way only, and URLs and texts as they may be shown: without what is secret in them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

from paigeant.errors import ConfigurationError, nearest

__all__ = [
    "begin_of",
    "check_parameters",
    "check_readable",
    "is_encrypted",
    "is_local",
    "is_namespace",
    "parts_of",
    "scrubbed",
    "secrets_of",
    "without_password",
]

# Both are tried once where what they could be in begins, and not for each ? or :// in it: a text may be full of these.
_PARAMETER = re.compile(
    r"((?:(?<![^=&\s])[^=&\s?]*+\?|&)[^=&\s]*"
    r"(?:password|passwd|pwd|passphrase|secret|token|scram_\w{1,50}_key)=)([^&\s]*)",
    re.I,
)
_IN_TEXT = re.compile(r"(?<!\S)((?>\S*?\w://[^\s:/@'\"]*:))\S*@")
_LOCAL = ("memory", "sqlite")
_SHORT = 4
"""A secret of fewer characters may be part of any word."""

_SECRET = {
    "password", "sslpassword", "ssl_password", "sentinel_password", "oauth_client_secret", "scram_client_key",
    "scram_server_key", "auth_token",
}  # fmt: skip
_SHOWN = {
    # of libpq
    "application_name", "channel_binding", "client_encoding", "connect_timeout", "dbname", "gssencmode", "host",
    "hostaddr", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "krbsrvname",
    "load_balance_hosts", "options", "passfile", "port", "require_auth", "requirepeer", "service", "ssl",
    "sslcert", "sslcrl", "sslkey", "sslmode", "sslnegotiation", "sslrootcert", "sslsni", "target_session_attrs",
    "tcp_user_timeout", "user",
    # of redis-py
    "client_name", "db", "encoding", "health_check_interval", "max_connections", "protocol", "retry_on_timeout",
    "socket_connect_timeout", "socket_keepalive", "socket_read_size", "socket_timeout", "ssl_ca_certs",
    "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_ciphers", "ssl_keyfile",
    "ssl_min_version", "timeout", "username",
    # of aio-pika
    "auth", "cafile", "capath", "certfile", "channel_max", "heartbeat", "keyfile", "name", "no_verify_ssl",
    # ours
    "cluster", "delivery_limit", "namespace", "queue_type", "sentinel", "sentinel_username",
}  # fmt: skip
"""Parameters that may be shown. Any other may be a part of a password in which an & or a ? wasn't escaped."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SERVER = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")
_ESCAPES = (
    "%40 for @, %3A for :, %2F for /, %3F for ?, %23 for #, %26 for &, %5B and %5D for [ and ], "
    "%20 for a space and %25 for %"
)

_NOTHING: Mapping[str, str] = MappingProxyType({})
_LIBPQ = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "sslmode": "PGSSLMODE"}


def without_password(url: str) -> str:
    """`url` with stars for its password and for parameters that hold secrets or are unknown.

    Of one that `check_readable` refuses only the scheme is left.
    """
    scheme, _, rest = url.partition("://")
    if scheme in _LOCAL:
        return url
    if not _SCHEME.match(url) or _fault(scheme, rest) is not None:
        return f"{begin_of(url)}***"
    login, place, query = _split(scheme, rest)
    if login is not None:
        user, colon, _ = login.partition(":")
        place = f"{user}:***@{place}" if colon else f"{user}@{place}"
    shown = place if query is None else f"{place}?{'&'.join(map(_shown, query.split('&')))}"
    return f"{scheme}://{shown}"


def begin_of(url: str) -> str:
    """The scheme with its ://, which is all that may be shown of a text that perhaps isn't a URL; else nothing."""
    found = _SCHEME.match(url)
    return found.group() if found else ""


def is_namespace(name: str) -> bool:
    """Whether the names of all brokers' queues and keys may begin with `name`: up to 100 letters, digits and -_.

    No dot, for that ends it: the topic b.c of a namespace a would share its queue with the topic c of a.b. Nor `amq`,
    which RabbitMQ keeps for itself.
    """
    return re.fullmatch(r"(?!amq$)[A-Za-z0-9_-]{1,100}", name) is not None


def check_readable(url: str) -> None:
    """Raise ConfigurationError for the URL of a server in which a character isn't escaped that has to be.

    Those who connect would take a part of the password for a host, a path or a parameter, and show it as such. So the
    error shows the scheme alone.
    """
    scheme, found, rest = url.partition("://")
    fault = None if not found or scheme in _LOCAL else _fault(scheme, rest)
    if fault is not None:
        raise ConfigurationError(
            f"a URL that begins with {begin_of(url)} has {fault}; expected {begin_of(url)}user:password@host:port/..., "
            f"and in each of these parts you write {_ESCAPES}"
        )


def check_parameters(url: str, known: Iterable[str]) -> None:
    """Raise ConfigurationError where the URL of a server has a parameter besides `known`.

    It may be a part of a password, so the error tells its place only.
    """
    scheme, _, rest = url.partition("://")
    given = (_split(scheme, rest)[2] or "").split("&")
    names = set(known)
    for place, parameter in enumerate(given, start=1):
        name, equals, _ = parameter.partition("=")
        if parameter and not (equals and name in names):
            raise ConfigurationError(
                f"parameter no. {place} of a URL that begins with {begin_of(url)} isn't known, or isn't name=value; "
                f"{nearest(name, names)}; in a password you write {_ESCAPES}"
            )


def scrubbed(text: str, urls: Iterable[str] = ()) -> str:
    """`text`, such as a library's error, without passwords of URLs in it and without those of `urls` anywhere in it."""
    for secret in sorted({secret for url in urls for secret in secrets_of(url)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    if "://" in text:
        text = _IN_TEXT.sub(r"\1***@", text)
    return _PARAMETER.sub(r"\1***", text) if "?" in text or "&" in text else text


def is_local(url: str, environment: Mapping[str, str] = _NOTHING) -> bool:
    """Whether what is sent there doesn't leave this host: a file, memory, a local socket, or a loopback address.

    `environment`: for Postgres also the variables such as PGHOST, which libpq reads where the URL leaves something
    open. Each server that is named has to be on this host. What a service file, a sentinel or a node of a cluster
    names may be anywhere, so none of them counts as local.
    """
    scheme, _, rest = url.partition("://")
    if scheme in _LOCAL:
        return True
    if scheme == "postgresql":
        told = _told_to_libpq(rest, environment)
        hosts = [host for name in ("host", "hostaddr") for host in told.get(name, "").split(",")]
        return not told.get("service") and all(map(_is_here, hosts))
    parts = parts_of(url)
    told = dict(parse_qsl(parts.query, keep_blank_values=True))
    leads_on = "sentinel" in told or told.get("cluster", "false").lower() != "false"
    return not leads_on and all(_is_here(_host(place)) for place in parts.servers.split(","))


def is_encrypted(url: str, environment: Mapping[str, str] = _NOTHING) -> bool:
    """Whether what is sent there can't be read on the way, as far as URL and `environment` (see `is_local`) tell."""
    scheme, _, rest = url.partition("://")
    if scheme == "postgresql":
        return _told_to_libpq(rest, environment).get("sslmode") in ("require", "verify-ca", "verify-full")
    return scheme in ("rediss", "amqps")


def _fault(scheme: str, rest: str) -> str | None:
    """What isn't escaped in a URL of a server, or can't be read even so."""
    if re.search(r"[\s\x00-\x1f\x7f]", rest):
        return "a space or a control character"
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00", rest):
        return "a % that two hexadecimal digits other than 00 don't follow"
    try:
        rest.encode()
        unquote(rest, errors="strict")
        if scheme != "postgresql":
            parts = parts_of(f"{scheme}://{rest}")
            for server in parts.servers.split(","):
                urlsplit(f"{scheme}://{parts.login}@{server}/{parts.path}?{parts.query}")
    except ValueError:
        return "characters that can't be read"
    if scheme != "postgresql" and "#" in rest:
        return "a # that isn't escaped"
    if scheme == "postgresql" and rest.startswith("/"):
        return None  # neither a login nor a server: an @ belongs to a socket or a parameter
    login, place, query = _split(scheme, rest)
    if "@" in place or "@" in (query or ""):
        return "an @ that isn't escaped" if login is None else "more than one @"
    servers = place.partition("/")[0].split(",")
    return (
        None
        if all(map(_SERVER.fullmatch, servers))
        else "a server that isn't host:port with a number as the port"
    )


def _split(scheme: str, rest: str) -> tuple[str | None, str, str | None]:
    """Login, servers with the path, and query of the URL of a server. libpq lets a `?` stand in a login."""
    login: str | None
    login, at, others = rest.partition("@")
    if at and not re.search("/" if scheme == "postgresql" else "[/?]", login):
        rest = others
    else:
        login = None
    place, found, query = rest.partition("?")
    return login, place, query if found else None


def _shown(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if not parameter or (equals and name in _SHOWN):
        return parameter
    return f"{name}=***" if equals and name in _SECRET else "***"


class Parts(NamedTuple):
    """Of a broker's URL, as they stand there; `servers` with commas in between."""

    login: str
    servers: str
    path: str
    query: str


def parts_of(url: str) -> Parts:
    """The parts of a broker's URL, by the rules of RFC 3986, but for several servers.

    `urlsplit` takes them for one, and since 2025 it refuses the brackets of an address that doesn't come first.
    """
    rest, _, _ = url.partition("://")[2].partition("#")
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    login, _, servers = authority.rpartition("@")
    return Parts(login, servers, path, query)


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
            yield from (secret, unquote(secret), unquote_plus(secret))
