"""Keys from a URL: how seldom they are fetched, how long they hold, and what is refused."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from datetime import UTC, datetime, timedelta

import pytest
from tests.patience import PATIENCE
from tests.security.authority import Authority

from paigeant import jwks
from paigeant.errors import AuthorityUnavailable, ConfigurationError, KeysUnavailable, MessageInvalid
from paigeant.https import check_url, request
from paigeant.jwks import Jwks, read_jwks
from paigeant.testing import ManualClock

EC = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}


@pytest.fixture
def keys(authority: Authority, clock: ManualClock) -> Jwks:
    """The keys of the authority."""
    return Jwks(authority.jwks_url, clock=clock)


def kid(authority: Authority) -> str:
    """The id of the key that it signs with now."""
    name = authority.keys[-1].kid
    assert name is not None
    return name


async def test_a_key_is_fetched_once(authority: Authority, keys: Jwks) -> None:
    """Those who ask for a published key at the same time share one request, and later ones need none."""
    found = await asyncio.gather(*(keys.find(kid(authority)) for _ in range(50)))
    assert {found_key["x"] for found_key in found if found_key} == {authority.keys[0].as_dict()["x"]}
    await keys.find(kid(authority))
    assert len(authority.asked("/jwks")) == 1


async def test_a_flood_of_unknown_ids_is_one_request_a_minute(
    authority: Authority, keys: Jwks, clock: ManualClock
) -> None:
    """However many ids come that nobody has published, the server is asked once in a minute, and nothing is kept."""
    await keys.find(kid(authority))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(10_000):
        assert await keys.find(f"unknown-{number}") is None
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(authority.asked("/jwks")) == 1
    clock.advance(jwks.REFRESH_SECONDS)
    for number in range(100):
        assert await keys.find(f"unknown-{number}") is None
    assert len(authority.asked("/jwks")) == 2
    assert grown < 100_000


async def test_a_new_key_is_found(authority: Authority, keys: Jwks, clock: ManualClock) -> None:
    """A key that was published after the last fetch is found by asking again, a minute later at the earliest."""
    await keys.find(kid(authority))
    authority.rotate()
    assert await keys.find(kid(authority)) is None
    clock.advance(jwks.REFRESH_SECONDS)
    assert await keys.find(kid(authority)) is not None


async def test_who_lacks_a_key_waits_for_the_answer(
    authority: Authority, keys: Jwks, clock: ManualClock
) -> None:
    """While the server is being asked, a known key is given at once, and a new one waited for."""
    old = kid(authority)
    await keys.find(old)
    new = authority.rotate().kid
    clock.advance(jwks.REFRESH_SECONDS)
    authority.release.clear()
    authority.entered.clear()
    waiting = [asyncio.create_task(keys.find(str(new))) for _ in range(2)]
    await asyncio.to_thread(authority.entered.wait, PATIENCE)
    assert await keys.find(old) is not None
    authority.release.set()
    assert all(await asyncio.gather(*waiting))
    assert len(authority.asked("/jwks")) == 2


async def test_a_withdrawn_key_is_unknown_soon(authority: Authority, keys: Jwks, clock: ManualClock) -> None:
    """A key that is published no more is refused once what is known is five minutes old."""
    gone = kid(authority)
    await keys.find(gone)
    authority.rotate()
    del authority.published[0]
    clock.advance(jwks.FRESH_SECONDS)
    assert await keys.find(gone) is None


async def test_a_clock_that_was_set_back_keeps_no_key(
    authority: Authority, keys: Jwks, clock: ManualClock
) -> None:
    """A withdrawn key isn't known until the clock is there again, which may be in a year."""
    gone = kid(authority)
    await keys.find(gone)
    authority.rotate()
    del authority.published[0]
    keys.clock = ManualClock(datetime.fromtimestamp(clock.now(), UTC) - timedelta(days=365))
    assert await keys.find(gone) is None


@pytest.mark.parametrize("trouble", ["status", "garbage", "too large", "redirect", "redirect to nothing"])
async def test_stale_keys_hold_for_a_day(
    authority: Authority, keys: Jwks, clock: ManualClock, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While the server can't be asked the last keys hold, a day long; then nothing is verified any more."""
    known = kid(authority)
    await keys.find(known)
    match trouble:
        case "status":
            authority.status = 500
        case "garbage":
            authority.body = b"<html>"
        case "too large":
            authority.body = b'{"keys": []}' + b" " * 70_000
        case "redirect":
            authority.redirect = "http://localhost:1/jwks"
        case "redirect to nothing":
            authority.redirect = "http://["
    clock.advance(jwks.STALE_SECONDS - 1)
    assert await keys.find(known) is not None
    assert f"jwks.not_fetched: {keys.url} can't be asked: " in caplog.text
    clock.advance(1)
    with pytest.raises(KeysUnavailable, match="less than a day old"):
        await keys.find(known)
    authority.status = authority.body = authority.redirect = None
    clock.advance(jwks.REFRESH_SECONDS)
    assert await keys.find(known) is not None


async def test_without_any_key_nothing_is_verified(
    authority: Authority, keys: Jwks, clock: ManualClock
) -> None:
    """A server that was away from the start is asked again after a few seconds, not for each message."""
    authority.status = 503
    for _ in range(10):
        with pytest.raises(KeysUnavailable):
            await keys.find(kid(authority))
    assert len(authority.asked("/jwks")) == 1
    authority.status = None
    clock.advance(jwks.FIRST_SECONDS)
    assert await keys.find(kid(authority)) is not None


async def test_a_fetch_that_is_cut_off_counts_for_nothing(authority: Authority, keys: Jwks) -> None:
    """Whoever asks next after one that was cancelled asks the server."""
    authority.release.clear()
    first = asyncio.create_task(keys.find(kid(authority)))
    await asyncio.to_thread(authority.entered.wait, PATIENCE)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    authority.release.set()
    assert await keys.find(kid(authority)) is not None


async def test_a_redirect_on_the_same_host_is_followed(authority: Authority, keys: Jwks) -> None:
    """A key set that has moved on its host is found."""
    authority.redirect = "/moved"
    assert await keys.find(kid(authority)) is not None


async def test_a_request_is_bounded_in_time(authority: Authority) -> None:
    """A server that doesn't answer is left after the time that a request has."""
    authority.release.clear()
    with pytest.raises(AuthorityUnavailable, match=r"no reply within 0\.05 s"):
        await request(authority.jwks_url, seconds=0.05)


@pytest.mark.parametrize(
    "url",
    [
        "http://idp.example/jwks",
        "http://10.0.0.1/jwks",
        "ftp://idp.example/jwks",
        "file:///etc/passwd",
        "https:///jwks",
        "https://user:password@idp.example/jwks",
        "https://idp.example:port/jwks",
        "jwks",
    ],
)
def test_urls_that_are_never_asked(url: str) -> None:
    """Only https is asked, and http on this very host; the error doesn't show a password."""
    with pytest.raises(ConfigurationError) as caught:
        check_url(url, "the URL of a key set")
    assert "password@" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://idp.example/jwks", "http://localhost:1/jwks", "http://[::1]/jwks"])
def test_urls_that_may_be_asked(url: str) -> None:
    """Https, and http on this host."""
    assert check_url(url, "the URL") == url


@pytest.mark.parametrize(
    "key",
    [
        {**EC},
        {**EC, "kid": ""},
        {**EC, "kid": 1},
        {**EC, "kid": "a", "use": "enc"},
        {**EC, "kid": "a", "key_ops": ["sign"]},
        {**EC, "kid": "a", "d": "AA"},
        {"kty": "oct", "kid": "a", "k": "AA"},
        {"kty": "EC", "kid": "a", "crv": "P-256", "x": "AA"},
        {"kty": ["EC"], "kid": "a"},
        "key",
    ],
)
def test_keys_that_are_left_out(key: object) -> None:
    """A key without an id, for another use, symmetric, private or incomplete verifies nothing; the others stand."""
    body = json.dumps({"keys": [key, {**EC, "kid": "good"}]}).encode()
    assert list(read_jwks(body)) == ["good"]


@pytest.mark.parametrize(
    "body",
    [b"[]", b'{"keys": 1}', b'{"keys": [], "keys": []}', b'{"keys": [' + b"[" * 99 + b"]" * 99 + b"]}"],
)
def test_what_is_no_key_set(body: bytes) -> None:
    """Something else than a key set, or one that can be read in two ways, is refused."""
    with pytest.raises(MessageInvalid):
        read_jwks(body)
