"""`paigeant keys`: the key ring of an installation, a file that only its owner can read."""

from __future__ import annotations

import json as jsonlib
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import ConfigurationError, MessageInvalid

if TYPE_CHECKING:
    from paigeant.security import KeyRing

__all__ = ["app"]

app = typer.Typer(help="Make, rotate and list Ed25519 keys.", no_args_is_help=True)

KeyFile = Annotated[Path, typer.Option("--file", help="The key ring.", metavar="FILE")]

DEFAULT = Path("paigeant-keys.json")


@app.command(
    epilog=session.examples("paigeant keys generate", "paigeant keys generate --file /etc/paigeant/keys.json")
)
def generate(file: KeyFile = DEFAULT, json: AsJson = False) -> None:
    """Make a key ring with one key. One that is there already is never overwritten."""
    from paigeant.clock import SystemClock
    from paigeant.security import Key, KeyRing

    if file.exists() or file.is_symlink():
        raise ConfigurationError(f"{file} is there already; `paigeant keys rotate` adds a new key to it")
    ring = KeyRing((Key.generate(now=SystemClock().now()),))
    _write(file, ring, new=True)
    _tell(file, ring, json)


@app.command(epilog=session.examples("paigeant keys rotate"))
def rotate(file: KeyFile = DEFAULT, json: AsJson = False) -> None:
    """Add a new key and make it the active one. The old ones stay, to verify what they have signed."""
    from paigeant.clock import SystemClock
    from paigeant.security import Key

    ring = _read(file).rotate(Key.generate(now=SystemClock().now()))
    _write(file, ring)
    _tell(file, ring, json)


@app.command("list", epilog=session.examples("paigeant keys list", "paigeant keys list --json"))
def list_(file: KeyFile = DEFAULT, json: AsJson = False) -> None:
    """List the keys, the newest first: their public parts, and which is active."""
    ring = _read(file)
    if json:
        console.value(_shown(ring))
        return
    rows = [
        [
            console.plain(entry["kid"]),
            console.plain("active" if entry["active"] else "verifies", "green" if entry["active"] else ""),
            console.local(key.created_at),
        ]
        for entry, key in zip(_shown(ring), ring.keys[::-1], strict=True)
    ]
    console.out().print(console.table(["kid", "state", "created"], rows))


def _shown(ring: KeyRing) -> list[dict[str, Any]]:
    return [
        {
            "kid": key.kid,
            "active": key is ring.active,
            "created_at": console.instant(key.created_at),
            "public": key.public,
        }
        for key in reversed(ring.keys)
    ]


def _tell(file: Path, ring: KeyRing, as_json: bool) -> None:
    if as_json:
        console.value(_shown(ring)[0])
        return
    console.result(ring.active.kid)
    console.note(
        f"is the active key of {file}; it is private: keep the file out of version control", markup=False
    )


def _read(file: Path) -> KeyRing:
    from paigeant.codec import parse_strict
    from paigeant.security import KeyRing

    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        body = file.read_bytes()
    except FileNotFoundError as exc:
        raise ConfigurationError(f"there is no key ring {file}; `paigeant keys generate` makes one") from exc
    except OSError as exc:
        raise ConfigurationError(f"can't read {file}: {exc.strerror}") from exc
    if os.name == "posix" and mode & 0o077:
        raise ConfigurationError(
            f"others can read {file} (mode {mode:04o}), expected 0600; do: chmod 600 {file}"
        )
    try:
        return KeyRing.from_dict(parse_strict(body))
    except MessageInvalid as exc:
        raise ConfigurationError(f"{file} is no key ring: {exc}") from exc
    except ConfigurationError as exc:
        raise ConfigurationError(f"{file}: {exc}") from exc


def _write(file: Path, ring: KeyRing, *, new: bool = False) -> None:
    """Put the ring into the file whole or not at all, and readable by its owner alone from the first byte."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(jsonlib.dumps(ring.as_dict(), indent=2) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            if new:
                os.link(part, file)  # fails when somebody else has just made one
            else:
                os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError as exc:
        raise ConfigurationError(
            f"{file} is there already; `paigeant keys rotate` adds a new key to it"
        ) from exc
    except OSError as exc:
        raise ConfigurationError(f"can't write {file}: {exc.strerror}") from exc
