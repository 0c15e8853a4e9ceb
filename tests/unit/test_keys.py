"""Keys and key rings."""

from __future__ import annotations

import json

import pytest
from joserfc.jwk import OKPKey

from paigeant.errors import ConfigurationError
from paigeant.keys import ALGORITHMS, Key, KeyRing, Roles, thumbprint


def ring(keys: int = 1) -> KeyRing:
    """A ring of so many new keys."""
    made = KeyRing()
    for number in range(keys):
        made = made.rotate(Key.generate(now=float(number)))
    return made


def test_a_key_is_named_by_its_thumbprint() -> None:
    """The id of a key follows from its public part alone (RFC 7638)."""
    key = Key.generate(now=1.0)
    assert OKPKey.import_key({**key.public}).thumbprint() == key.kid


def test_the_public_part_has_nothing_private() -> None:
    """What others may know of a key of any kind is its kind, its public numbers, its id and its algorithm."""
    numbers = {"Ed25519": {"crv", "x"}, "ES256": {"crv", "x", "y"}, "RS256": {"n", "e"}}
    for algorithm in ALGORITHMS:
        key = Key.generate(now=1.0, algorithm=algorithm)
        assert set(key.public) == {"kty", "kid", "alg", *numbers[algorithm]}
        assert key.public["alg"] == key.algorithm == algorithm


def test_a_key_does_not_show_its_private_part() -> None:
    """Printing a key, or a ring, in a log gives nothing away."""
    made = ring()
    private = made.as_dict()["keys"][0]["jwk"]["d"]
    assert private not in repr(made)


def test_rotating_keeps_the_old_key() -> None:
    """The new key is active, the old one can still be found."""
    old = ring()
    new = old.rotate(Key.generate(now=2.0))
    assert new.find(old.active.kid) is old.active
    assert new.active is not old.active


def test_a_ring_comes_back_from_json_as_it_was() -> None:
    """Writing and reading a ring changes nothing."""
    made = ring(3)
    assert KeyRing.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_an_empty_ring_has_no_active_key() -> None:
    """Asking an empty ring says what to do."""
    with pytest.raises(ConfigurationError, match="paigeant keys generate"):
        _ = KeyRing().active


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"version": 2, "keys": []},
        {"version": 1, "keys": {}},
        {"version": 1, "keys": [1]},
        {"version": 1, "keys": [{"kid": "a"}]},
        {"version": 1, "keys": [{"kid": "a", "created_at": 1, "jwk": {"kty": "oct", "k": "AAAA"}}]},
    ],
)
def test_something_else_is_no_ring(value: object) -> None:
    """What isn't a key ring is refused, however it is wrong."""
    with pytest.raises(ConfigurationError):
        KeyRing.from_dict(value)


def test_a_key_under_a_wrong_name_is_refused() -> None:
    """A ring in which a key has the id of another one was tampered with."""
    value = ring().as_dict()
    value["keys"][0]["kid"] = "another"
    with pytest.raises(ConfigurationError, match="another thumbprint"):
        KeyRing.from_dict(value)


def test_a_public_key_cannot_be_in_a_ring() -> None:
    """A ring is of key pairs: without the private part nothing can be signed."""
    value = ring().as_dict()
    del value["keys"][0]["jwk"]["d"]
    with pytest.raises(ConfigurationError, match="has no private part"):
        KeyRing.from_dict(value)


def test_a_revoked_key_signs_no_more() -> None:
    """The newest key that is left is active; a ring without one says what to do."""
    made = ring(2)
    first, second = made.keys
    left = made.revoke(second.kid, now=5.0)
    assert left.active is first
    assert [key.revoked_at for key in left.keys] == [None, 5.0]
    assert left.revoke(second.kid, now=9.0) == left
    with pytest.raises(ConfigurationError, match="paigeant keys rotate"):
        _ = left.revoke(first.kid, now=6.0).active
    with pytest.raises(ConfigurationError, match=f"no key 'another'; it has: {first.kid}"):
        made.revoke("another", now=1.0)


@pytest.mark.parametrize(
    ("jwk", "message"),
    [
        ({"kty": "oct", "k": "AAAA"}, "can't sign messages"),
        ({"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA"}, "can't sign messages"),
        ({"kty": "OKP", "crv": "Ed25519", "x": "AA"}, "this is no key"),
        ({"kty": "RSA", "n": "AQAB", "e": "AQAB"}, "2048 bits or more"),
        ({"kty": "RSA", "n": "A" * 200 + "9" * 171, "e": "AQAB"}, "2048 bits or more"),
    ],
)
def test_what_can_t_sign_messages_is_no_key(jwk: dict[str, str], message: str) -> None:
    """Symmetric keys, other curves, broken numbers and short RSA keys are refused by name."""
    with pytest.raises(ConfigurationError, match=message):
        thumbprint(jwk)


@pytest.mark.parametrize(
    ("roles", "sends"),
    [
        (Roles(), set()),
        (Roles(dispatch=["order"]), {"first"}),
        (Roles(dispatch=["refund"]), set()),
        (Roles(run=["pay"]), {"first", "next", "undo"}),
        (Roles(run=["p*"]), {"first", "next", "undo"}),
        (Roles(run=["reserve"]), {"next", "undo"}),
        (Roles(run=["letter"]), set()),
        (Roles(amend=True), {"first", "next", "undo"}),
    ],
)
def test_roles_say_who_sends_what(roles: Roles, sends: set[str]) -> None:
    """For topic `pay` of workflow `order`: who may do it, whoever did the step before, whoever may start the run."""
    about = {"workflow": "order", "topic": "pay"}
    found = {
        "first": roles.may_send(**about, sent_from=None, has_begun=False),
        "next": roles.may_send(**about, sent_from="reserve", has_begun=True),
        "undo": roles.may_send(**about, sent_from="reserve", has_begun=True),
    }
    assert {name for name, may in found.items() if may} == sends


@pytest.mark.parametrize("name", ["created_at", "revoked_at"])
@pytest.mark.parametrize("instant", ["nan", "inf", 1e300, -1, 10**400, "soon"])
def test_a_key_with_no_date_is_refused(name: str, instant: object) -> None:
    """It could be signed with, and `keys list` ended with a traceback."""
    value = ring().as_dict()
    value["keys"][0][name] = instant
    with pytest.raises(ConfigurationError, match="no instant created_at, or a revoked_at that is none"):
        KeyRing.from_dict(value)


def test_no_id_of_a_key_looks_like_an_option() -> None:
    """`paigeant keys revoke -x...` would be told that there is no such option: one of 64 thumbprints begins so."""
    kids = [Key.generate(now=1.0).kid for _ in range(1000)]
    assert not [kid for kid in kids if kid.startswith("-")]
    assert len(set(kids)) == 1000
