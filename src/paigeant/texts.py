"""Texts that others have written, as a person may be shown them."""

from __future__ import annotations

import re

__all__ = ["printable"]

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
