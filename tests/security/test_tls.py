"""Servers of authority are asked over TLS alone: whose certificate is believed, and what is said of the others."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.security.authority import Authority
from tests.services.certificates import CertificateAuthority

from paigeant import SecretToken, https
from paigeant.errors import AuthorityUnavailable, KeysUnavailable
from paigeant.exchange import ClientSecret, TokenEndpoint, TokenExchange
from paigeant.identity import read_token
from paigeant.jwks import Jwks

THERE = "https://there.example"
SECRET = "the-secret-of-desk"
HINT = "SSL_CERT_FILE=/path/ca.pem"


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CertificateAuthority]:
    """An authority that this process trusts, in the way that the guide has it."""
    made = CertificateAuthority(tmp_path, "ours")
    monkeypatch.setenv("SSL_CERT_FILE", str(made.pem))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # whoever runs this may have one for https
    https._tls.cache_clear()
    yield made
    https._tls.cache_clear()


def shown(trouble: str, ours: CertificateAuthority) -> tuple[ssl.SSLContext, str]:
    """A server's certificate with this trouble, and what is said of it."""
    match trouble:
        case "unknown CA":
            theirs = CertificateAuthority(ours.folder, "theirs")
            return theirs.server(), "unable to get local issuer certificate; a CA of your own is trusted by"
        case "expired":
            return ours.server(ended=True), "certificate has expired"
        case _:
            return ours.server("other.example"), "certificate is not valid for '127.0.0.1'"


def exchange_at(server: Authority) -> TokenExchange:
    """Token exchange there, by a client that the server knows."""
    server.clients["desk"] = SECRET
    return TokenExchange(TokenEndpoint(server.token_url, ClientSecret("desk", SecretToken(SECRET))))


async def test_a_certificate_of_a_trusted_authority_is_believed(ours: CertificateAuthority) -> None:
    """Keys are fetched and tokens exchanged with a server whose certificate is of the CA in SSL_CERT_FILE."""
    with Authority(tls=ours.server()) as server:
        assert server.url.startswith("https://")
        assert await Jwks(server.jwks_url).find(str(server.keys[-1].kid)) is not None
        subject = SecretToken(server.token("ann", "a", "b"))
        token = await exchange_at(server).exchange(subject, audience=THERE, scopes=("a",))
        assert read_token(token).claims["aud"] == THERE


@pytest.mark.parametrize("trouble", ["unknown CA", "expired", "another host"])
async def test_no_key_is_taken_from_a_server_of_another_certificate(
    ours: CertificateAuthority, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a server isn't even asked, no key of it is known, and the log says what is wrong with its certificate."""
    tls, said = shown(trouble, ours)
    with Authority(tls=tls) as server, caplog.at_level(logging.WARNING, "paigeant.jwks"):
        with pytest.raises(KeysUnavailable):
            await Jwks(server.jwks_url).find(str(server.keys[-1].kid))
        assert server.asked("/jwks") == []
    assert f"jwks.not_fetched: {server.jwks_url} can't be asked: its certificate is refused: " in caplog.text
    assert said in caplog.text
    assert (HINT in caplog.text) == (trouble == "unknown CA")


@pytest.mark.parametrize("trouble", ["unknown CA", "expired", "another host"])
async def test_no_token_is_sent_to_a_server_of_another_certificate(
    ours: CertificateAuthority, trouble: str
) -> None:
    """Neither the person's token nor the service's secret leaves; the error says what is wrong, and holds neither."""
    tls, said = shown(trouble, ours)
    with Authority(tls=tls) as server:
        subject = SecretToken(server.token("ann", "a"))
        with pytest.raises(AuthorityUnavailable, match="its certificate is refused") as caught:
            await exchange_at(server).exchange(subject, audience=THERE, scopes=("a",))
        assert server.asked("/token") == []
    assert said in str(caught.value)
    assert caught.value.__context__ is None
    assert SECRET not in str(caught.value)
    assert subject.reveal() not in str(caught.value)


async def test_a_server_without_tls_behind_an_https_url(ours: CertificateAuthority) -> None:
    """Nothing is sent in plain text to a server that speaks no TLS where https stands."""
    with Authority() as server:
        with pytest.raises(AuthorityUnavailable, match="can't be asked"):
            await https.request(server.jwks_url.replace("http:", "https:"))
        assert server.asked("/jwks") == []


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "another file"])
async def test_a_file_of_authorities_that_is_none(
    ours: CertificateAuthority, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as what it is, and nobody is believed for want of it."""
    wrong = ours.folder / "wrong.pem"
    if content is not None:
        wrong.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(wrong))
    with Authority(tls=ours.server()) as server:
        with pytest.raises(AuthorityUnavailable, match="SSL_CERT_FILE or SSL_CERT_DIR names no certificates"):
            await https.request(server.jwks_url)
        assert server.asked("/jwks") == []


@pytest.mark.parametrize("proxy", ["socks5://user:hunter2@127.0.0.1:9", "gopher://user:hunter2@127.0.0.1:9"])
async def test_a_proxy_that_can_t_be_used_is_trouble_like_any_other(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many a desktop sets ALL_PROXY: nothing is verified then, the error says why, and no worker ends by it."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(AuthorityUnavailable) as caught:
        await https.request("https://127.0.0.1:9/jwks")
    assert "ALL_PROXY names no proxy" in caught.value.reason
    assert "hunter2" not in caught.value.reason
    with pytest.raises(KeysUnavailable):
        await Jwks("https://127.0.0.1:9/jwks").find("k")
