"""`paigeant keys`: the key ring of an installation, a file that only its owner can read, and whom it trusts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.text import Text

    from paigeant.keys import Key, KeyRing

__all__ = ["app"]

app = typer.Typer(
    help="Make, rotate, revoke and list keys, and say what others' are for.", no_args_is_help=True
)

KeyFile = Annotated[Path, typer.Option("--file", help="The key ring.", metavar="FILE")]
TrustFile = Annotated[Path, typer.Option("--file", help="The trust file.", metavar="FILE")]
Algorithm = Annotated[str, typer.Option("--algorithm", help="Ed25519, ES256 or RS256.", metavar="NAME")]

DEFAULT = Path("paigeant-keys.json")
TRUST = Path("paigeant-trust.json")


@app.command(
    epilog=session.examples("paigeant keys generate", "paigeant keys generate --file /etc/paigeant/keys.json")
)
def generate(file: KeyFile = DEFAULT, algorithm: Algorithm = "Ed25519", json: AsJson = False) -> None:
    """Make a key ring with one key. One that is there already is never overwritten."""
    from paigeant.keyfiles import write_private
    from paigeant.keys import KeyRing

    there = f"{file} is there already; `paigeant keys rotate` adds a new key to it"
    if os.path.lexists(file):  # asks no more than that: what else is wrong with the name the writing says
        raise ConfigurationError(there)
    ring = KeyRing((_new(algorithm),))
    try:
        write_private(file, ring.as_dict(), new=True)
    except FileExistsError as exc:
        raise ConfigurationError(there) from exc
    _tell(file, ring, json)


@app.command(epilog=session.examples("paigeant keys rotate"))
def rotate(file: KeyFile = DEFAULT, algorithm: Algorithm = "Ed25519", json: AsJson = False) -> None:
    """Add a new key and make it the active one. The old ones stay, to verify what they have signed."""
    from paigeant.keyfiles import changing, read_ring, write_private

    key = _new(algorithm)
    with changing(file):
        ring = read_ring(file).rotate(key)
        write_private(file, ring.as_dict())
    _tell(file, ring, json)


@app.command(
    epilog=session.examples("paigeant keys revoke KID", "paigeant keys revoke KID --trust trust.json")
)
def revoke(
    kid: Annotated[str, typer.Argument(help="The id of the key.", metavar="KID")],
    file: KeyFile = DEFAULT,
    trust: Annotated[
        Path | None, typer.Option("--trust", help="Revoke it in this trust file instead.", metavar="FILE")
    ] = None,
    json: AsJson = False,
) -> None:
    """Have nothing count any more that was signed with a key. Workers that read the file know within a second."""
    from paigeant.keyfiles import changing, read_ring, write_private

    with changing(trust or file):
        if trust is not None:
            _revoke_trusted(trust, kid)
        else:
            write_private(file, read_ring(file).revoke(kid, now=_now()).as_dict())
    if json:
        console.value({"kid": kid, "revoked": True})
        return
    console.result(kid)
    console.note(f"is revoked in {file if trust is None else trust}", markup=False)


@app.command("list", epilog=session.examples("paigeant keys list", "paigeant keys list --json"))
def list_(file: KeyFile = DEFAULT, json: AsJson = False) -> None:
    """List the keys, the newest first: their public parts, and which is active."""
    from paigeant.keyfiles import read_ring

    ring = read_ring(file)
    if json:
        console.value(_shown(ring))
        return
    rows: list[list[Text | str]] = [
        [
            console.plain(key.kid),
            console.plain(key.algorithm),
            console.plain(
                _state(ring, key), {"active": "green", "revoked": "red"}.get(_state(ring, key), "")
            ),
            console.local(key.created_at),
        ]
        for key in ring.keys[::-1]
    ]
    console.out().print(console.table(["kid", "algorithm", "state", "created"], rows))


@app.command(
    "export-jwks",
    epilog=session.examples("paigeant keys export-jwks > jwks.json", "paigeant keys export-jwks"),
)
def export_jwks(file: KeyFile = DEFAULT) -> None:
    """Print the public keys as a JWK set (RFC 7517), for others to trust. Revoked ones are left out."""
    from paigeant.keyfiles import read_ring

    console.value({"keys": [key.public for key in read_ring(file).keys if key.revoked_at is None]})


@app.command(
    epilog=session.examples(
        "paigeant keys trust jwks.json --dispatch '*' --name front",
        "paigeant keys trust worker.json --run 'pay.*' --run refund",
        "paigeant keys trust operator.json --amend",
    )
)
def trust(
    jwks: Annotated[Path, typer.Argument(help="Public keys, see `export-jwks`.", metavar="JWKS.json")],
    dispatch: Annotated[
        list[str] | None,
        typer.Option(
            help="Workflows whose runs they may start; patterns, again for more.", metavar="PATTERN"
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="Topics whose steps they may do; patterns, again for more.", metavar="PATTERN"),
    ] = None,
    amend: Annotated[bool, typer.Option("--amend", help="They may send what an operator may.")] = False,
    name: Annotated[str | None, typer.Option(help="Whose they are, for people who read the file.")] = None,
    file: TrustFile = TRUST,
    json: AsJson = False,
) -> None:
    """Write into the trust file what somebody's keys are for. A key that stands there already gets these roles.

    Its name stays without --name, and so do the time for which it holds and that it is revoked.
    """
    from paigeant.keyfiles import changing, write_trust

    if not (dispatch or run or amend):
        raise ConfigurationError(
            "the keys would be for nothing; say --dispatch WORKFLOW, --run TOPIC or --amend"
        )
    roles = {
        **({} if name is None else {"name": name}),
        "dispatch": list(dispatch or ()),
        "run": list(run or ()),
        "amend": amend,
    }
    with changing(file):
        value: dict[str, Any] = _value_of(file) if os.path.exists(file) else {"version": 1, "keys": []}
        revoked = {kid: _entrust(value, kid, jwk, roles) for kid, jwk in _published(jwks).items()}
        write_trust(file, value)
    if json:
        console.value({"kids": list(revoked)})
        return
    for kid in revoked:
        console.result(kid)
    for kid in [kid for kid, is_revoked in revoked.items() if is_revoked]:
        console.warn(f"{kid} is revoked in {file}, and stays so; `paigeant keys rotate` makes a new key")
    console.note(f"is trusted by {file}; set `trust_file: {file}`", markup=False)


def _entrust(value: dict[str, Any], kid: str, jwk: dict[str, Any], roles: dict[str, Any]) -> bool:
    """Give a key in a trust file these roles and no others; gives whether it is revoked there."""
    from paigeant.keys import thumbprint

    before: dict[str, Any] = {}
    others = []
    for entry in value["keys"]:
        if thumbprint(entry["jwk"]) == kid:
            before = entry
        else:
            others.append(entry)
    value["keys"] = [*others, {**before, "jwk": jwk, **roles}]
    return before.get("revoked_at") is not None


def _new(algorithm: str) -> Key:
    from paigeant.errors import nearest
    from paigeant.keys import ALGORITHMS, Key

    for known in ALGORITHMS:
        if algorithm.lower() == known.lower():
            return Key.generate(now=_now(), algorithm=known)
    raise ConfigurationError(f"there is no algorithm '{algorithm}' here; {nearest(algorithm, ALGORITHMS)}")


def _now() -> float:
    from paigeant.clock import SystemClock

    return SystemClock().now()


def _state(ring: KeyRing, key: Key) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "active" if key is ring.active else "verifies"


def _shown(ring: KeyRing) -> list[dict[str, Any]]:
    return [
        {
            "kid": key.kid,
            "algorithm": key.algorithm,
            "active": _state(ring, key) == "active",
            "created_at": console.instant(key.created_at),
            "revoked_at": None if key.revoked_at is None else console.instant(key.revoked_at),
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


def _revoke_trusted(file: Path, kid: str) -> None:
    from paigeant.keyfiles import read_trust, write_trust
    from paigeant.keys import thumbprint

    trusted = read_trust(file).keys
    if kid not in trusted:
        raise ConfigurationError(f"{file} has no key '{kid}'; it has: {', '.join(trusted) or 'none'}")
    value = _value_of(file)
    for entry in value["keys"]:
        if thumbprint(entry["jwk"]) == kid and entry.get("revoked_at") is None:
            entry["revoked_at"] = _now()
    write_trust(file, value)


def _value_of(file: Path) -> dict[str, Any]:
    """A trust file as it stands, once it has been found to be one."""
    from paigeant.codec import parse_strict
    from paigeant.keyfiles import read_trust

    read_trust(file)
    value: dict[str, Any] = parse_strict(file.read_bytes())
    value.setdefault("keys", [])
    return value


def _published(file: Path) -> dict[str, dict[str, Any]]:
    """The keys in a file with a key set, by the ids that they have here."""
    from paigeant.errors import MessageInvalid
    from paigeant.jwks import read_jwks
    from paigeant.keys import thumbprint

    try:
        found = read_jwks(file.read_bytes())
    except OSError as exc:
        raise ConfigurationError(f"can't read {file}: {exc.strerror}") from exc
    except MessageInvalid as exc:
        raise ConfigurationError(
            f"{file} is no key set: {exc}; `paigeant keys export-jwks` prints one"
        ) from exc
    if not found:
        raise ConfigurationError(
            f"{file} has no public key with an id; `paigeant keys export-jwks` prints a set"
        )
    return {thumbprint(jwk): dict(jwk) for jwk in found.values()}
