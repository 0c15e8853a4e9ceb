"""SecretToken: a token that nothing shows by accident; and texts without the tokens that are in them."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

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

_PART = "[A-Za-z0-9_-]"

TOKEN = re.compile(
    # Looked for once in each row of such characters, and only if dots follow: a text of `eyJeyJ...`, which anybody may
    # send, would else be gone through from each of them to its end.
    rf"(?<!{_PART})(?={_PART}++(?:(?:\.{_PART}*+){{4}}|\.{_PART}{{5,}}+\.))"
    rf"({_PART}*?)(?:eyJ|eyA|ew[0ko]){_PART}{{5,}}+(?:(?:\.{_PART}*+){{4}}|\.{_PART}{{5,}}+\.{_PART}*+)"
)
"""What a token looks like (RFC 7519, 7515, 7516): base64url parts with dots between, the first one a JSON object.

Encrypted ones have five parts. A detached signature, whose second part is empty, is no token: it says who signed. The
group is what stands in front without a gap, and isn't part of it.
"""

_TOKEN_BYTES = re.compile(TOKEN.pattern.encode())
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
    if any(secret.reveal().encode() in text for secret in secrets):
        raise OutputInvalid(f"{what} holds a token, which may not be recorded; leave it out")


def holds_token(text: str) -> bool:
    """Whether there is something in `text` that looks like a token."""
    return TOKEN.search(text) is not None


def masked(text: str, secrets: Iterable[SecretToken] = ()) -> str:
    """`text` with stars for these tokens, and for whatever else looks like a signed one."""
    for secret in secrets:
        text = text.replace(secret.reveal(), MASK)
    return TOKEN.sub(rf"\1{MASK}", text)


def masked_body(body: bytes) -> bytes:
    """The bytes of a message, such as a dead letter keeps, without the token that they carry."""
    return _TOKEN_BYTES.sub(rb"\1" + MASK.encode(), _HEADER.sub(rb"\1" + MASK.encode(), body))
