"""URLs and texts as they may be shown: without what is secret in them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qs, unquote_plus, urlsplit

__all__ = ["is_encrypted", "is_local", "scrubbed", "secrets_of", "without_password"]

_PARAMETER = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|passphrase|secret|token)=)([^&#\s]*)", re.I)
_IN_TEXT = re.compile(r"(\w://[^\s:/@'\"]*:)[^\s]*@")
_SHORT = 4
"""A secret of fewer characters may be part of any word."""


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


def is_local(url: str) -> bool:
    """Whether what is sent there doesn't leave this host: a file, memory, a local socket, or a loopback address."""
    scheme, _, rest = url.partition("://")
    if scheme in ("memory", "sqlite"):
        return True
    hosts = rest.partition("?")[0].partition("/")[0].rpartition("@")[2].split(",")
    hosts += parse_qs(urlsplit(url).query).get("host", [])
    return all(map(_is_here, hosts))


def is_encrypted(url: str) -> bool:
    """Whether what is sent there can't be read on the way, as far as the URL tells."""
    scheme = url.partition("://")[0]
    if scheme == "postgresql":
        return parse_qs(urlsplit(url).query).get("sslmode", [""])[-1] in (
            "require",
            "verify-ca",
            "verify-full",
        )
    return scheme in ("rediss", "amqps")


def _is_here(host: str) -> bool:
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if not name or name == "localhost" or name.startswith(("/", "%2F", "%2f")):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def secrets_of(url: str) -> Iterator[str]:
    """What is secret in a URL, as it stands there and as it is meant."""
    user, _, password = url.rpartition("@")[0].partition("://")[2].partition(":")
    for secret in (password, *(value for _, value in _PARAMETER.findall(url))):
        if len(secret) >= _SHORT and secret != user:  # guest:guest hides nothing but the user's name
            yield from (secret, unquote_plus(secret))
