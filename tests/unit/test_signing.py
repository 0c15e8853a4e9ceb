"""Signed messages: whatever was changed, swapped, replayed or made up is refused, with its own reason."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import RSAKey

from paigeant.envelope import HEAD_BYTES, PlainEnvelope, split, without_token
from paigeant.errors import MessageInvalid, MessageTooLarge
from paigeant.keys import ALGORITHMS, ALL_ROLES, Algorithm, Key, Roles, TrustedKey
from paigeant.message import SENT_FROM, PaigeantMessage
from paigeant.signing import REASONS, SignedEnvelope
from paigeant.slip import RoutingSlip, Step
from paigeant.store import DeadLetter

NOW = 1_800_000_000.0
KEYS = {algorithm: Key.generate(now=1.0, algorithm=algorithm) for algorithm in ALGORITHMS}


class Keys:
    """One key to sign with, and those that are believed."""

    def __init__(self, key: Key, *trusted: TrustedKey, roles: Roles = ALL_ROLES) -> None:
        self.key, self.roles = key, roles
        self.trusted = {each.kid: each for each in trusted or (TrustedKey(key.kid, key.public, roles),)}

    def signer(self) -> tuple[Key, Roles]:
        return self.key, self.roles

    async def find(self, kid: str) -> TrustedKey | None:
        return self.trusted.get(kid)


def envelope(
    algorithm: Algorithm = "Ed25519", *, keys: Keys | None = None, now: float = NOW, **changes: Any
) -> SignedEnvelope:
    """One that requires signatures."""
    told = {"deployment": "shop", "requires": True, "lifetime": 3600.0, **changes}
    return SignedEnvelope(keys or Keys(KEYS[algorithm]), clock=lambda: now, **told)


def message(**changes: Any) -> PaigeantMessage:
    """The second step of a run is due."""
    slip = RoutingSlip((Step("reserve", id="reserve"), Step("pay", id="pay"))).mark_complete()
    values = {"message_id": "r/pay/do/0", "workflow_id": "r", "routing_slip": slip, "payload": {"sum": 5}}
    return PaigeantMessage(
        **{**values, "workflow": "order", "headers": {"traceparent": "00-1-2-01"}, **changes}
    )


async def reason(envelope: SignedEnvelope, wire: bytes, topic: str = "pay") -> str:
    """Why it is refused."""
    with pytest.raises(MessageInvalid) as found:
        await envelope.open(topic, wire)
    return found.value.reason


def changed(wire: bytes, **headers: Any) -> bytes:
    """The message with other values in the header of its signature, which then no longer fits."""
    line, body = wire.split(b"\n", 1)
    protected, _, signature = json.loads(line)["jws_signature"].partition("..")
    header = {**json.loads(base64.urlsafe_b64decode(protected + "==")), **headers}
    header = {name: value for name, value in header.items() if value is not None}
    return signed(json.dumps(header).encode(), signature, body)


def signed(header: bytes, signature: str, body: bytes) -> bytes:
    """A frame of these parts."""
    text = base64.urlsafe_b64encode(header).rstrip(b"=").decode() + ".." + signature
    return json.dumps({"jws_signature": text}, separators=(",", ":")).encode() + b"\n" + body


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_what_was_sealed_is_opened(algorithm: Algorithm) -> None:
    """With each algorithm the message comes back as it was, with its signature beside."""
    sealed = envelope(algorithm).seal(message(), "pay")
    opened = await envelope(algorithm).open("pay", sealed)
    signature = opened.headers["jws_signature"]
    assert opened == message(headers={"traceparent": "00-1-2-01", "jws_signature": signature})
    header = json.loads(base64.urlsafe_b64decode(signature.partition("..")[0] + "=="))
    assert header == {
        "alg": algorithm,
        "kid": KEYS[algorithm].kid,
        "typ": "paigeant-msg+jws",
        "crit": ["b64"],
        "b64": False,
    }


async def test_all_that_matters_is_signed() -> None:
    """Ids, slip with its policy, payload, trace, deployment, topic, instants, the token's digest: all in the body."""
    sealed = envelope().seal(message(headers={"traceparent": "00-1-2-01", "obo_token": "a.b.c"}), "pay")
    head, body = split(sealed, 10_000)
    assert head["obo_token"] == "a.b.c"
    assert b"a.b.c" not in body
    value = json.loads(body)
    assert value["seal"] == {
        "deployment": "shop",
        "topic": "pay",
        "issued_at": int(NOW),
        "expires_at": int(NOW) + 3600,
        "obo_hash": hashlib.sha256(b"a.b.c").hexdigest(),
    }
    assert {"message_id", "workflow_id", "workflow", "routing_slip", "payload", "headers"} <= value.keys()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_each_bit_counts(algorithm: Algorithm) -> None:
    """A sample message with any single bit flipped, in its signature or its body, is refused."""
    sealed = bytearray(envelope(algorithm).seal(message(), "pay"))
    opener, seen = envelope(algorithm), set()
    for place in range(len(sealed)):
        for bit in range(8):
            sealed[place] ^= 1 << bit
            seen.add(await reason(opener, bytes(sealed)))
            sealed[place] ^= 1 << bit
    assert (await opener.open("pay", bytes(sealed))).payload == message().payload
    assert seen >= {"bad_signature", "bad_frame", "bad_header", "unsigned", "unknown_key"}
    assert seen <= set(REASONS) | {"not_json", "not_utf8", "wrong_shape"}


async def test_parts_of_two_messages_make_none() -> None:
    """The signature of one in front of the body of another, and a body's own seal in another body."""
    one, other = (envelope().seal(message(workflow_id=name), "pay") for name in ("one", "other"))
    heads, bodies = zip(one.split(b"\n", 1), other.split(b"\n", 1), strict=True)
    assert await reason(envelope(), heads[0] + b"\n" + bodies[1]) == "bad_signature"
    assert await reason(envelope(), bodies[0]) == "unsigned"


@pytest.mark.parametrize(
    ("opener", "topic", "why"),
    [
        (envelope(), "refund", "wrong_topic"),
        (envelope(deployment="test"), "pay", "wrong_deployment"),
        (envelope(now=NOW + 3600 + 61), "pay", "expired"),
        (envelope(now=NOW - 61), "pay", "not_yet_valid"),
        (envelope("ES256"), "pay", "unknown_key"),
    ],
)
async def test_a_replay_elsewhere_is_refused(opener: SignedEnvelope, topic: str, why: str) -> None:
    """In another topic or deployment, too late, too early, and where nobody knows the key."""
    assert await reason(opener, envelope().seal(message(), "pay"), topic) == why


async def test_clocks_may_differ_by_a_minute() -> None:
    """Within it a message is neither early nor late."""
    sealed = envelope().seal(message(), "pay")
    for now in (NOW - 59, NOW + 3600 + 59):
        assert (await envelope(now=now).open("pay", sealed)).payload == message().payload


def hmac_with_the_public_key(sealed: bytes) -> bytes:
    """What a reader takes that lets the header choose the algorithm."""
    body = sealed.split(b"\n", 1)[1]
    header = {
        "alg": "HS256",
        "kid": KEYS["RS256"].kid,
        "typ": "paigeant-msg+jws",
        "crit": ["b64"],
        "b64": False,
    }
    text = json.dumps(header).encode()
    protected = base64.urlsafe_b64encode(text).rstrip(b"=")
    secret = RSAKey.import_key({**KEYS["RS256"].public}).as_pem(private=False)
    raw = hmac.new(secret, protected + b"." + body, hashlib.sha256).digest()
    return signed(text, base64.urlsafe_b64encode(raw).rstrip(b"=").decode(), body)


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (lambda wire: changed(wire, alg="none"), "bad_header"),
        (hmac_with_the_public_key, "bad_header"),
        (lambda wire: changed(wire, alg="ES256"), "bad_header"),
        (lambda wire: changed(wire, crit=["b64", "exp"]), "bad_header"),
        (lambda wire: changed(wire, crit=None), "bad_header"),
        (lambda wire: changed(wire, b64=True), "bad_header"),
        (lambda wire: changed(wire, typ="JWT"), "bad_header"),
        (lambda wire: changed(wire, jku="https://evil.example/keys"), "bad_header"),
        (lambda wire: changed(wire, jwk={"kty": "OKP"}), "bad_header"),
        (lambda wire: changed(wire, x5u="https://evil.example/cert"), "bad_header"),
        (lambda wire: changed(wire, kid="another"), "unknown_key"),
        (lambda wire: changed(wire, kid=["a"]), "bad_header"),
        (lambda wire: changed(wire), "bad_signature"),  # other blanks: not the bytes that were signed
        (lambda wire: signed(b'{"alg":"RS256","alg":"none"}', "AAAA", wire.split(b"\n", 1)[1]), "bad_header"),
        (lambda wire: wire.replace(b"..", b".e30."), "bad_header"),
        (lambda wire: wire.replace(b'"}\n', b'="}\n', 1), "bad_header"),
        (lambda wire: wire.replace(b'{"jws', b'{"x":"y","jws'), "unsigned"),
        (lambda wire: wire.replace(b'"}\n', b'","x":"y"}\n', 1), "bad_frame"),
        (lambda wire: b'{"jws_signature":"' + b"A" * HEAD_BYTES, "bad_frame"),
    ],
)
async def test_a_forged_header_is_refused(forge: Callable[[bytes], bytes], why: str) -> None:
    """The header has exactly five members with exactly these values, and the key decides about the algorithm."""
    assert await reason(envelope("RS256"), forge(envelope("RS256").seal(message(), "pay"))) == why


async def test_the_trace_context_is_signed() -> None:
    """Nobody on the way puts a run into another trace, or says anything else of it to whoever keeps its spans."""
    headers = {"traceparent": "00-1-2-01", "tracestate": "vendor=kept"}
    sealed = envelope().seal(message(headers=headers), "pay")
    opened = await envelope().open("pay", sealed)
    assert {name: opened.headers[name] for name in headers} == headers
    for was, becomes in (
        (b"00-1-2-01", b"00-1-3-01"),
        (b"vendor=kept", b"vendor=lost"),
        (b"tracestate", b"tracestatf"),
    ):
        assert await reason(envelope(), sealed.replace(was, becomes)) == "bad_signature"


async def test_nothing_is_parsed_before_it_is_verified() -> None:
    """A body that would make the parser complain, with a wrong signature, is refused for its signature."""
    sealed = envelope().seal(message(), "pay").split(b"\n", 1)[0]
    assert await reason(envelope(), sealed + b"\n" + b"[" * 100_000) == "bad_signature"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda body: body.replace(b'"workflow":"order"', b'"workflow":"a","workflow":"order"'),
            "duplicate_key",
        ),
        (lambda body: body.replace(b'"sum":5', b'"sum":NaN'), "not_a_number"),
        (lambda body: body.replace(b'"sum":5', b'"sum":1e400'), "number_out_of_range"),
        (lambda body: body.replace(b'"sum":5', b'"sum":"\\ud800"'), "lone_surrogate"),
        (lambda body: body.replace(b'"sum":5', b'"sum":' + b"[" * 100_000 + b"]" * 100_000), "too_deep"),
        (lambda body: body.replace(b'"sum":5', b'"sum":5,"__class__":"os.system"'), None),
        (lambda body: body.replace(b'"workflow":"order"', b'"type":"subprocess.Popen"'), "wrong_shape"),
        (lambda body: body.replace(b'"seal":', b'"sea":'), "wrong_shape"),
        (lambda body: body.replace(b'"headers":{', b'"headers":{"obo_token":"a",'), "wrong_shape"),
        (lambda body: b"null", "wrong_shape"),
    ],
)
async def test_what_is_signed_is_still_parsed_strictly(
    change: Callable[[bytes], bytes], why: str | None
) -> None:
    """Whoever has a key may yet send what no reader here believes. A name of a class in a payload is a text."""
    signer = envelope()
    body = change(split(signer.seal(message(), "pay"), 10_000)[1])
    wire = resealed(body)
    if why is None:
        assert (await signer.open("pay", wire)).payload["__class__"] == "os.system"
    else:
        assert await reason(signer, wire) == why


def resealed(body: bytes) -> bytes:
    """Any body with a right signature."""
    from paigeant import signing
    from paigeant.envelope import framed

    return framed(body, signature=signing._sign(KEYS["Ed25519"], body))


async def test_size_comes_first() -> None:
    """50 MB are refused before anything of them is read, signed or not."""
    with pytest.raises(MessageTooLarge):
        await envelope().open("pay", b"{" * 50_000_000)
    with pytest.raises(MessageTooLarge):
        await envelope(limit_bytes=100).open("pay", b"{" * (HEAD_BYTES + 101))


async def test_the_twin_of_an_ecdsa_signature_is_the_same_message() -> None:
    """(r, n - s) verifies like (r, s): so nothing here is known by its signature."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    sealed = envelope("ES256").seal(message(), "pay")
    text = json.loads(sealed.split(b"\n", 1)[0])["jws_signature"].partition("..")[2]
    raw = base64.urlsafe_b64decode(text + "==")
    twin = raw[:32] + (order - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
    other = sealed.replace(text.encode(), base64.urlsafe_b64encode(twin).rstrip(b"="))
    assert other != sealed
    first, second = [await envelope("ES256").open("pay", wire) for wire in (sealed, other)]
    assert first.message_id == second.message_id
    assert first.evolve(headers={}) == second.evolve(headers={})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"revoked_at": NOW - 9_999}, "revoked_key"),
        ({"revoked_at": NOW + 9_999}, "revoked_key"),
        ({"not_after": NOW - 61}, "expired_key"),
        ({"not_after": 0}, "expired_key"),
        ({"not_before": NOW + 61}, "expired_key"),
        ({"roles": Roles(dispatch=["*"])}, "wrong_role"),
        ({"roles": Roles(run=["letter"])}, "wrong_role"),
    ],
)
async def test_a_key_holds_for_a_while_and_for_what_it_is_for(changes: dict[str, Any], why: str) -> None:
    """A right signature doesn't count by a key that is revoked, over, not yet begun, or for something else."""
    key = KEYS["Ed25519"]
    believed = Keys(key, TrustedKey(key.kid, key.public, **changes))
    assert await reason(envelope(keys=believed), envelope().seal(message(), "pay")) == why


async def test_whoever_did_the_step_before_sends_the_next() -> None:
    """The signer of a message says which topic it has worked on, and needs the role for that."""
    roles = Roles(run=["reserve"])
    keys = Keys(KEYS["Ed25519"], roles=roles)
    following = message(headers={SENT_FROM: "reserve"})
    assert (
        await envelope(keys=keys).open("pay", envelope(keys=keys).seal(following, "pay"))
    ).headers.keys() == {"jws_signature"}
    assert envelope(keys=keys).may_send(following, "pay")
    assert not envelope(keys=keys).may_send(message(), "pay")
    assert await reason(envelope(keys=keys), envelope(keys=keys).seal(message(), "pay")) == "wrong_role"


async def test_a_token_is_bound_to_its_message() -> None:
    """Another one in front of the body, none, or one where there was none, is refused. No dead letter keeps it."""
    with_token = envelope().seal(message(headers={"obo_token": "a.b.c"}), "pay")
    assert (await envelope().open("pay", with_token)).headers["obo_token"] == "a.b.c"
    assert await reason(envelope(), with_token.replace(b"a.b.c", b"a.b.d")) == "wrong_token"
    assert await reason(envelope(), with_token.replace(b',"obo_token":"a.b.c"', b"", 1)) == "wrong_token"
    without = envelope().seal(message(), "pay")
    assert await reason(envelope(), without.replace(b'"}\n', b'","obo_token":"a.b.c"}\n', 1)) == "wrong_token"
    kept = DeadLetter.about("m", "pay", "unsigned", "why", with_token, 1).body
    assert b"a.b.c" not in kept
    assert kept.endswith(with_token.partition(b"\n")[2]), "what was signed is kept as it is"


async def test_no_token_is_kept_of_a_damaged_frame() -> None:
    """Whichever bit of the first line is changed, within the token as well, the dead letter has no part of it.

    One bit makes a J, which stands at the beginning of each token, a line break. Nor has it where bytes are lost.
    """
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.canaryJcanary"
    wire = envelope().seal(message(headers={"obo_token": token}), "pay")
    line, body = wire.index(b"\n"), wire.partition(b"\n")[2]
    changed = [bytearray(wire) for _ in range(line * 8)]
    for bit, one in enumerate(changed):
        one[bit // 8] ^= 1 << bit % 8
    for number in range(line - len("canary")):
        changed += [bytearray(wire[number + 1 :]), bytearray(wire[:number] + b"\r\n" + wire[number:])]
    for one in changed:
        kept = DeadLetter.about("m", "pay", "bad_frame", "", bytes(one), 1).body
        assert b"canary" not in kept, one
        assert body in kept or not kept, one


def test_a_token_in_a_body_is_not_kept() -> None:
    """A publisher that puts it there is refused, and what is kept has stars in its place."""
    body = b'{"spec_version":"1.0","headers":{"obo_token" : "a.b.c","x":"y"}}'
    assert without_token(body) == b'{"spec_version":"1.0","headers":{"obo_token" : "***","x":"y"}}'


async def test_signing_may_be_introduced_step_by_step() -> None:
    """`sign` takes what isn't signed, but nothing signed wrongly; without signing, a signature is passed over."""
    plain, lenient = PlainEnvelope(), envelope(requires=False)
    sealed = lenient.seal(message(), "pay")
    assert (await lenient.open("pay", plain.seal(message(), "pay"))) == message()
    assert await reason(lenient, sealed.replace(b'"sum":5', b'"sum":6')) == "bad_signature"
    assert (await plain.open("pay", sealed)).payload == {"sum": 5}
    assert (await plain.open("pay", sealed)).seal is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
async def test_no_bytes_at_all_are_believed(noise: bytes) -> None:
    """Whatever comes ends in a reason of the fixed set."""
    await is_refused(noise)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"{", b"}", b'"jws_signature":', b'"obo_token":', b'"a..b"', b"\n", b",", b'{"jws_signature":"']
        )
        | st.binary(max_size=20),
        max_size=12,
    )
)
async def test_no_frame_at_all_is_believed(parts: list[bytes]) -> None:
    """Nor do pieces of frames, in any order."""
    await is_refused(b"".join(parts))


async def is_refused(wire: bytes) -> None:
    """By every envelope, and without any other error."""
    assert await reason(envelope(), wire) in REASONS
    for opener in (PlainEnvelope(), envelope(requires=False)):
        with pytest.raises(MessageInvalid):
            await opener.open("pay", wire)


async def test_a_revoked_key_starts_no_run() -> None:
    """Nor one that was revoked after its message had been opened."""
    keys = Keys(KEYS["Ed25519"])
    opener = envelope(keys=keys)
    opened = await opener.open("pay", opener.seal(message(), "pay"))
    assert await opener.may_start(opened)
    keys.trusted = {kid: replace(key, revoked_at=NOW) for kid, key in keys.trusted.items()}
    assert not await opener.may_start(opened)
