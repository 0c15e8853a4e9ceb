"""Envelope: a message as the bytes that travel through a topic, and the message in such bytes.

Every transport, and every transaction that posts for one, seals and opens by the envelope it was given: whether
messages are signed is decided in one place. What travels is the body (`message.py`), behind a line of JSON with what
must stay out of it: its signature, and the token of the person for whom the step acts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from paigeant.codec import parse_strict
from paigeant.errors import MessageInvalid, MessageTooLarge
from paigeant.message import DEFAULT_LIMIT_BYTES, PaigeantMessage, decode, encode
from paigeant.secret import OBO_TOKEN, masked_body

__all__ = [
    "HEAD_BYTES",
    "OBO_TOKEN",
    "SIGNATURE",
    "Envelope",
    "PlainEnvelope",
    "framed",
    "split",
]

SIGNATURE = "jws_signature"
"""It stands in front of the body, not in it, like the token."""

HEAD_BYTES = 24 * 1024
"""How long the line with them may be, beside the body: a token has up to 16 KiB."""

_HEADERS = frozenset({SIGNATURE, OBO_TOKEN})
_BODY = b'{"spec_version"'
"""What the bodies that we write begin with."""
_BEGINNINGS = tuple(f'{{"{name}"'.encode() for name in sorted(_HEADERS))


class Envelope(Protocol):
    """Seals and opens messages for an installation. One value, shared by its transports."""

    limit_bytes: int
    """The largest body."""

    seal_bytes: int
    """What a seal adds to a body at most, but for the topics that it names."""

    def seal(self, message: PaigeantMessage, topic: str) -> bytes:
        """The bytes of `message` for whoever serves `topic`. Raises MessageTooLarge, MessageInvalid."""
        ...

    async def open(self, topic: str, wire: bytes) -> PaigeantMessage:
        """The message in bytes that came out of `topic`. Raises MessageInvalid: its `reason` is one of a fixed set."""
        ...

    def may_send(self, message: PaigeantMessage, topic: str) -> bool:
        """Whether receivers that follow the same rules take this message from this process."""
        ...

    async def may_start(self, message: PaigeantMessage) -> bool:
        """Whether who has sent `message`, which was opened here, may start runs of its workflow."""
        ...

    @property
    def told(self) -> str:
        """How it seals, for a person. Raises ConfigurationError when that isn't possible any more."""
        ...

    @property
    def serves_all(self) -> bool:
        """Whether it may send whatever is due, so that a sweep needn't leave any topic to others."""
        ...


class PlainEnvelope:
    """Signs nothing and believes what comes. A signature that another process has put there is passed over.

    `is_local` is for whoever is told: messages come from this host alone.
    """

    serves_all = True
    seal_bytes = 0

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES, *, is_local: bool = False) -> None:
        self.limit_bytes = limit_bytes
        self.told = "off: whoever can write to the transport can start any activity"
        if is_local:
            self.told = "off: no message leaves this host"

    def seal(self, message: PaigeantMessage, topic: str) -> bytes:
        if _HEADERS.isdisjoint(message.headers):
            return encode(message, limit_bytes=self.limit_bytes)
        body = encode(inner(message), limit_bytes=self.limit_bytes)
        return framed(body, token=message.headers.get(OBO_TOKEN))

    async def open(self, topic: str, wire: bytes) -> PaigeantMessage:
        headers, body = split(wire, self.limit_bytes)
        return outer(decode(body, limit_bytes=self.limit_bytes), headers)

    def may_send(self, message: PaigeantMessage, topic: str) -> bool:
        return True

    async def may_start(self, message: PaigeantMessage) -> bool:
        return True


def inner(message: PaigeantMessage) -> PaigeantMessage:
    """`message` as its body has it: without what stands in front of that."""
    return message.evolve(
        headers={name: value for name, value in message.headers.items() if name not in _HEADERS}
    )


def outer(message: PaigeantMessage, headers: Mapping[str, str]) -> PaigeantMessage:
    """The message of a body, with what stood in front of it. Raises MessageInvalid where the body has such headers."""
    if not _HEADERS.isdisjoint(message.headers):
        raise MessageInvalid(
            "wrong_shape",
            f"the body has the header '{min(_HEADERS & message.headers.keys())}'; it stands in front",
        )
    if not headers and message.seal is None:
        return message
    return message.evolve(headers={**message.headers, **headers}, seal=None)


def framed(body: bytes, *, signature: str | None = None, token: str | None = None) -> bytes:
    """`body` behind the line with its signature and the token. Raises MessageInvalid for a line that is too long."""
    head = {name: value for name, value in ((SIGNATURE, signature), (OBO_TOKEN, token)) if value is not None}
    if not head:
        return body
    line = json.dumps(head, separators=(",", ":")).encode()
    if len(line) >= HEAD_BYTES:
        raise MessageInvalid("bad_frame", f"the signature and the token have {len(line):,} bytes")
    return line + b"\n" + body


def split(wire: bytes, limit_bytes: int) -> tuple[dict[str, str], bytes]:
    """What stands in front of a body, and the body, of which nothing is looked at.

    Raises MessageInvalid: too_large before anything is read, bad_frame for a line that is none of ours.
    """
    if len(wire) > limit_bytes + HEAD_BYTES:
        raise MessageTooLarge(len(wire), limit_bytes)
    if not wire.startswith(_BEGINNINGS):
        return {}, wire
    end = wire.find(b"\n", 0, HEAD_BYTES)
    if end < 0:
        raise MessageInvalid("bad_frame", f"its first line has no end within {HEAD_BYTES:,} bytes")
    try:
        head = parse_strict(wire[:end], max_depth=1)
    except MessageInvalid as exc:
        raise MessageInvalid("bad_frame", f"its first line is no JSON object: {exc}") from None
    if not isinstance(head, dict) or not head.keys() <= _HEADERS or not all(map(_is_word, head.values())):
        raise MessageInvalid(
            "bad_frame", f"its first line has other headers than {', '.join(sorted(_HEADERS))}"
        )
    return head, wire[end + 1 :]


def without_token(wire: bytes) -> bytes:
    """Bytes that came out of a topic, as they may be kept: a token is for nobody who reads them later."""
    is_frame = wire.startswith(_BEGINNINGS)
    if is_frame:
        try:
            head, body = split(wire, len(wire))
        except MessageInvalid:  # no telling where in it the token stands, or what it is called
            pass
        else:
            return framed(body, signature=head.get(SIGNATURE)) if OBO_TOKEN in head else wire
    # What stands in front of a body of ours is such a line, however it is damaged: cut off, or in two by a line break
    # within the token, of which the rest is as good as the whole.
    begin = wire.find(_BODY if is_frame else b"\n" + _BODY, 0, HEAD_BYTES)
    if begin >= 0:
        return masked_body(wire[begin:].removeprefix(b"\n"))
    end = wire.rfind(b"\n", 0, HEAD_BYTES)
    if is_frame or (end >= 0 and any(name.encode() in wire[:end] for name in _HEADERS)):
        return b"" if end < 0 else masked_body(wire[end + 1 :])
    return masked_body(wire)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable()
