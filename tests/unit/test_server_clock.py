"""The server's time, by the steady clock of a process that has asked for it now and then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paigeant.databases.postgres import pipeline
from paigeant.databases.postgres.pipeline import ServerClock


class Steady:
    """A steady clock that stands where it is put."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Steady:
    """That of the process."""
    clock = Steady()
    monkeypatch.setattr(pipeline, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def told(clock: ServerClock, steady: Steady, now: float, *, asked: float, read: float) -> None:
    """The server says so, asked and heard at these instants."""
    steady.now = read
    clock.set(now, asked)


def test_it_knows_nothing_before_it_is_told_and_nothing_for_long(steady: Steady) -> None:
    """After half of the time it is to be set again, after all of it it says nothing."""
    clock = ServerClock()
    assert (clock.is_set, clock.now()) == (False, None)
    told(clock, steady, 5000.0, asked=100.0, read=100.0)
    steady.now = 104.0
    assert (clock.is_set, clock.now()) == (True, 5004.0)
    steady.now = 106.0
    assert (clock.is_set, clock.now()) == (False, 5006.0)
    steady.now = 111.0
    assert (clock.is_set, clock.now()) == (False, None)


def test_an_answer_that_is_read_late_does_not_make_it_slow(steady: Steady) -> None:
    """What it knew before is still possible, and nearer to the truth but for what two clocks may differ by."""
    clock = ServerClock()
    told(clock, steady, 5000.0, asked=100.0, read=100.001)
    told(clock, steady, 5006.0, asked=106.0, read=109.0)
    steady.now = 109.0
    assert clock.now() == pytest.approx(5009.0, abs=0.011)


def test_it_is_never_ahead_of_a_server_whose_clock_was_put_back(steady: Steady) -> None:
    """Then what it knew isn't possible any more."""
    clock = ServerClock()
    told(clock, steady, 5000.0, asked=100.0, read=100.0)
    told(clock, steady, 4000.0, asked=106.0, read=106.5)
    assert clock.now() == pytest.approx(4000.0)


def test_it_follows_a_server_whose_clock_was_put_forward(steady: Steady) -> None:
    """Or goes on after its own process's host was suspended, for which the steady clock stood still."""
    clock = ServerClock()
    told(clock, steady, 5000.0, asked=100.0, read=100.0)
    told(clock, steady, 9000.0, asked=106.0, read=106.5)
    assert clock.now() == pytest.approx(9000.0)
