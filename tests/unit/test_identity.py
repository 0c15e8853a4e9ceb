"""What makes a token a proof of for whom a run acts: header, signature, claims, and what a run may do with it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from joserfc import jws
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from paigeant import GrantHandle, SecretToken, SecurityContext
from paigeant.errors import InputInvalid, TokenExpired, TokenRejected
from paigeant.identity import (
    LEEWAY_SECONDS,
    MANDATE,
    Draft,
    Issuer,
    Mandate,
    check_claims,
    check_signature,
    read_token,
)

NOW = 1_800_000_000.0
ME = "https://me.example"
KEY = ECKey.generate_key("P-256", {"kid": "k1"}, private=True)
PUBLIC = KEY.as_dict(private=False)
ISSUER = Issuer("https://idp.example", "https://idp.example/jwks", ("ES256",))
HEADER = {"alg": "ES256", "kid": "k1", "typ": "at+jwt"}
CLAIMS: dict[str, Any] = {
    "iss": ISSUER.name,
    "sub": "ann",
    "aud": ME,
    "exp": NOW + 300,
    "iat": NOW,
    "scope": "mail.read mail.send",
}


def part(value: object) -> str:
    """A part of a token."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def unsigned(header: object = HEADER, claims: object = CLAIMS, signature: str = "c2ln") -> SecretToken:
    """A token whose signature is none."""
    return SecretToken(f"{part(header)}.{part(claims)}.{signature}")


def signed(
    key: Any = KEY, header: Mapping[str, Any] = HEADER, claims: Mapping[str, Any] = CLAIMS
) -> SecretToken:
    """A token that `key` has signed."""
    algorithms = [header["alg"]]
    return SecretToken(jws.serialize_compact(dict(header), json.dumps(claims), key, algorithms=algorithms))


def claimed(**claims: Any) -> Draft:
    """A token with other claims; those that are None are left out."""
    merged = {**CLAIMS, **claims}
    return Draft(HEADER, {name: value for name, value in merged.items() if value is not None})


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (SecretToken("x" * 16_385), "too_large"),
        (SecretToken("opaque"), "malformed"),
        (SecretToken("a.b"), "malformed"),
        (SecretToken("a.b.c.d"), "malformed"),
        (unsigned(signature=""), "malformed"),
        (SecretToken("ä.b.c"), "malformed"),
        (SecretToken("!!!.e30.c2ln"), "malformed"),
        (unsigned(header=b"[]"), "malformed"),
        (unsigned(header=b'{"alg": "ES256", "alg": "none", "kid": "k"}'), "malformed"),
        (unsigned(claims=b'{"iss": "a", "iss": "b"}'), "malformed"),
        (unsigned(claims=b'{"iss": NaN}'), "malformed"),
        (unsigned(claims=b'{"iss": ' + b"[" * 200 + b"]" * 200 + b"}"), "malformed"),
        (unsigned(header={**HEADER, "kid": None}), "header"),
        (unsigned(header={"alg": "ES256"}), "header"),
        (unsigned(header={**HEADER, "kid": "x" * 501}), "header"),
        (unsigned(header={**HEADER, "jku": "https://evil.example"}), "header"),
        (unsigned(header={**HEADER, "jwk": PUBLIC}), "header"),
        (unsigned(header={**HEADER, "x5u": "https://evil.example"}), "header"),
        (unsigned(header={**HEADER, "x5c": []}), "header"),
        (unsigned(header={**HEADER, "crit": ["b64"], "b64": False}), "header"),
        (unsigned(header={**HEADER, "crit": ["unknown"]}), "header"),
        (unsigned(header={**HEADER, "zip": "DEF"}), "header"),
        (unsigned(header={**HEADER, "alg": "none"}), "algorithm"),
        (unsigned(header={**HEADER, "alg": "None"}), "algorithm"),
        (unsigned(header={**HEADER, "alg": "HS256"}), "algorithm"),
        (unsigned(header={**HEADER, "alg": ["ES256"]}), "algorithm"),
        (unsigned(claims={"sub": "ann"}), "issuer"),
        (unsigned(claims={"iss": ["a"]}), "issuer"),
    ],
)
def test_what_is_refused_before_any_key(token: SecretToken, reason: str) -> None:
    """Too long, unreadable, with a key of its own, with an algorithm that is never accepted; told without the token."""
    with pytest.raises(TokenRejected) as caught:
        read_token(token)
    assert caught.value.reason == reason
    assert token.reveal() not in str(caught.value)


def test_a_good_token() -> None:
    """A signed token of an issuer, for this service, says for whom it lets it act."""
    token = signed(claims={**CLAIMS, "act": {"sub": "front", "act": {"sub": "app"}}})
    draft = read_token(token)
    check_signature(token, draft, PUBLIC, ISSUER)
    assert check_claims(draft, audience=ME, now=NOW) == SecurityContext(
        "ann", ("mail.read", "mail.send"), ISSUER.name, (ME,), ("front", "app"), NOW + 300
    )


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # for the test's own signing of it
@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSAKey.generate_key(2048, {"kid": "k1"}), "RS256"),
        (OKPKey.generate_key("Ed25519", {"kid": "k1"}), "Ed25519"),
        (OKPKey.generate_key("Ed25519", {"kid": "k1"}), "EdDSA"),
    ],
    ids=["RS256", "Ed25519", "EdDSA"],
)
def test_other_algorithms_by_choice(key: Any, algorithm: str) -> None:
    """An issuer may use another algorithm; a token of it verifies with its key."""
    token = signed(key, {**HEADER, "alg": algorithm})
    issuer = Issuer(ISSUER.name, ISSUER.jwks_url, (algorithm,))
    check_signature(token, read_token(token), key.as_dict(private=False), issuer)


def foreign() -> list[Any]:
    """Tokens that look like the issuer's, and the key that it publishes under their id."""
    rsa = RSAKey.generate_key(2048, {"kid": "k1"})
    other = ECKey.generate_key("P-256", {"kid": "k1"})
    head, body, signature = signed().reveal().split(".")
    changed = part({**CLAIMS, "sub": "eve"})
    return [
        pytest.param(signed(other), PUBLIC, "signature", id="another key"),
        pytest.param(SecretToken(f"{head}.{changed}.{signature}"), PUBLIC, "signature", id="other claims"),
        pytest.param(SecretToken(f"{head}.{body}.{signature[:-2]}"), PUBLIC, "signature", id="cut"),
        pytest.param(signed(), rsa.as_dict(private=False), "signature", id="a key of another kind"),
        pytest.param(signed(), {**PUBLIC, "alg": "ES384"}, "algorithm", id="a key for another algorithm"),
        pytest.param(signed(), {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, "signature", id="no key"),
        pytest.param(
            signed(rsa, {**HEADER, "alg": "RS256"}), rsa.as_dict(private=False), "algorithm", id="RS256"
        ),
        pytest.param(signed(header={**HEADER, "typ": "JWT"}), PUBLIC, "type", id="an ID token"),
        pytest.param(signed(header={"alg": "ES256", "kid": "k1"}), PUBLIC, "type", id="no type"),
    ]


@pytest.mark.parametrize(("token", "key", "reason"), foreign())
def test_signatures_that_prove_nothing(token: SecretToken, key: Mapping[str, Any], reason: str) -> None:
    """Another key, other bytes, another algorithm than the issuer's or the key's, another type of token."""
    with pytest.raises(TokenRejected) as caught:
        check_signature(token, read_token(token), key, ISSUER)
    assert caught.value.reason == reason
    assert caught.value.__context__ is None, "the library's frames hold the token"


@pytest.mark.parametrize(
    "key",
    [
        {"kty": "EC", "crv": "P-999", "x": "AA", "y": "AA"},
        {"kty": "OKP", "crv": "of tomorrow", "x": "AA"},
        {"kty": "EC", "crv": "P-256", "x": "", "y": "é"},
        {"kty": "RSA", "n": "AA", "e": "AA"},
    ],
)
def test_a_published_key_that_nobody_can_use_verifies_nothing(key: dict[str, Any]) -> None:
    """A key set may have one of a curve that isn't known here: no failure of the step, which would be tried again."""
    with pytest.raises(TokenRejected) as caught:
        check_signature(signed(), read_token(signed()), key, ISSUER)
    assert caught.value.reason == "signature"
    assert caught.value.__context__ is None


def test_a_key_shared_by_two_verifies_nothing() -> None:
    """HS256 with the public key's text as the secret, the classic confusion, doesn't get past the header."""
    secret = OctKey.import_key(json.dumps(PUBLIC), {"kid": "k1"})
    token = signed(secret, {**HEADER, "alg": "HS256"})
    with pytest.raises(TokenRejected, match="algorithm"):
        read_token(token)


@pytest.mark.parametrize("kind", ["at+jwt", "AT+JWT", "application/at+jwt"])
def test_types_of_access_tokens(kind: str) -> None:
    """RFC 9068 has two ways to write it, and media types don't mind capitals."""
    token = signed(header={**HEADER, "typ": kind})
    check_signature(token, read_token(token), PUBLIC, ISSUER)


def test_an_issuer_without_types() -> None:
    """An issuer that sets no type may be accepted by choice."""
    token = signed(header={"alg": "ES256", "kid": "k1"})
    check_signature(token, read_token(token), PUBLIC, Issuer("i", "https://i", ("ES256",), None))


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"aud": None}, "audience"),
        ({"aud": f"{ME}/"}, "audience"),
        ({"aud": ME.upper()}, "audience"),
        ({"aud": ["https://other.example"]}, "audience"),
        ({"aud": {"a": ME}}, "audience"),
        ({"sub": None}, "subject"),
        ({"sub": ""}, "subject"),
        ({"sub": 7}, "subject"),
        ({"sub": "a\nb"}, "subject"),
        ({"exp": None}, "expiry"),
        ({"exp": "4000000000"}, "malformed"),
        ({"exp": True}, "malformed"),
        ({"exp": -1}, "malformed"),
        ({"nbf": NOW + LEEWAY_SECONDS + 1}, "not_yet"),
        ({"iat": NOW + LEEWAY_SECONDS + 1}, "not_yet"),
        ({"cnf": {"jkt": "x"}}, "sender_constrained"),
        ({"cnf": {}}, "sender_constrained"),
        ({"act": "front"}, "actors"),
        ({"act": {}}, "actors"),
        ({"act": {"sub": "a", "act": {"act": {}}}}, "actors"),
        ({"scope": {"a": 1}}, "scope"),
        ({"scope": ["a b"]}, "scope"),
    ],
)
def test_claims_that_never_will_be_good(claims: dict[str, Any], reason: str) -> None:
    """For another service or nobody, without an end, from the future, bound to its sender, with odd actors."""
    with pytest.raises(TokenRejected) as caught:
        check_claims(claimed(**claims), audience=ME, now=NOW)
    assert caught.value.reason == reason


def test_five_actors_are_enough() -> None:
    """A chain of five is read, one of six refused."""
    act: dict[str, Any] = {"sub": "a5"}
    for number in (4, 3, 2, 1):
        act = {"sub": f"a{number}", "act": act}
    assert check_claims(claimed(act=act), audience=ME, now=NOW).actors == ("a1", "a2", "a3", "a4", "a5")
    with pytest.raises(TokenRejected, match="more than 5 actors"):
        check_claims(claimed(act={"sub": "a0", "act": act}), audience=ME, now=NOW)


@pytest.mark.parametrize(("after", "good"), [(0.0, True), (29.9, True), (30.0, False)])
def test_the_end_of_a_token(after: float, good: bool) -> None:
    """It is good until its end, and as long after it as clocks may differ; then it has expired, which is no fraud."""
    draft = claimed(exp=NOW)
    if good:
        assert check_claims(draft, audience=ME, now=NOW + after).subject == "ann"
    else:
        with pytest.raises(TokenExpired):
            check_claims(draft, audience=ME, now=NOW + after)


@pytest.mark.parametrize(
    "claims",
    [
        {"scope": "a b a"},
        {"scope": ["a", "b"]},
        {"scope": None, "scp": "a b"},
        {"scope": None, "scp": ["a", "b"]},
    ],
)
def test_ways_to_write_scopes(claims: dict[str, Any]) -> None:
    """RFC 9068 has a text; others a list, or another name."""
    assert check_claims(claimed(**claims), audience=ME, now=NOW).scopes == ("a", "b")


# -- what a run may do


@given(
    granted=st.lists(st.sampled_from("abcdef"), unique=True),
    later=st.lists(st.sampled_from("abcdef"), unique=True),
)
def test_a_run_never_has_more_than_was_granted(granted: list[str], later: list[str]) -> None:
    """Whatever a later token has, a run has at most the scopes of its dispatch, and at most those of the token."""
    mandate = Mandate("ann", "i", tuple(granted))
    found = mandate.bound(SecurityContext("ann", tuple(later), "i"))
    assert set(found.scopes) == set(granted) & set(later)


@pytest.mark.parametrize("other", [("eve", "i"), ("ann", "j"), ("ann", None)])
def test_a_run_acts_for_one_person(other: tuple[str, str | None]) -> None:
    """A token of another person, or of one whom another issuer calls so, is refused."""
    with pytest.raises(TokenRejected, match="subject"):
        Mandate("ann", "i").bound(SecurityContext(other[0], (), other[1]))


@given(
    st.builds(
        Mandate,
        st.text(min_size=1),
        st.text(min_size=1),
        st.lists(st.text(min_size=1)).map(tuple),
        st.none() | st.text(min_size=1),
    )
)
def test_a_mandate_travels_as_a_header(mandate: Mandate) -> None:
    """What is written is read; the header is plain text."""
    text = mandate.dump()
    assert text.isascii()
    assert text.isprintable()
    assert Mandate.read({MANDATE: text}) == mandate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"sub": 1}',
        '{"sub": "a", "iss": "b", "scopes": 3, "handle": null}',
        '{"sub": "a", "iss": "b", "scopes": "abc", "handle": null}',
        '{"sub": "a", "iss": "b", "scopes": [1], "handle": null}',
        '{"sub": "a", "iss": "b", "scopes": [], "handle": {"a": 1}}',
        '{"sub": "a", "sub": "c", "iss": "b", "scopes": [], "handle": null}',
    ],
)
def test_a_header_that_is_no_mandate(text: str) -> None:
    """It is refused: for whom the run acts isn't known."""
    with pytest.raises(TokenRejected, match="mandate"):
        Mandate.read({MANDATE: text})


@pytest.mark.parametrize(
    "fields",
    [
        {"handle": ""},
        {"handle": "x" * 501},
        {"handle": "a\nb"},
        {"handle": signed().reveal()},
        {"subject": ""},
        {"issuer": 7},
        {"scopes": "mail.read"},
        {"scopes": ("a b",)},
        {"scopes": ('"',)},
    ],
)
def test_handles_that_are_none(fields: dict[str, Any]) -> None:
    """Too long, not a name, or a token in its place, which would be recorded; the error doesn't show it."""
    good: dict[str, Any] = {"handle": "h", "subject": "ann", "issuer": "i", "scopes": ("a",)}
    with pytest.raises(InputInvalid) as caught:
        GrantHandle(**{**good, **fields})
    assert "eyJ" not in str(caught.value)
