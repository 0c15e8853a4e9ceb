"""A step doesn't fail for the store's trouble."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from paigeant import ActivityRegistry, StepContext, Workflow
from paigeant.errors import StoreUnavailable
from paigeant.patience import patiently
from paigeant.store import StepKey
from paigeant.stores.memory import MemoryStore
from paigeant.testing import MemoryApp


class Troubled:
    """Can't answer so many times, then does."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.asked = 0

    async def __call__(self) -> str:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise StoreUnavailable("away")
        return "answer"


async def test_it_asks_until_there_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """What can't be answered is asked again; why is told once, and at each attempt to who debugs."""
    troubled = Troubled(3)
    with caplog.at_level(logging.DEBUG):
        assert await patiently(troubled, "it", seconds=30, chance=lambda: -0.5) == "answer"
    assert troubled.asked == 4
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "it has to wait: away"),
        ("DEBUG", "it has to wait: away"),
        ("DEBUG", "it has to wait: away"),
    ]


async def test_it_gives_up_when_the_time_is_up() -> None:
    """Patience has an end, which is the store's own error."""
    with pytest.raises(StoreUnavailable, match="away"):
        await patiently(Troubled(1000), "it", seconds=0.01, chance=lambda: -0.49)


async def test_values_that_can_t_be_read_at_once_fail_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, variables and what is done once are read and written as soon as the store answers: one attempt."""
    activity = ActivityRegistry()
    attempts: list[int] = []

    @activity.execute(retries=0)
    async def make() -> str:
        return "x" * 100

    @activity.execute(retries=0)
    async def use(make: str, context: StepContext) -> dict[str, Any]:
        attempts.append(context.attempt)
        assert await context.load_variable("colour", "none") == "none"
        return {"length": len(make), "once": await context.once("roll", lambda: 6)}

    troubled: set[str] = set()
    for name in ("load_output", "load_variable", "save_unit"):
        monkeypatch.setattr(MemoryStore, name, _at_first_not(getattr(MemoryStore, name), name, troubled))
    async with MemoryApp(activity, inline_bytes=10) as app:
        run = await app.dispatch(Workflow("w", ["make", "use"]), workflow_id="r")
        await app.drain()
        result = await run.wait()
        assert await app.store.load_unit(StepKey("r", "use"), "roll") == b"6"
    assert (result.status, result.output) == ("completed", {"length": 100, "once": 6})
    assert attempts == [1]
    assert troubled == {"load_output", "load_variable", "save_unit"}


async def test_records_that_can_t_be_read_at_once_fail_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt reads what the first one recorded as soon as the store answers."""
    activity = ActivityRegistry()
    rolled: list[int] = []

    def roll(attempt: int) -> int:
        rolled.append(attempt)
        return 6

    @activity.execute(retries=1)
    async def use(context: StepContext) -> Any:
        first = await context.once("roll", roll, context.attempt)
        if context.attempt == 1:
            raise ConnectionError("after the record")
        return first

    troubled: set[str] = set()
    monkeypatch.setattr(
        MemoryStore, "load_units", _at_first_not(MemoryStore.load_units, "load_units", troubled)
    )
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["use"]))
        await app.drain()
        detail = await run.detail()
    assert (detail.steps[0].output, detail.steps[0].attempt) == (b"6", 2)
    assert (rolled, troubled) == ([1], {"load_units"})


def _at_first_not(method: Any, name: str, troubled: set[str]) -> Any:
    async def ask(self: MemoryStore, *args: Any) -> Any:
        if name not in troubled:
            troubled.add(name)
            raise StoreUnavailable("away")
        return await method(self, *args)

    return ask
