"""Texts that others have written, as a person may be shown them."""

from __future__ import annotations

import json

import pytest

from paigeant.cli.console import plain, shown
from paigeant.texts import printable


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("Pay 9,000,000\x1b[2K\x1b[1GPay 9", "Pay 9,000,000\\x1b[2K\\x1b[1GPay 9"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2K", "\\u009b2K"),
        ("abc\u202edef", "abc\\u202edef"),
        ("half \ud800", "half \\ud800"),
        ("Größe 日本 🙂", "Größe 日本 🙂"),
    ],
)
def test_a_text_does_nothing_to_a_terminal(text: str, printed: str) -> None:
    """What a terminal would obey, or what turns the order of what follows, is written out; all else stays."""
    assert printable(text) == printed
    assert str(plain(text)) == printed
    assert json.loads(shown({"a": text})) == {"a": text}
    assert shown(text).isprintable()
