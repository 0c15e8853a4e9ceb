"""What is recorded of an error, and whether it is one after which nothing is tried again."""

from __future__ import annotations

from collections.abc import Sequence

from paigeant.codec import storable
from paigeant.redaction import redacted
from paigeant.secret import SecretToken, masked

__all__ = ["failure_text", "is_among"]

_ERROR_CHARACTERS = 4000
_MOST_WITHIN = 5
"""So many errors of a group are told, and so many groups within each other."""


def failure_text(error: BaseException, secrets: Sequence[SecretToken] = ()) -> str:
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


def is_among(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Whether it is one of these kinds, or a group that holds one: what a task group raises is a group."""
    ahead = [error]
    while ahead:
        found = ahead.pop()
        if isinstance(found, kinds):
            return True
        if isinstance(found, BaseExceptionGroup):
            ahead.extend(found.exceptions)
    return False
