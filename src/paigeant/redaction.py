"""What is secret in texts and values that are written for people to read, and stars in its place.

Payloads, outputs and variables are data and are recorded as they are. This is for what tells *about* them: log lines,
the texts of errors, the details of dead letters, spans that are sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from pydantic import SecretBytes, SecretStr

from paigeant.secret import MASK, masked
from paigeant.urls import scrubbed, secrets_of

__all__ = ["Redactor", "is_secret", "quoted", "redacted", "secrets_in", "without"]

_NAMES = (
    "password|passwd|passphrase|pwd|secret|token|authorization|api[_-]?key|apikey|private[_-]?key|access[_-]?key|"
    "secret[_-]?key|credentials?|cookie|assertion"
)
_KEY = re.compile(rf"(?:^|[_\-.\s]|(?-i:(?<=[a-z0-9])(?=[A-Z])))(?:{_NAMES})$", re.I)
"""The names of fields whose values are secret.

`token`, `obo_token`, `accessToken`, `x-api-key`, but not `tokens` or `token_count`.
"""

_SUSPECTS = (
    *("eyj", "eya", "ew", "://", "sk-", "bearer", "basic", "passw", "passphrase", "pwd", "secret", "token"),
    *("authorization", "key", "credential", "cookie", "assertion"),
    *(
        "sk_",
        "rk_",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "xox",
        "hf_",
        "akia",
        "aiza",
    ),
)
"""One of these is in each text that has something to hide. Most have none, and are looked at no further."""

_NAMED = r"[\w-]{1,40}=(?:\"[^\"\n]*\"|[^\s,;\"']+)"

_HIDDEN: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL),
        MASK,
    ),
    (re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{6,}", re.I), rf"\1\2{MASK}"),
    (
        # What vendors put in front of their keys, for scanners to find: OpenAI and Anthropic, Stripe, GitHub, GitLab,
        # Slack, Hugging Face, AWS, Google.
        re.compile(
            r"\b(?:sk-[\w-]{16,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
            r"glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}\b|AIza[\w-]{30,})"
        ),
        MASK,
    ),
    (
        # `Authorization: Token ...`: what is behind the scheme is the secret, and all of what it is made of.
        re.compile(
            r"(authorization\s*[:=]\s*+)(?!\*\*\*|bearer |basic )[A-Za-z][\w-]{0,40}[ \t]+"
            rf"(?:{_NAMED}(?:,[ \t]*{_NAMED})*|[^\s,;\"']+)",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (
        re.compile(
            r"(cookie\s*[:=]\s*+)(?!\*\*\*)[^\s,;\"']+(?:;[ \t]*[^\s,;=\"']{1,200}=[^\s,;\"']*)*",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (
        re.compile(
            # `password=...`, `"obo_token": "..."`, `api_key='...'`. What is a mask already, or says a scheme whose
            # credentials are masked above, stays. Blanks are never given back: of many each would be tried as the last.
            # JSON within JSON has more backslashes with each text that it is in, a URL within a URL has percent signs.
            rf"((?:{_NAMES})\\*+(?:[\"']|%22)?\s*+(?:=>|[:=]|%3[ad])\s*+(?:%22)?)"
            r"(?!(?:\\?[\"'])?(?:\*\*\*|bearer |basic ))"
            # `b'...'` and `SecretStr('...')` as Python writes them, or a text, whose end may have been cut off; a list
            # or an object; a word.
            r"((?:[a-z_]{1,20}\(|[bru]{1,2}(?=[\"']))?"
            r"(?:\\*+\"(?:[^\"\\]|\\.)*\\?\"|'(?:[^'\\]|\\.)*'|\\*+\"[^\"\n]*|'[^'\n]*)"
            r"|\[[^\]\n]*\]?|\{(?:[^{}\n]++|\{[^{}\n]*+\}?+)*+\}?|[^\s\"',;&)}\]]+)",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (
        # Options of a command, as a shell has them or as the list that an error of `subprocess` quotes.
        re.compile(
            rf"((?<![\w-])--(?:[\w-]{{0,40}}[_-])?(?:{_NAMES})(?:[ \t]++|[\"'],\s?b?))(?!\*\*\*|[\"']?-)"
            r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;)\]]+)",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (
        # Headers are often pairs: `[(b'set-cookie', b'...')]`. A text with blanks tells rather what is wrong with one:
        # `ValueError('password', 'must have 8 characters')`.
        re.compile(
            rf"(\(b?[\"'](?:[^\"'\n]{{0,100}}[_\-.])?(?:{_NAMES})[\"'],\s?)"
            r"(?:b(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|\"[^\"\s]*\"|'[^'\s]*')(?=\))",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (
        re.compile(
            r"(\([\"'](?:[\w-]{0,40}-)?(?:authorization|cookie)[\"'],\s?)(?:\"[^\"\n]*\"|'[^'\n]*')", re.I
        ),
        rf"\1{MASK}",
    ),
    (
        # What pydantic quotes in its errors and warnings: under the path of a field in a line of its own, or behind it.
        re.compile(
            # It quotes 50 characters; the bounds keep any other text from taking long.
            rf"(^[ |]{{0,200}}+(?:\S{{0,200}}[_\-.])?(?:{_NAMES})(?:\.\S{{0,200}})?\n(?>.{{0,2000}}?\binput_value=)|"
            rf"\bfield_name='(?:[^'\n]{{0,200}}[_\-])?(?:{_NAMES})', input_value=)"
            r"(?!\*\*\*).{0,200}(?=, input_type=)",
            re.I | re.M,
        ),
        rf"\1{MASK}",
    ),
)
_DEEPEST = 6
_SHORT = 4
"""A secret of fewer characters may be part of any word."""


class Redactor:
    """Hides what is secret. `urls` are those of the settings: their passwords are hidden wherever they occur."""

    def __init__(self, urls: Iterable[str] = ()) -> None:
        self._known = sorted({secret for url in urls for secret in secrets_of(url)}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` with stars for the tokens, passwords and keys in it."""
        for secret in self._known:
            if secret in text:
                text = text.replace(secret, MASK)
        if not _is_suspect(text):
            return text
        text = masked(text)
        for pattern, shown in _HIDDEN:
            text = pattern.sub(shown, text)
        return scrubbed(text)

    def may_hide(self, text: str) -> bool:
        """Whether there may be something to hide in it; takes less time than to look."""
        return any(secret in text for secret in self._known) or _is_suspect(text)

    def value(self, name: str, value: Any, depth: int = 0) -> Any:
        """The value of a field as it may be shown: stars if the field's `name` or the value's type says it is secret.

        What is no JSON becomes the text that it is shown by.
        """
        if isinstance(value, float) and not math.isfinite(value):
            value = repr(value)
        if value is None or isinstance(value, (bool, int, float)):
            return MASK if value and is_secret(name) and not isinstance(value, bool) else value
        if isinstance(value, (SecretStr, SecretBytes)) or is_secret(name):
            return MASK
        if isinstance(value, str):
            return self.text(value)
        if depth < _DEEPEST:
            if (named := _named(value)) is not None:
                return {
                    self.text(str(key)): self.value(_name(key), inner, depth + 1)
                    for key, inner in named.items()
                }
            if _is_pair(value):
                return [self.value("", value[0], depth + 1), self.value(_name(value[0]), value[1], depth + 1)]
            if isinstance(value, (list, tuple)):
                named_before = ("", *map(_option, value))
                return [
                    self.value(name, inner, depth + 1)
                    for name, inner in zip(named_before, value, strict=False)
                ]
            if isinstance(value, (set, frozenset)):
                return [self.value("", inner, depth + 1) for inner in value]
        elif secrets_in(value):
            return MASK
        return self.text(_shown(value))


_PLAIN = Redactor()


def redacted(text: str) -> str:
    """`text` with stars for what looks secret in it, such as the text of an error before it is recorded."""
    return _PLAIN.text(text)


def is_secret(name: str) -> bool:
    """Whether a field of this name has a secret value."""
    return _KEY.search(name) is not None


def _named(value: Any) -> Mapping[Any, Any] | None:
    """What has names for its parts, by these: a mapping or a named tuple."""
    if isinstance(value, Mapping):
        return value
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    return dict(zip(names, value, strict=False)) if isinstance(names, tuple) else None


def _is_pair(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is perhaps a name and its value, as headers are."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (str, bytes))


def _option(part: Any) -> str:
    """The name that a part of a command gives to the next one, as `--token` does; empty where it gives none."""
    return part if isinstance(part, str) and part.startswith("--") else ""


def _name(key: Any) -> str:
    """The key of a value as a name. Those of HTTP headers are often bytes."""
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


def secrets_in(value: Any, name: str = "") -> list[str]:
    """The texts in a JSON value that are secret by the name of a field which they are in, or by that of the value."""
    found: list[str] = []
    seen: set[tuple[int, bool]] = set()  # what contains itself is looked into once
    rest: list[tuple[Any, bool]] = [(value, is_secret(name))]
    while rest:
        one, hides = rest.pop()
        if isinstance(one, (Mapping, list, tuple, set, frozenset)):
            if (id(one), hides) in seen:
                continue
            seen.add((id(one), hides))
            if (named := _named(one)) is not None:
                rest += [(inner, hides or is_secret(_name(key))) for key, inner in named.items()]
                rest += [(key, True) for key in named if hides]
            elif _is_pair(one):
                rest += [(one[0], hides), (one[1], hides or is_secret(_name(one[0])))]
            else:
                rest += [(inner, hides) for inner in one]
        elif hides and one is not None and not isinstance(one, bool) and (text := _shown(one)):
            found += {text, repr(text)[1:-1]}
    return found


def without(text: str, secrets: Iterable[str]) -> str:
    """`text` with stars for these secrets; for one of a few characters, only where it is a word."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if secret in text:
            if len(secret) >= _SHORT:
                text = text.replace(secret, MASK)
            else:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
    return text


def quoted(value: Any, *names: str) -> str:
    """`value` as an error quotes it: without what one of its `names`, or a name in it, says is secret, and cut.

    Hidden before it is cut: half a secret is no longer known as one.
    """
    if value is not None and any(map(is_secret, names)):
        return MASK
    try:
        has_names = isinstance(value, (dict, list)) and secrets_in(value)
        text = redacted(repr(_PLAIN.value("", value) if has_names else value))
    except Exception:  # the user's code, or a number with more digits than Python writes
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_suspect(text: str) -> bool:
    small = text.lower()
    return any(suspect in small for suspect in _SUSPECTS)


def _shown(value: Any) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception:  # a user's class, which must not keep the line from being written
        return f"<{type(value).__name__} that can't be shown>"
