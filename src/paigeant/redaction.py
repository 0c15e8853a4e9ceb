"""What is secret in texts and values that are written for people to read, and stars in its place.

Payloads, outputs and variables are data and are recorded as they are. This is for what tells *about* them: log lines,
the texts of errors, the details of dead letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import SecretBytes, SecretStr

from paigeant.secret import MASK, TOKEN
from paigeant.urls import scrubbed, secrets_of

__all__ = ["Redactor", "redacted"]

_NAMES = (
    "password|passwd|passphrase|pwd|secret|token|authorization|api[_-]?key|apikey|private[_-]?key|access[_-]?key|"
    "credentials?|cookie|assertion"
)
_KEY = re.compile(rf"(?:^|[_\-.\s])(?:{_NAMES})$", re.I)
"""The names of fields whose values are secret: `token`, `obo_token`, `x-api-key`, but not `tokens` or `token_count`."""

_SUSPECTS = (
    *("eyj", "eya", "ew", "://", "sk-", "bearer", "basic", "passw", "passphrase", "pwd", "secret", "token"),
    *("authorization", "key", "credential", "cookie", "assertion"),
)
"""One of these is in each text that has something to hide. Most have none, and are looked at no further."""

_HIDDEN: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL),
        MASK,
    ),
    (TOKEN, MASK),
    (re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{6,}", re.I), rf"\1\2{MASK}"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), MASK),
    (
        re.compile(
            # `password=...`, `"obo_token": "..."`, `api_key='...'`. What is a mask already, or says a scheme whose
            # credentials are masked above, stays.
            rf"((?:{_NAMES})\\?[\"']?\s*(?:=>|[:=])\s*)"
            r"(?!\s*(?:\\?[\"'])?(?:\*\*\*|bearer |basic ))"
            r"(\\?\"(?:[^\"\\]|\\.)*\\?\"|'(?:[^'\\]|\\.)*'|[^\s\"',;&)}\]]+)",
            re.I,
        ),
        rf"\1{MASK}",
    ),
)
_DEEPEST = 6


class Redactor:
    """Hides what is secret. `urls` are those of the settings: their passwords are hidden wherever they occur."""

    def __init__(self, urls: Iterable[str] = ()) -> None:
        self._known = sorted({secret for url in urls for secret in secrets_of(url)}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` with stars for the tokens, passwords and keys in it."""
        for secret in self._known:
            if secret in text:
                text = text.replace(secret, MASK)
        small = text.lower()
        if not any(suspect in small for suspect in _SUSPECTS):
            return text
        for pattern, masked in _HIDDEN:
            text = pattern.sub(masked, text)
        return scrubbed(text)

    def value(self, name: str, value: Any, depth: int = 0) -> Any:
        """The value of a field as it may be shown: stars if the field's `name` or the value's type says it is secret.

        What is no JSON becomes the text that it is shown by.
        """
        if isinstance(value, float) and not math.isfinite(value):
            value = repr(value)
        if value is None or isinstance(value, (bool, int, float)):
            return MASK if value and _is_secret(name) and not isinstance(value, bool) else value
        if isinstance(value, (SecretStr, SecretBytes)) or _is_secret(name):
            return MASK
        if isinstance(value, str):
            return self.text(value)
        if depth < _DEEPEST:
            if isinstance(value, Mapping):
                return {
                    self.text(str(key)): self.value(str(key), inner, depth + 1)
                    for key, inner in value.items()
                }
            if isinstance(value, (list, tuple, set, frozenset)):
                return [self.value("", inner, depth + 1) for inner in value]
        return self.text(_shown(value))


_PLAIN = Redactor()


def redacted(text: str) -> str:
    """`text` with stars for what looks secret in it, such as the text of an error before it is recorded."""
    return _PLAIN.text(text)


def _is_secret(name: str) -> bool:
    return bool(name) and _KEY.search(name) is not None


def _shown(value: Any) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception:  # a user's class, which must not keep the line from being written
        return f"<{type(value).__name__} that can't be shown>"
