"""For whom a run acts, as a command reads it: from where neither a list of processes nor a shell's history shows it."""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paigeant.errors import ConfigurationError, InputInvalid

if TYPE_CHECKING:
    from paigeant.identity import GrantHandle
    from paigeant.secret import SecretToken

__all__ = ["read_given", "refuse_token"]

_ENV = "env:"
_FIELDS = ("handle", "subject", "issuer", "scopes")


def refuse_token(given: str, instead: str) -> None:
    """Raise ConfigurationError for an argument that is a token itself; `instead` says how to give it."""
    from paigeant.secret import holds_token

    if holds_token(given):
        raise ConfigurationError(
            "that looks like a token, which the history of the shell and the list of processes now show; have it "
            f"withdrawn, and give another one {instead}"
        )


def read_given(source: str) -> SecretToken | GrantHandle:
    """The token, or the grant handle in JSON, that stands in a file, in a variable (`env:NAME`) or comes on `-`.

    No error has anything of what was read in it. Raises ConfigurationError, InputInvalid.
    """
    from paigeant.identity import MOST_TOKEN_BYTES
    from paigeant.secret import SecretToken

    refuse_token(source, "in a file, in a variable as env:NAME, or on standard input as -")
    where, body = _read(source, MOST_TOKEN_BYTES)
    if len(body) > MOST_TOKEN_BYTES:
        raise InputInvalid(f"{where} is too large for a token: the limit is {MOST_TOKEN_BYTES:,} bytes")
    try:
        text = body.decode().strip()
    except UnicodeDecodeError:
        text = None
    if text is None:  # outside of the handler, whose exception holds the bytes
        raise InputInvalid(f"{where} is neither a token nor a grant: it is no text")
    if not text:
        raise InputInvalid(f"{where} is empty; expected a token, or a grant as a JSON object")
    return _grant(where, text) if text.startswith("{") else SecretToken(text)


def _grant(where: str, text: str) -> GrantHandle:
    from paigeant.codec import parse_strict
    from paigeant.errors import MessageInvalid
    from paigeant.identity import GrantHandle

    shape = '{"handle": "...", "subject": "...", "issuer": "...", "scopes": ["..."]}'
    try:
        value = parse_strict(text.encode())
    except MessageInvalid as exc:
        reason = str(exc).removeprefix(f"{exc.reason}: ")
        raise InputInvalid(f"{where} is not JSON: {reason}; a grant is {shape}") from exc
    if not isinstance(value, dict) or set(value) - {"scopes"} != set(_FIELDS) - {"scopes"}:
        found = ", ".join(sorted(value)) if isinstance(value, dict) else "no object"
        raise InputInvalid(f"{where} is no grant, which is {shape}; found {found or 'nothing in it'}")
    return GrantHandle(value["handle"], value["subject"], value["issuer"], value.get("scopes", ()))


def _read(source: str, limit_bytes: int) -> tuple[str, bytes]:
    if source == "-":
        if sys.stdin.isatty():
            return "standard input", _asked()
        return "standard input", sys.stdin.buffer.read(limit_bytes + 1)
    if source.startswith(_ENV):
        name = source.removeprefix(_ENV)
        found = os.environ.get(name)
        if found is None:
            raise ConfigurationError(
                f"there is no variable '{name}' in the environment, from which the token is read"
            )
        return f"the variable {name}", found.encode("utf-8", "surrogateescape")
    return source, _read_file(Path(source), limit_bytes)


def _asked() -> bytes:
    with contextlib.suppress(UnicodeError):
        return getpass.getpass("token (it isn't shown): ").encode()
    # Outside of the handler: that error holds what was typed.
    raise InputInvalid("standard input is neither a token nor a grant: it is no text")


def _read_file(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # What a shell opens, as in <(get-token), is a pipe; its mode says nothing.
            if os.name == "posix" and stat.S_ISREG(mode) and mode & 0o077:
                raise ConfigurationError(
                    f"others can read {path} (mode {stat.S_IMODE(mode):04o}), expected 0600; do: chmod 600 {path}"
                )
            return file.read(limit_bytes + 1)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise InputInvalid(
            f"can't read {path}: {reason}; a token is read from a file, from a variable as env:NAME, or from "
            "standard input as -"
        ) from exc
