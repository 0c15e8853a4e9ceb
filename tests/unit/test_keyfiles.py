"""Files with keys: who else may read or write them, and what holds when they change."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from paigeant import keyfiles
from paigeant.errors import ConfigurationError
from paigeant.keyfiles import FileKeys, read_ring, read_trust, write_private
from paigeant.keys import Key, KeyRing

KEY, THEIRS = Key.generate(now=1.0), Key.generate(now=2.0)
RING, TRUST = Path("ring.json"), Path("trust.json")


def trust(*keys: Key, mode: int = 0o644) -> None:
    """Write a trust file in which these keys may do all."""
    entries = [{"jwk": key.public, "run": ["*"], "dispatch": ["*"]} for key in keys]
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
    assert "keys.not_read: others can write trust.json" in caplog.text
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
