"""Files with keys: who else may read or write them, and what holds when they change."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.patience import PATIENCE

from paigeant import keyfiles
from paigeant.cli import keys as commands
from paigeant.errors import ConfigurationError
from paigeant.jwks import Jwks
from paigeant.keyfiles import FileKeys, changing, read_ring, read_trust, write_private, write_trust
from paigeant.keys import Key, KeyRing

KEY, THEIRS = Key.generate(now=1.0), Key.generate(now=2.0)
RING, TRUST = Path("ring.json"), Path("trust.json")


def trust(*keys: Key, mode: int = 0o644, **more: Any) -> None:
    """Write a trust file in which these keys may do all."""
    entries = [{"jwk": key.public, "run": ["*"], "dispatch": ["*"], **more} for key in keys]
    TRUST.write_text(json.dumps({"version": 1, "keys": entries}))
    TRUST.chmod(mode)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o620, 0o602, 0o666, 0o777])
def test_a_trust_file_that_others_can_write_is_refused(mode: int) -> None:
    """Whoever can write there could trust a key of their own; the error has the command that closes it."""
    trust(KEY, mode=mode)
    said = rf"others can write trust.json \(mode {mode:04o}\), expected 0644; do: chmod 0644 trust.json"
    with pytest.raises(ConfigurationError, match=said):
        read_trust(TRUST)


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o440, 0o444, 0o755])
def test_a_trust_file_may_be_read_by_all(mode: int) -> None:
    """It has nothing private."""
    trust(KEY, mode=mode)
    assert set(read_trust(TRUST).keys) == {KEY.kid}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660, 0o644])
def test_a_key_ring_that_others_can_reach_is_refused(mode: int) -> None:
    """Reading or writing, the group or all."""
    write_private(RING, KeyRing((KEY,)).as_dict())
    RING.chmod(mode)
    said = rf"ring.json \(mode {mode:04o}\), expected 0600"
    with pytest.raises(ConfigurationError, match=said):
        read_ring(RING)


@pytest.mark.parametrize("read", [read_ring, read_trust])
@pytest.mark.parametrize("linked", [False, True], ids=["there", "by a link"])
@pytest.mark.parametrize("depth", [1, 2], ids=["its folder", "a folder above"])
def test_a_key_file_in_a_folder_that_is_open_to_all_is_refused(
    tmp_path: Path, read: Callable[[Path], Any], linked: bool, depth: int
) -> None:
    """Anybody could put another file in its place, as ssh has it for authorized keys; a group may be meant."""
    path = tmp_path / "above" / "keys" / "file.json"
    path.parent.mkdir(parents=True)
    if read is read_ring:
        write_private(path, KeyRing((KEY,)).as_dict())
    else:
        write_trust(path, {"version": 1, "keys": [{"jwk": KEY.public, "run": ["*"]}]})
    named = path
    if linked:
        named = tmp_path / "link.json"
        named.symlink_to(path)
    folder = path.parents[depth - 1]
    for mode in (0o700, 0o755, 0o775, 0o1777):
        folder.chmod(mode)
        read(named)
    for mode in (0o777, 0o757, 0o702):
        folder.chmod(mode)
        said = rf"{named} is in {folder} \(mode {mode:04o}\), where anybody can .* do: chmod o-w {folder}$"
        with pytest.raises(ConfigurationError, match=said):
            read(named)


def test_what_somebody_else_has_left_in_a_common_folder_is_no_trust_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /tmp: nobody can move what is another's there, but anybody can be the first."""
    path = tmp_path / "common" / "trust.json"
    path.parent.mkdir()
    path.parent.chmod(0o1777)
    write_trust(path, {"version": 1, "keys": [{"jwk": KEY.public, "run": ["*"]}]})
    read_trust(path)
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
    else:  # only root gives files away: to whoever else looks at it, it is somebody else's
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigurationError, match="anybody can put another file in its place"):
        read_trust(path)


async def test_a_folder_that_was_closed_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the error says to do has the file read, and a key revoked."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    (tmp_path / "keys").mkdir()
    monkeypatch.chdir(tmp_path / "keys")
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY, THEIRS)
    keys = FileKeys.of(RING, TRUST)
    Path.cwd().chmod(0o777)
    trust(KEY, THEIRS, revoked_at=5)
    found = await keys.find(THEIRS.kid)
    assert found is not None
    assert found.revoked_at is None
    Path.cwd().chmod(0o755)
    found = await keys.find(THEIRS.kid)
    assert found is not None
    assert found.revoked_at == 5


async def test_what_others_write_into_a_trust_file_later_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is opened to others under a process is read no more: the keys from before hold, and it is told."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY)
    keys = FileKeys.of(RING, TRUST)
    trust(KEY, THEIRS, mode=0o666)
    with caplog.at_level(logging.ERROR, "paigeant.keys"):
        assert await keys.find(THEIRS.kid) is None
        assert await keys.find(KEY.kid) is not None
    assert re.search(r"keys.not_read: others can write /.*/trust.json", caplog.text)
    trust(KEY, THEIRS, mode=0o644)
    assert await keys.find(THEIRS.kid) is not None


@pytest.mark.parametrize("has_trust", [False, True], ids=["ring", "trust file"])
async def test_a_new_key_is_found_at_once(has_trust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key signs right after it was written is no stranger's, however short ago the files were looked at."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 3600.0)
    ring, new = KeyRing((Key.generate(now=1.0),)), Key.generate(now=2.0)

    def write(*keys: Key) -> None:
        write_private(RING, KeyRing(keys).as_dict())
        entries = [{"jwk": key.public, "run": ["*"]} for key in keys]
        write_private(TRUST, {"version": 1, "keys": entries}, mode=0o644)

    write(*ring.keys)
    keys = FileKeys.of(RING, TRUST if has_trust else None)
    assert await keys.find(ring.active.kid) is not None
    assert await keys.find(new.kid) is None
    write(*ring.keys, new)
    found = await keys.find(new.kid)
    assert found is not None
    assert found.kid == new.kid


async def test_files_stay_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a folder that the process changes into, as an activity may, are nobody's; those named are read again."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY)
    keys, stranger = FileKeys.of(RING, TRUST), Key.generate(now=2.0)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    with contextlib.chdir(elsewhere):
        trust(stranger)
        assert await keys.find(stranger.kid) is None
    trust(KEY, revoked_at=5)
    with contextlib.chdir(elsewhere):
        assert (await believed(keys)) == 5


async def test_a_file_that_was_closed_to_others_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the error says to do is enough: a change of the mode alone has the file read, and a key revoked."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY)
    keys = FileKeys.of(RING, TRUST)
    trust(KEY, mode=0o664, revoked_at=5)
    assert (await believed(keys)) is None, "the file is refused"
    close()
    assert (await believed(keys)) == 5


async def test_a_file_that_cannot_be_opened_for_a_while_is_read_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as while a process has no files left to open; that is told once."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY)
    keys = FileKeys.of(RING, TRUST)
    trust(KEY, revoked_at=5)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "paigeant.keys"):
        patch.setattr(keyfiles, "_opened", _refuse)
        for _ in range(3):
            assert (await believed(keys)) is None
    assert caplog.text.count("keys.not_read") == 1
    assert (await believed(keys)) == 5


async def test_what_is_written_while_a_file_is_read_first_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is revoked right when a process starts is revoked in that process, too."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY)
    read = keyfiles.read_trust

    def read_slowly(path: Path) -> keyfiles.Trust:
        found = read(path)
        if not json.loads(path.read_text())["keys"][0].get("revoked_at"):
            trust(KEY, revoked_at=5)
        return found

    monkeypatch.setattr(keyfiles, "read_trust", read_slowly)
    assert (await believed(FileKeys.of(RING, TRUST))) == 5


def close() -> None:
    """What the error says to do."""
    TRUST.chmod(0o644)


async def believed(keys: FileKeys) -> float | None:
    """When the key was revoked, as far as they know."""
    found = await keys.find(KEY.kid)
    assert found is not None
    return found.revoked_at


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_file_that_is_changed_stays_where_and_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever reads it couldn't any more, or would read another one, and never learn what was revoked."""
    Path("real").mkdir()
    ring = Path("real/ring.json")
    write_private(ring, KeyRing((KEY,)).as_dict())
    ring.chmod(0o400)
    RING.symlink_to(ring)
    write_private(RING, KeyRing((KEY,)).revoke(KEY.kid, now=5.0).as_dict())
    assert RING.is_symlink()
    assert read_ring(ring).keys[0].revoked_at == 5.0
    assert ring.stat().st_mode & 0o777 == 0o400
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _, user, group: given.append((user, group)))
    foreign = os.stat_result((0o100600, 0, 0, 1, 4321, 1234, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: foreign)
    write_private(RING, KeyRing((KEY,)).as_dict())
    assert given == [(4321, 1234)]


def test_a_trust_file_is_readable_to_others_whoever_changes_it() -> None:
    """An operator whose new files are nobody else's revokes for the workers as well."""
    trust(KEY)
    before = os.umask(0o077)
    try:
        write_trust(TRUST, json.loads(TRUST.read_text()))
    finally:
        os.umask(before)
    assert TRUST.stat().st_mode & 0o777 == 0o644


def test_one_key_is_trusted_once() -> None:
    """Of two entries for a key one could revoke it and the other not."""
    trust(THEIRS, KEY, KEY)
    with pytest.raises(ConfigurationError, match=rf"keys\[2\] is the key of keys\[1\] once more, {KEY.kid}"):
        read_trust(TRUST)


def test_no_command_undoes_what_another_one_does() -> None:
    """Of commands at the same time each finds what the others have written: no revocation is lost."""
    write_private(RING, KeyRing((KEY,)).as_dict())
    with ThreadPoolExecutor() as threads:
        for _ in range(8):
            threads.submit(commands.rotate, RING, "Ed25519", json=True)
        threads.submit(commands.revoke, KEY.kid, RING, None, json=True)
    ring = read_ring(RING)
    assert len(ring.keys) == 9
    assert ring.keys[0].revoked_at is not None


def test_a_link_that_leads_to_itself_gives_place_to_the_file() -> None:
    """There is nothing that it could lead to, and no traceback."""
    RING.symlink_to(RING)
    with changing(RING):
        write_private(RING, KeyRing((KEY,)).as_dict())
    assert read_ring(RING).keys == (KEY,)


def test_nobody_keeps_a_key_from_being_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can read a folder can lock it. They are waited for, and then no longer."""
    monkeypatch.setattr(keyfiles, "_LOCK_SECONDS", 0.1)
    folder = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        began = time.monotonic()
        with changing(RING):
            assert 0.1 <= time.monotonic() - began < PATIENCE
    finally:
        os.close(folder)
    monkeypatch.setattr(keyfiles, "_LOCK_SECONDS", PATIENCE)
    with changing(RING):
        waiting = threading.Thread(target=lambda: changing(RING).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join()


@pytest.mark.parametrize(("now", "may"), [(99.0, False), (100.0, True), (200.0, True), (201.0, False)])
def test_a_key_that_doesn_t_hold_signs_nothing(now: float, may: bool) -> None:
    """Nobody would take it: the process leaves its topics to others, and says so when it is to dispatch."""
    write_private(RING, KeyRing((KEY,)).as_dict())
    trust(KEY, not_before=100, not_after=200)
    key, roles = FileKeys.of(RING, TRUST, clock=lambda: now).signer()
    assert key == KEY
    assert roles.may_start("order") is may


@pytest.mark.parametrize(
    ("new", "signs"),
    [
        (None, KEY),
        ({"run": ["*"]}, THEIRS),
        ({"run": ["*"], "not_before": 101}, KEY),
        ({"run": ["*"], "revoked_at": 5}, KEY),
    ],
    ids=["not there yet", "there", "to begin later", "revoked"],
)
def test_a_new_key_signs_once_the_trust_file_lets_it(new: dict[str, Any] | None, signs: Key) -> None:
    """Until then the one before it does: all steps would stand still meanwhile, and nobody say why."""
    write_private(RING, KeyRing((KEY,)).rotate(THEIRS).as_dict())
    entries = [{"jwk": KEY.public, "run": ["*"]}]
    if new is not None:
        entries.append({"jwk": THEIRS.public, **new})
    write_trust(TRUST, {"version": 1, "keys": entries})
    key, roles = FileKeys.of(RING, TRUST, clock=lambda: 100.0).signer()
    assert key == signs
    assert roles.may_do("order")


def test_a_revoked_key_does_not_sign_in_place_of_a_new_one() -> None:
    """In the ring or in the trust file: then nothing is signed until there is one."""
    write_private(RING, KeyRing((KEY,)).rotate(THEIRS).revoke(KEY.kid, now=3.0).as_dict())
    trust(KEY)
    key, roles = FileKeys.of(RING, TRUST).signer()
    assert (key, roles.run, roles.amend) == (THEIRS, (), False)


def test_a_key_file_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't a file may have none, and would take all memory."""
    monkeypatch.setattr(keyfiles, "_MOST_BYTES", 1000)
    trust(*(Key.generate(now=1.0) for _ in range(10)))
    with pytest.raises(ConfigurationError, match=r"trust\.json is no trust file: it has more than"):
        read_trust(TRUST)


async def test_a_key_is_revoked_while_the_key_set_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server may take seconds, and who runs it may be the one whose key is revoked."""
    monkeypatch.setattr(keyfiles, "_LOOK_SECONDS", 0.0)
    write_private(RING, KeyRing((KEY,)).as_dict())
    value = {"version": 1, "keys": [], "jwks": {"url": "https://theirs.example", "run": ["*"]}}
    write_trust(TRUST, value)
    keys = FileKeys.of(RING, TRUST)

    async def find(_: Jwks, kid: str) -> dict[str, str]:
        write_trust(TRUST, {**value, "keys": [{"jwk": THEIRS.public, "revoked_at": 5}]})
        return THEIRS.public

    monkeypatch.setattr(Jwks, "find", find)
    found = await keys.find(THEIRS.kid)
    assert found is not None
    assert found.revoked_at == 5


def test_a_pipe_in_the_place_of_a_key_file_keeps_nobody_waiting() -> None:
    """A worker looks at its files again and again, in its event loop."""
    for path, read in ((RING, read_ring), (TRUST, read_trust)):
        os.mkfifo(path, 0o600)
        with pytest.raises(ConfigurationError, match=r"is no file but a pipe or a device"):
            read(path)
