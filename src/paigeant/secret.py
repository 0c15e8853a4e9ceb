"""SecretToken: a token that nothing shows by accident; and texts without the tokens that are in them."""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Self
from urllib.parse import quote

from paigeant.errors import OutputInvalid

__all__ = [
    "MASK",
    "OBO_TOKEN",
    "TOKEN",
    "SecretToken",
    "holds_token",
    "masked",
    "masked_body",
    "refuse_tokens",
]

OBO_TOKEN = "obo_token"  # the header's name
"""The header of a message that holds the token of the person for whom its run acts. It is never recorded."""

MASK = "***"
"""What is shown in the place of a secret."""

TOKEN = re.compile(
    # Each run of such characters is tried once, from the first beginning of a token in it, and nothing is given back:
    # anybody may send a text that is full of beginnings, and to try each would take a minute for 90 KB.
    r"(?<![A-Za-z0-9_-])((?>[A-Za-z0-9_-]*?(?=eyJ|eyA|ew[0ko])))[A-Za-z0-9_-]{8,}+"
    r"(?:(?:\.[A-Za-z0-9_-]*+){4}|\.[A-Za-z0-9_-]{5,}+\.[A-Za-z0-9_-]*+)"
)
"""What a token looks like (RFC 7519, 7515, 7516): base64url parts with dots between, the first one a JSON object.

Encrypted ones have five parts. A detached signature, whose second part is empty, is no token: it says who signed.
Its first group is what stands right before the token.
"""

_BEGIN = re.compile("eyJ|eyA|ew[0ko]")
"""Most texts have none of these, and to find that out takes a tenth of the time."""

_TOKEN_BYTES = re.compile(TOKEN.pattern.encode())
_BEGIN_BYTES = re.compile(_BEGIN.pattern.encode())
_HEADER = re.compile(rb'("' + OBO_TOKEN.encode() + rb'"\s*:\s*")(?:[^"\\]|\\.)*')


class SecretToken:
    """A token in memory. Only `reveal()` gives its text: at the moment when it is sent, and nowhere else.

    Printing, formatting and JSON show stars or fail, a copy is the same object, and pickling fails: so it gets into no
    log line, row or message by accident, nor into a traceback that shows the values of variables.
    """

    __slots__ = ("_reveal",)

    def __init__(self, text: str) -> None:
        # In a closure, so that no attribute has it: what dumps objects for debugging shows a function.
        self._reveal: Callable[[], str] = lambda: text

    def reveal(self) -> str:
        """The text itself."""
        return self._reveal()

    def __repr__(self) -> str:
        return f"SecretToken({MASK})"

    def __str__(self) -> str:
        return MASK

    def __format__(self, spec: str) -> str:
        return format(MASK, spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretToken):
            return NotImplemented
        return hmac.compare_digest(self.reveal().encode(), other.reveal().encode())

    def __hash__(self) -> int:
        return hash((SecretToken, self.reveal()))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError("a SecretToken can't be pickled: it would be kept outside of memory")


def refuse_tokens(what: str, text: bytes, secrets: Iterable[SecretToken]) -> None:
    """Raise OutputInvalid for a `text` that is to be recorded and has one of these tokens in it."""
    if any(form.encode(errors="replace") in text for secret in secrets for form in _forms(secret)):
        raise OutputInvalid(f"{what} holds a token, which may not be recorded; leave it out")


def holds_token(text: str) -> bool:
    """Whether there is something in `text` that looks like a token."""
    return TOKEN.search(text) is not None


def masked(text: str, secrets: Iterable[SecretToken] = ()) -> str:
    """`text` with stars for these tokens, and for whatever else looks like a signed one."""
    for secret in secrets:
        for form in _forms(secret):
            text = text.replace(form, MASK)
    return TOKEN.sub(_stars, text) if _BEGIN.search(text) else text


_SHORTEST_CODE = 8
"""Fewer characters of base64 may stand in any text."""


def _forms(secret: SecretToken) -> Iterator[str]:
    """How a token may stand in a text: as it is, as JSON or a URL writes it, and in base64, as bytes become JSON.

    What is refused is looked for in the same forms as what is masked: else a masked error could not be recorded.
    """
    text = secret.reveal()
    if not text:
        return
    yield text
    raw = text.encode(errors="replace")
    for written in (json.dumps(text, ensure_ascii=False)[1:-1], quote(raw, safe="")):
        if written != text:
            yield written
    for before in range(3):
        # Three bytes are four characters. Those that also tell of the bytes around it are left out.
        coded = base64.b64encode(bytes(before) + raw).decode()
        coded = coded[-(-before * 4 // 3) : (before + len(raw)) * 4 // 3]
        if len(coded) >= _SHORTEST_CODE:
            yield coded
            yield coded.replace("+", "-").replace("/", "_")


def _stars(found: re.Match[str]) -> str:
    before, token = found[1], found[0][len(found[1]) :]
    return f"{before}{MASK}" if not before or _is_header(token.encode()) else found[0]


def _is_header(token: bytes) -> bool:
    """Whether what begins in the middle of a word is a token all the same: `rest_framework.exceptions.Denied` isn't."""
    part = token.split(b".", 1)[0][:16]
    return base64.urlsafe_b64decode(part[: len(part) // 4 * 4]).isascii()


def masked_body(body: bytes) -> bytes:
    """The bytes of a message, such as a dead letter keeps, without the token that they carry."""
    body = _HEADER.sub(rb"\1" + MASK.encode(), body)
    return _TOKEN_BYTES.sub(rb"\1" + MASK.encode(), body) if _BEGIN_BYTES.search(body) else body
