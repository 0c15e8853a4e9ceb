"""Files of keys, and what is known of a change in them when."""

from __future__ import annotations

from pathlib import Path

import pytest

from paigeant import keyfiles
from paigeant.keyfiles import FileKeys, write_private
from paigeant.keys import Key, KeyRing

RING, TRUST = Path("ring.json"), Path("trust.json")


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
