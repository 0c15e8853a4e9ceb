"""The promises of `Store` on the values of runs: variables, units of steps, signals, outputs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from paigeant.errors import InputInvalid, InvalidTransition, RunNotFound
from paigeant.slip import Phase
from paigeant.store import Store
from paigeant.testing.conformance.bench import StoreBench

__all__ = ["ValueConformance"]


class ValueConformance(StoreBench):
    """Part of `StoreConformance`."""

    # -- values of a run

    @pytest.mark.parametrize(
        "value",
        [
            None,
            0,
            "",
            False,
            [],
            {},
            2**70,
            -(2**63) - 1,
            0.1,
            1e308,
            "ä\u2028\U0001f600",
            {"a": [{"": None}]},
        ],
    )
    async def test_a_variable_comes_back(self, store: Store, value: Any) -> None:
        """Any JSON value is a value; None, 0, "" and False as well as numbers of any size."""
        await self.start(store)
        await store.save_variable("r", "v", value)
        found = await store.load_variable("r", "v", "missing")
        assert (found, type(found)) == (value, type(value))

    async def test_a_variable_can_be_replaced(self, store: Store) -> None:
        """The last value counts, in every process."""
        await self.start(store)
        await store.save_variable("r", "v", 1)
        async with self.other(store) as other:
            await other.save_variable("r", "v", 2)
        assert await store.list_variables("r") == {"v": 2}

    async def test_a_missing_variable_is_the_default(self, store: Store) -> None:
        """What was never saved, or belongs to another run, is the caller's default."""
        await self.start(store)
        assert await store.load_variable("r", "v") is None
        assert await store.load_variable("nobody", "v", 7) == 7

    async def test_a_variable_needs_a_run_and_a_json_value(self, store: Store) -> None:
        """Saving for no run, or what JSON can't hold, is an error."""
        await self.start(store)
        with pytest.raises(RunNotFound):
            await store.save_variable("nobody", "v", 1)
        with pytest.raises(InputInvalid, match="'v'"):
            await store.save_variable("r", "v", object())

    async def test_the_first_value_of_a_unit_stands(self, store: Store) -> None:
        """A unit of work has one value, for each step, phase and name."""
        key = await self.start(store)
        assert await store.load_unit(key, "u") is None
        assert await store.save_unit(key, "u", b"1") == b"1"
        async with self.other(store) as other:
            assert await other.save_unit(key, "u", b"2") == b"1"
        assert await store.load_unit(key, "u") == b"1"
        assert await store.save_unit(key._replace(phase=Phase.UNDO), "u", b"3") == b"3"
        assert await store.save_unit(key, "v", b"null") == b"null"
        assert await store.load_unit(key, "v") == b"null"

    async def test_all_units_of_a_step_are_read_at_once(self, store: Store) -> None:
        """They come by name, and none of another step, phase or run is among them."""
        key = await self.start(store)
        assert await store.load_units(key) == {}
        for name, value in (("u", b"1"), ("ü ", b'{"a": [1.0, 1e22]}'), ("u#2", b"null")):
            await store.save_unit(key, name, value)
        await store.save_unit(key._replace(phase=Phase.UNDO), "undo", b"1")
        await store.save_unit(key._replace(step="other"), "other", b"1")
        async with self.other(store) as other:
            assert await other.load_units(key) == {"u": b"1", "ü ": b'{"a": [1.0, 1e22]}', "u#2": b"null"}

    async def test_units_saved_at_once_agree(self, store: Store) -> None:
        """All who save one unit at the same moment get the same value."""
        key = await self.start(store)
        answers = await asyncio.gather(*(store.save_unit(key, "u", b"%d" % n) for n in range(10)))
        assert len(set(answers)) == 1

    async def test_signals_are_kept_in_order(self, store: Store) -> None:
        """Each signal is kept with its time, equal ones too."""
        await self.start(store)
        await store.record_signal("r", "go", b"1")
        self.clock.advance(1)
        await store.record_signal("r", "go", b"1")
        await store.record_signal("r", "stop", b"null")
        signals = (await store.load_run("r")).signals
        assert [(signal.name, signal.value) for signal in signals] == [
            ("go", b"1"),
            ("go", b"1"),
            ("stop", b"null"),
        ]
        assert signals[1].created_at - signals[0].created_at == 1

    async def test_an_ended_run_takes_no_signals(self, store: Store) -> None:
        """Signals are for open runs that exist."""
        await self.completed(store)
        with pytest.raises(InvalidTransition, match="completed"):
            await store.record_signal("r", "go", b"1")
        with pytest.raises(RunNotFound):
            await store.record_signal("nobody", "go", b"1")

    async def test_no_output_is_none(self, store: Store) -> None:
        """A step without a recorded output, or that isn't there, has None."""
        await self.start(store)
        assert await store.load_output("r", "a") is None
        assert await store.load_output("nobody", "a") is None
