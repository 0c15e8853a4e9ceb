"""URLs and texts as they may be shown: without what is secret in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote_plus

__all__ = ["scrubbed", "secrets_of", "without_password"]

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


def secrets_of(url: str) -> Iterator[str]:
    """What is secret in a URL, as it stands there and as it is meant."""
    user, _, password = url.rpartition("@")[0].partition("://")[2].partition(":")
    for secret in (password, *(value for _, value in _PARAMETER.findall(url))):
        if len(secret) >= _SHORT and secret != user:  # guest:guest hides nothing but the user's name
            yield from (secret, unquote_plus(secret))
