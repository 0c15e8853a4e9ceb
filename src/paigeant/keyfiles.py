"""Where keys are kept: the ring of an installation's own, a file of those it trusts, and key sets that others publish.

Files are read again when they have changed, so that a key that is added or revoked counts at once in every process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from paigeant.clock import SystemClock
from paigeant.codec import parse_strict
from paigeant.errors import ConfigurationError, MessageInvalid
from paigeant.jwks import Jwks
from paigeant.keys import ALL_ROLES, Key, KeyRing, Roles, TrustedKey, thumbprint

__all__ = ["FileKeys", "Trust", "changing", "read_ring", "read_trust", "write_private", "write_trust"]

log = logging.getLogger("paigeant.keys")

_LOOK_SECONDS = 1.0
"""How often a file is looked at for changes, while messages come; and at once for a key that isn't known."""

_LOCK_SECONDS = 5.0

_MOST_KEYS = 1000
_MOST_BYTES = 4 * 1024 * 1024

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose signatures count: keys by their ids, and a URL where more are published, with the roles of those."""

    keys: Mapping[str, TrustedKey] = field(default_factory=dict)
    jwks_url: str | None = None
    jwks_roles: Roles = field(default_factory=Roles)


class FileKeys:
    """The keys that settings name. `ring` gives the own key ring, `trust` whom to believe; without it the ring alone.

    The two are read through files that are watched, or are fixed. `clock` gives this host's time.
    """

    def __init__(
        self,
        ring: Callable[[], KeyRing],
        trust: Callable[[], Trust] | None = None,
        *,
        files: Sequence[_Watched[Any]] = (),
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._ring = ring
        self._trust = trust
        self._files = files
        self._clock = clock or SystemClock().now
        self._jwks: Jwks | None = None
        self._imported: dict[str, TrustedKey] = {}

    @classmethod
    def of(
        cls, ring: Path | KeyRing, trust: Path | None = None, *, clock: Callable[[], float] | None = None
    ) -> FileKeys:
        """Those in these files. Raises ConfigurationError for what is in neither."""
        watched = None if isinstance(ring, KeyRing) else _Watched(ring, read_ring)
        others = None if trust is None else _Watched(trust, read_trust)
        keys = cls(
            watched.get if watched is not None else lambda: cast(KeyRing, ring),
            None if others is None else others.get,
            files=[file for file in (watched, others) if file is not None],
            clock=clock,
        )
        keys.signer()
        return keys

    def signer(self) -> tuple[Key, Roles]:
        """The newest key of the ring that the trust file lets sign now: a new one begins once it stands there."""
        ring = self._ring()
        if self._trust is None:
            return ring.active, ALL_ROLES
        trust = self._trust()
        for key in reversed(ring.keys):
            if key.revoked_at is None and (roles := self._roles_of(key, trust)) is not None:
                return key, roles
        return ring.active, Roles()  # what it signed would only be refused: others are to send

    def _roles_of(self, key: Key, trust: Trust) -> Roles | None:
        known = trust.keys.get(key.kid)
        if known is None:  # one that only a published set may have gets the roles of that
            return None if trust.jwks_url is None else trust.jwks_roles
        return known.roles if known.revoked_at is None and known.holds(self._clock()) else None

    async def find(self, kid: str) -> TrustedKey | None:
        listed = self._ring().find(kid) if self._trust is None else self._trust().keys.get(kid)
        if listed is None:  # a new key may sign sooner after its file has changed than that is looked at
            for file in self._files:
                file.look()
        if self._trust is None:
            own = self._ring().find(kid)
            return None if own is None else self._kept(TrustedKey(kid, own.public, revoked_at=own.revoked_at))
        trust = self._trust()
        known = trust.keys.get(kid)
        own = self._ring().find(kid)
        if own is not None and own.revoked_at is not None:  # it is enough that one of the two files says so
            return TrustedKey(kid, own.public, Roles(), revoked_at=own.revoked_at)
        if known is not None or trust.jwks_url is None:
            return known
        if self._jwks is None or self._jwks.url != trust.jwks_url:
            self._jwks = Jwks(trust.jwks_url)
        jwk = await self._jwks.find(kid)
        if self._trust() != trust or self._ring().find(kid) != own:
            return await self.find(kid)  # it may be revoked, while the server took its time
        if jwk is None or _thumbprint(jwk) != kid:
            return None
        return self._kept(TrustedKey(kid, jwk, trust.jwks_roles))

    def _kept(self, key: TrustedKey) -> TrustedKey:
        """The same value as before where nothing has changed: importing a key takes as long as verifying with it."""
        known = self._imported.get(key.kid)
        if known != key:
            known = self._imported[key.kid] = key
        return known


class _Watched(Generic[Content]):
    """What a file holds, read again when it has changed. A change that can't be read is told, and the old one holds."""

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        self._path = path.absolute()  # an activity may change the working directory, to one with others' keys
        self._read = read
        # Before it is read: what is written between the two is found later, where a mark of it would hide it for ever.
        self._mark = _mark(path)
        self._content = read(path)
        self._looked_at = time.monotonic()
        self._told = ""

    def get(self) -> Content:
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self.look()
        return self._content

    def look(self) -> None:
        """Read it if it has changed, however short ago that was looked for."""
        self._looked_at = time.monotonic()
        mark = _mark(self._path)
        if mark != self._mark:
            try:
                self._content, self._told = self._read(self._path), ""
            except ConfigurationError as exc:
                if str(exc) != self._told:
                    log.error("keys.not_read: %s; those that were there before are kept", exc)
                self._told = str(exc)
                # What couldn't be opened may be the next time, for instance when there are files left to open. That a
                # folder was closed doesn't show in the mark.
                mark = _NONE if isinstance(exc, _OpenFolder) or isinstance(exc.__cause__, OSError) else mark
            self._mark = mark


class _OpenFolder(ConfigurationError):
    """Anybody may put another file in the place of one with keys."""


_NONE: tuple[int, ...] = ()
"""The mark of a file that isn't there."""


def _mark(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return _NONE
    # The last instant is also that of a change of the mode or the owner, without which a file may have been refused.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


def read_ring(path: Path) -> KeyRing:
    """The key ring in a file that only its owner can read. Raises ConfigurationError."""
    value = _read(path, "key ring", "`paigeant keys generate` makes one", private=True)
    try:
        return KeyRing.from_dict(value)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc


def read_trust(path: Path) -> Trust:
    """What a trust file says. Raises ConfigurationError with the place in it."""
    value = _read(path, "trust file", "`paigeant keys trust` writes one", private=False)
    try:
        return _trust(value)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Alone among the commands that read a key file, change it and write it: none undoes what another one does.

    Somebody else who holds the folder's lock is waited for a while only: nobody may keep a key from being revoked.
    """
    try:
        import fcntl  # here: it isn't everywhere
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        until = time.monotonic() + _LOCK_SECONDS
        with contextlib.suppress(OSError):  # no such folder, which the writing says; or one without locks
            folder = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        break
                    time.sleep(0.02)
        yield


def write_private(path: Path, value: Mapping[str, Any], *, new: bool = False, mode: int = 0o600) -> None:
    """Put `value` into a file whole or not at all, and with `mode` from the first byte.

    One that is there already keeps its mode, its owner, and the links that lead to it: whoever could read it still can.
    Raises FileExistsError where it has to be `new` and isn't, ConfigurationError for what else can't be.
    """
    try:
        path = path if new else Path(os.path.realpath(path))  # `resolve` has an error of its own for loops
        before = None if new or not path.exists() else path.stat()
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                if before is not None and os.name == "posix":
                    _become(stream.fileno(), before)
                stream.write(dumps(value, indent=2) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            if new:
                os.link(part, path)  # fails when somebody else has just made one
            else:
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        _sync(path.parent)
    except FileExistsError:
        raise
    except OSError as exc:
        raise ConfigurationError(f"can't write {path}: {exc.strerror}") from exc


def write_trust(path: Path, value: Mapping[str, Any]) -> None:
    """Put `value` into a trust file. Raises ConfigurationError, and writes nothing, for what can't be read again."""
    try:
        _trust(parse_strict(dumps(value).encode()))
    except (ConfigurationError, MessageInvalid) as exc:
        raise ConfigurationError(f"{path} stays as it was: {exc}") from exc
    write_private(path, value, mode=0o644)


def _sync(folder: Path) -> None:
    """Have what was renamed in a folder stay so when the power fails: a revoked key must not be there again."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _become(handle: int, before: os.stat_result) -> None:
    """Give a file the owner and the mode of the one whose place it takes."""
    now = os.fstat(handle)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        # Only root may, and not everywhere. A ring of somebody else nobody else could have read; a trust file is there
        # for all to read.
        with contextlib.suppress(OSError):
            os.fchown(handle, before.st_uid, before.st_gid)
    if now.st_mode != before.st_mode:
        os.fchmod(handle, stat.S_IMODE(before.st_mode))


def _read(path: Path, what: str, remedy: str, *, private: bool) -> Any:
    try:
        with open(
            path, "rb", opener=_opened
        ) as stream:  # that whose mode is looked at is the one that is read
            status = os.fstat(stream.fileno())
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode):  # it may have no end, or nobody who writes
                raise ConfigurationError(f"{path} is no file but a pipe or a device; expected a {what}")
            body = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError as exc:
        raise ConfigurationError(f"there is no {what} {path}; {remedy}") from exc
    except OSError as exc:
        raise ConfigurationError(f"can't read {path}: {exc.strerror}") from exc
    # A trust file that others can write lets them in, a ring that others can read lets them sign.
    forbidden, expected = (0o077, "0600") if private else (0o022, "0644")
    if os.name == "posix" and mode & forbidden:
        done = "read" if private else "write"
        raise ConfigurationError(
            f"others can {done} {path} (mode {mode:04o}), expected {expected}; do: chmod {expected} {path}"
        )
    if os.name == "posix":
        _check_folders(path)
    if len(body) > _MOST_BYTES:
        raise ConfigurationError(f"{path} is no {what}: it has more than {_MOST_BYTES:,} bytes")
    try:
        return parse_strict(body)
    except MessageInvalid as exc:
        raise ConfigurationError(f"{path} is no {what}: {exc}") from exc


def _opened(path: str, flags: int) -> int:
    """As `open` does it, but that it doesn't wait: a pipe would keep whoever reads it until somebody writes."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_folders(path: Path) -> None:
    """Raise ConfigurationError where anybody may put another file in the place of `path`, or of a folder above it.

    A folder that all may write in will do where each may only move what is their own (as /tmp, and volumes of secrets),
    and what leads to the file is ours or root's. Of a group that may write it is taken that this is meant: in many
    places each user has one of their own, and the mode of all new folders is for it.
    """
    for way in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
        entry = Path(way)
        for folder in entry.parents:
            try:
                mode, owner = folder.stat().st_mode, entry.lstat().st_uid
            except OSError:
                continue  # it was read just now, so this isn't the way to it any more
            if mode & stat.S_IWOTH and not (mode & stat.S_ISVTX and owner in (0, os.getuid())):
                told = f"(mode {stat.S_IMODE(mode):04o}), where anybody can put another file in its place"
                raise _OpenFolder(f"{path} is in {folder} {told}; do: chmod o-w {folder}")
            entry = folder


def _trust(value: Any) -> Trust:
    if (
        not isinstance(value, dict)
        or value.get("version") != 1
        or not isinstance(value.get("keys", []), list)
    ):
        raise ConfigurationError('a trust file is {"version": 1, "keys": [...]}; this is something else')
    _known(value, {"version", "keys", "jwks"}, "a trust file")
    entries = value.get("keys", [])
    if len(entries) > _MOST_KEYS:
        raise ConfigurationError(f"a trust file has at most {_MOST_KEYS} keys, found {len(entries)}")
    keys = [_trusted(entry, f"keys[{place}]") for place, entry in enumerate(entries)]
    places: dict[str, int] = {}
    for place, key in enumerate(keys):
        # Of two entries one might revoke the key, and the other not.
        if places.setdefault(key.kid, place) != place:
            raise ConfigurationError(
                f"keys[{place}] is the key of keys[{places[key.kid]}] once more, {key.kid}"
            )
    jwks = value.get("jwks")
    if jwks is None:
        return Trust({key.kid: key for key in keys})
    if not isinstance(jwks, dict) or not isinstance(jwks.get("url"), str):
        raise ConfigurationError('jwks is {"url": "https://...", "dispatch": [...], "run": [...]}')
    _known(jwks, {"url", "dispatch", "run", "amend"}, "jwks")
    return Trust({key.kid: key for key in keys}, Jwks(jwks["url"]).url, _roles(jwks, "jwks"))


def _trusted(entry: Any, place: str) -> TrustedKey:
    if not isinstance(entry, dict) or not isinstance(entry.get("jwk"), dict):
        raise ConfigurationError(
            f'{place} is no key; expected {{"jwk": {{...}}, "dispatch": [...], "run": [...]}}'
        )
    known = {"jwk", "name", "dispatch", "run", "amend", "not_before", "not_after", "revoked_at"}
    _known(entry, known, place)
    try:
        kid = thumbprint(entry["jwk"])
    except ConfigurationError as exc:
        raise ConfigurationError(f"{place}: {exc}") from exc
    instants: dict[str, float | None] = {}
    for name in ("not_before", "not_after", "revoked_at"):
        found = entry.get(name)
        if found is not None and (isinstance(found, bool) or not isinstance(found, (int, float))):
            raise ConfigurationError(f"{place}.{name} is seconds since 1970, found {found!r}")
        instants[name] = found
    return TrustedKey(kid, entry["jwk"], _roles(entry, place), **instants)


def _roles(entry: Mapping[str, Any], place: str) -> Roles:
    patterns = {}
    for name in ("dispatch", "run"):
        found = entry.get(name, [])
        if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
            raise ConfigurationError(f"{place}.{name} is a list of names or patterns, found {found!r}")
        patterns[name] = tuple(found)
    amend = entry.get("amend", False)
    if not isinstance(amend, bool):
        raise ConfigurationError(f"{place}.amend is true or false, found {amend!r}")
    return Roles(patterns["dispatch"], patterns["run"], amend)


def _known(entry: Mapping[str, Any], names: set[str], place: str) -> None:
    for name in entry:
        if name not in names:
            raise ConfigurationError(f"{place} has no '{name}'; known: {', '.join(sorted(names))}")


def _thumbprint(jwk: Mapping[str, Any]) -> str | None:
    try:
        return thumbprint(jwk)
    except ConfigurationError:
        return None
