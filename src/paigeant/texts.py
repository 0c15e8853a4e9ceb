"""Texts that others have written, as a person may be shown them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paigeant.codec import storable
from paigeant.redaction import redacted
from paigeant.secret import SecretToken, masked

__all__ = ["of_error", "printable"]

_ERROR_CHARACTERS = 4000
_MOST_WITHIN = 5
"""So many errors of a group are told, and so many groups within each other."""

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What would make a terminal or a reader of lines see something else than what was written."""


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or not show, written out; in a JSON text so that it means the same."""
    if text.isascii() and text.isprintable():  # as most are, and it's known sooner
        return text
    return _UNSEEN.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return found[0].encode("unicode_escape").decode() if code < 0x20 else f"\\u{code:04x}"


def of_error(error: BaseException, secrets: Sequence[SecretToken] = ()) -> str:
    """An error as it may be recorded: its type and text, not too long, without `secrets` or what looks like one."""
    text = masked(_said(error), secrets)
    # Hidden before it is cut: half a token is no longer known as one. A text of megabytes isn't searched through.
    text = redacted(text[: 4 * _ERROR_CHARACTERS])
    text = text if len(text) <= _ERROR_CHARACTERS else f"{text[:_ERROR_CHARACTERS]}..."
    return storable(text)


def _said(error: BaseException, depth: int = 0) -> str:
    try:
        said = str(error)
    except BaseException:  # the user's code again, as `traceback` knows it
        said = "(its text can't be had)"
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, BaseExceptionGroup) and depth < _MOST_WITHIN:
        # By itself a group only says how many there are, and not what went wrong.
        within = "; ".join(_said(each, depth + 1) for each in error.exceptions[:_MOST_WITHIN])
        text = f"{text}: {within}"
    return text
