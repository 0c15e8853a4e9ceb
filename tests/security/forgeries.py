"""Messages that nobody may believe, each with the reason for which it is refused."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import Any

from joserfc.jwk import OKPKey
from tests.security.signed import message, sealing

from paigeant import signing
from paigeant.envelope import framed
from paigeant.keys import Key

__all__ = ["encoded", "forged"]


def forged(own: Key) -> dict[str, tuple[bytes, str]]:
    """Messages that nobody may believe, by their ids, with the reason for which each is refused."""
    good = sealing(own).seal(message(), "pay")
    line, body = good.split(b"\n", 1)
    signature = json.loads(line)["jws_signature"].rpartition("..")[2]
    foreign = Key.generate(now=1.0)
    now = time.time()
    cases = {
        "unsigned": (body, "unsigned"),
        "sum": (good.replace(b'"sum":5', b'"sum":6'), "bad_signature"),
        "other key": (sealing(foreign).seal(message(), "pay"), "unknown_key"),
        "topic": (sealing(own).seal(message(), "refund"), "wrong_topic"),
        "deployment": (sealing(own, deployment="test").seal(message(), "pay"), "wrong_deployment"),
        "old": (sealing(own, clock=lambda: now - 9000, lifetime=60.0).seal(message(), "pay"), "expired"),
        "early": (sealing(own, clock=lambda: now + 9000).seal(message(), "pay"), "not_yet_valid"),
        "cut": (good[: len(line) - 9], "bad_frame"),
        "not canonical": (good.replace(signature.encode(), signature.encode() + b"="), "bad_header"),
        "huge": (b"\x00" * (8 * 1024 * 1024), "too_large"),
    }
    cases |= forged_headers(own, good) | badly_written(own, body) | put_together(own)
    flips = range(0, len(body) * 8, max(1, len(body) * 8 // 12))
    for bit in flips:
        changed = bytearray(body)
        changed[bit // 8] ^= 1 << bit % 8
        cases[f"flip {bit}"] = (line + b"\n" + bytes(changed), "bad_signature")
    return cases


def forged_headers(own: Key, good: bytes) -> dict[str, tuple[bytes, str]]:
    """The good message behind other headers of a signature: none of them may choose how it is verified."""
    line, body = good.split(b"\n", 1)
    protected, _, signature = json.loads(line)["jws_signature"].partition("..")
    header = json.loads(base64.urlsafe_b64decode(protected + "=="))

    def with_header(signature: str | None = signature, **changes: Any) -> bytes:
        text = encoded(json.dumps({**header, **changes}, separators=(",", ":")).encode())
        if (
            signature is None
        ):  # what a reader takes that lets the header choose: a MAC with what everybody knows
            public = OKPKey.import_key({**own.public}).as_pem(private=False)
            signature = encoded(hmac.digest(public, f"{text}.".encode() + body, "sha256"))
        return (
            json.dumps({"jws_signature": f"{text}..{signature}"}, separators=(",", ":")).encode()
            + b"\n"
            + body
        )

    assert with_header() == good
    return {
        "none": (with_header("", alg="none"), "bad_header"),
        "none, signed": (with_header(alg="none"), "bad_header"),
        "hmac": (with_header(None, alg="HS256"), "bad_header"),
        "other algorithm": (with_header(alg="ES256"), "bad_header"),
        "crit": (with_header(crit=["b64", "exp"]), "bad_header"),
        "no crit": (with_header(crit=[]), "bad_header"),
        "encoded": (with_header(b64=True), "bad_header"),
        "own key": (with_header(jwk=Key.generate(now=1.0).public), "bad_header"),
        "key elsewhere": (with_header(jku="https://evil.example/keys"), "bad_header"),
        "no signature": (with_header(""), "bad_header"),
    }


def badly_written(own: Key, body: bytes) -> dict[str, tuple[bytes, str]]:
    """Bodies that two readers may understand in two ways, or that break one, rightly signed."""
    sum = b'"sum":5'
    bodies = {
        "twice": (body.replace(sum, b'"sum":4,"sum":5'), "duplicate_key"),
        "NaN": (body.replace(sum, b'"sum":NaN'), "not_a_number"),
        "infinity": (body.replace(sum, b'"sum":-Infinity'), "not_a_number"),
        "1e400": (body.replace(sum, b'"sum":1e400'), "number_out_of_range"),
        "2^64": (
            body.replace(b'"routing_slip":{', b'"routing_slip":{"added":18446744073709551616,'),
            "number_out_of_range",
        ),
        "digits": (body.replace(sum, b'"sum":' + b"9" * 5000), "number_out_of_range"),
        "surrogate": (body.replace(sum, b'"sum":"\\ud800"'), "lone_surrogate"),
        "not UTF-8": (body.replace(sum, b'"sum":"\xff"'), "not_utf8"),
        "deep": (body.replace(sum, b'"sum":' + b"[" * 100_000 + b"]" * 100_000), "too_deep"),
        "deeper than allowed": (body.replace(sum, b'"sum":' + b"[" * 70 + b"]" * 70), "too_deep"),
        "two values": (body + b"{}", "not_json"),
        "no seal": (body.replace(b'"seal":', b'"sea":'), "wrong_shape"),
        "nothing": (b"", "not_json"),
    }
    return {
        name: (framed(text, signature=signing._sign(own, text)), reason)
        for name, (text, reason) in bodies.items()
    }


def put_together(own: Key) -> dict[str, tuple[bytes, str]]:
    """Parts of two good messages: signature, body, token and seal of one with those of another."""
    one, other = (
        sealing(own).seal(
            message(f"{run}/pay/do/0", workflow_id=run, headers={"obo_token": f"{run}.b.c"}), "pay"
        )
        for run in ("one", "other")
    )
    (head, body), (other_head, other_body) = (wire.split(b"\n", 1) for wire in (one, other))
    seal, other_seal = (json.loads(text)["seal"] for text in (body, other_body))
    resealed = json.dumps({**json.loads(body), "seal": {**seal, "obo_hash": other_seal["obo_hash"]}})
    return {
        "other body": (head + b"\n" + other_body, "bad_signature"),
        "other head": (other_head + b"\n" + body, "bad_signature"),
        "other token": (one.replace(b"one.b.c", b"other.b.c", 1), "wrong_token"),
        "other seal": (head + b"\n" + resealed.encode(), "bad_signature"),
        "no head": (body, "unsigned"),
        "two heads": (other_head + b"\n" + one, "bad_signature"),
    }


def encoded(value: bytes) -> str:
    """In base64url without padding."""
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
