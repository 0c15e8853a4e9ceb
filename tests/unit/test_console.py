"""What commands write: nothing of what others have written does anything to the terminal that shows it."""

from __future__ import annotations

import json
import sys

import pytest

from paigeant.cli import console

EVIL = "\x1b]0;owned\x07\x9b2J\u202eevil\x7f"


def test_json_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """It means the same: what a terminal would obey is written out."""
    console.value({"input": [EVIL, "Grüße"]})
    shown = capsys.readouterr().out
    assert not set(shown) & set(EVIL[0] + "\x07\x9b\u202e\x7f")
    assert "Grüße" in shown or "utf" not in (sys.stdout.encoding or "").lower()
    assert json.loads(shown) == {"input": [EVIL, "Grüße"]}


def test_an_error_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """It may quote the names of others, such as those of dead letters."""
    console.error(f"there is no dead letter 'x'; known: {EVIL}")
    console.warn(f"one\n{EVIL}")
    shown = capsys.readouterr().err
    assert not set(shown) & set(EVIL[0] + "\x07\x9b\u202e\x7f")
    assert "known: \\x1b]0;owned" in " ".join(shown.split())


def test_a_text_of_others_keeps_its_lines() -> None:
    """And nothing else that a terminal would obey."""
    assert console.harmless("one\ntwo \x1b[2J") == "one\ntwo \\x1b[2J"


def test_a_note_with_a_name_of_others_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """An id may look like a tag: one that isn't open ended the command, and a link led elsewhere."""
    console.note("run 'a[/b]' of '[link=http://evil.example]b\x9b[/link]'", markup=False, style="dim")
    assert "run 'a[/b]' of '[link=http://evil.example]b\\u009b[/link]'" in capsys.readouterr().err
