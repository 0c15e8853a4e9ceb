"""One bounded HTTP request to a server of authority: https only, so many bytes and seconds, no redirect elsewhere."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from urllib.parse import SplitResult, urljoin, urlsplit

from paigeant.errors import AuthorityUnavailable, ConfigurationError
from paigeant.secret import SecretToken

Form = Mapping[str, str | SecretToken]

__all__ = ["MOST_BYTES", "MOST_SECONDS", "Reply", "check_url", "place_of", "request"]

MOST_BYTES = 64 * 1024
MOST_SECONDS = 5.0
_MOST_REDIRECTS = 3
_NO_ISSUER = (18, 19, 20, 21)
"""OpenSSL's codes for certificates that nobody who is trusted has signed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server said. The body may hold tokens, so it isn't shown."""

    status: int
    body: bytes

    def __repr__(self) -> str:
        return f"Reply({self.status}, {len(self.body)} bytes)"


def check_url(url: str, what: str) -> str:
    """`url`, if it may be asked: https, or http on this very host. Raises ConfigurationError, which names `what`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigurationError(f"{what} is no URL: {exc}") from exc
    # The URL itself isn't shown where it may hold a password.
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ConfigurationError(f"{what} is a URL without user, password and fragment")
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host))):
        raise ConfigurationError(
            f"{what} is an https:// URL (http:// only on this host), found {parts.scheme}://{host or ''}"
        )
    return url


def place_of(url: str) -> str:
    """A URL as errors have it: without its query, in which some servers want a key."""
    return _named(urlsplit(url))


async def request(
    url: str,
    *,
    form: Form | None = None,
    headers: Form | None = None,
    seconds: float = MOST_SECONDS,
    limit_bytes: int = MOST_BYTES,
) -> Reply:
    """The reply to a GET, or to a POST of `form`. Redirects of a GET are followed on the same origin, others refused.

    Raises AuthorityUnavailable when there is none within `seconds` and `limit_bytes`.
    """
    import httpx2  # here, because few processes ask anybody

    origin = urlsplit(url)
    try:
        async with asyncio.timeout(seconds):
            return await _ask(url, form, headers or {}, seconds=seconds, limit_bytes=limit_bytes)
    except (TimeoutError, httpx2.TimeoutException):
        trouble = f"no reply within {seconds:g} s"
    except AuthorityUnavailable as exc:
        trouble = exc.reason
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as exc:
        trouble = _mistrust(exc) or type(exc).__name__
    # An error of its own, raised outside of the handlers: the frames of the others hold what was sent, tokens as well.
    raise AuthorityUnavailable(_named(origin), trouble)


async def _ask(url: str, form: Form | None, headers: Form, *, seconds: float, limit_bytes: int) -> Reply:
    import httpx2

    origin = urlsplit(url)
    try:
        tls = _tls(origin.scheme)
    except OSError:
        raise AuthorityUnavailable(
            url, "SSL_CERT_FILE or SSL_CERT_DIR names no certificates that can be read"
        ) from None
    # Nothing is unpacked, so that a small body can't become a large one; and nothing is proxied on this host.
    sent = {"accept": "application/json", **_revealed(headers), "accept-encoding": "identity"}
    data = None if form is None else _revealed(form)
    try:
        asking = httpx2.AsyncClient(timeout=seconds, verify=tls, trust_env=origin.scheme == "https")
    except (ImportError, ValueError):  # the client knows no such proxy, or needs a package for it
        raise AuthorityUnavailable(
            url, "HTTPS_PROXY or ALL_PROXY names no proxy of http:// or https://, the only ones that are used"
        ) from None
    async with asking as client:
        for _ in range(_MOST_REDIRECTS + 1):
            async with client.stream(
                "GET" if data is None else "POST", url, data=data, headers=sent
            ) as answer:
                if answer.is_redirect and data is None:
                    url = _redirected(url, origin, answer.headers.get("location", ""))
                    continue
                body = bytearray()
                async for part in answer.aiter_raw():
                    body += part
                    if len(body) > limit_bytes:
                        raise AuthorityUnavailable(url, f"its reply is larger than {limit_bytes:,} bytes")
                return Reply(answer.status_code, bytes(body))
    raise AuthorityUnavailable(url, f"more than {_MOST_REDIRECTS} redirects")


def _revealed(form: Form) -> dict[str, str]:
    return {name: value.reveal() if isinstance(value, SecretToken) else value for name, value in form.items()}


@cache
def _tls(scheme: str) -> ssl.SSLContext:
    """How certificates are checked. Reading those of the system takes so long that it is done once."""
    import httpx2

    # Nothing is encrypted on this host, and the client wants one all the same: this one trusts nobody.
    return httpx2.create_ssl_context() if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _mistrust(exc: BaseException) -> str | None:
    """Why a server's certificate isn't trusted, if that is what is behind an error. It has nothing of what was sent."""
    found: BaseException | None = exc
    while found is not None:
        if isinstance(found, ssl.SSLCertVerificationError):
            said = f"its certificate is refused: {found.verify_message.rstrip('.')}"
            is_foreign = found.verify_code in _NO_ISSUER
            return (
                f"{said}; a CA of your own is trusted by SSL_CERT_FILE=/path/ca.pem" if is_foreign else said
            )
        found = found.__cause__ or found.__context__
    return None


def _redirected(url: str, origin: SplitResult, location: str) -> str:
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
    except ValueError:
        raise AuthorityUnavailable(_named(origin), "it redirects to what is no URL") from None
    if (parts.scheme, parts.netloc) != (origin.scheme, origin.netloc):
        raise AuthorityUnavailable(_named(origin), f"it redirects to another host, {parts.hostname}")
    return target


def _named(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
