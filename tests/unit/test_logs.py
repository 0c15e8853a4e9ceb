"""The log lines of events and of users' code, and the ids that they carry."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import structlog

from paigeant import ActivityRegistry, StepContext, Workflow
from paigeant.observer import CURRENT, Event, EventName
from paigeant.observers.logs import LEVELS, LogObserver, configure
from paigeant.testing import MemoryApp

IDS = {"workflow_id", "workflow", "step", "activity", "attempt", "trace_id", "correlation_id", "worker"}


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("paigeant")
    levels = root.level, own.level
    yield
    root.handlers.clear()
    own.handlers[:] = [handler for handler in own.handlers if isinstance(handler, logging.NullHandler)]
    own.propagate = True
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    structlog.reset_defaults()


def configured(stream: io.StringIO) -> LogObserver:
    """Logging as in a new process: pytest's own handlers are gone for the rest of the test."""
    logging.getLogger().handlers.clear()
    return configure(stream=stream)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was written, line by line."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def step_event(name: EventName = "step.completed", **more: Any) -> Event:
    """An event of a step with all ids."""
    return Event(
        name, "order-1", "fulfil", "reserve", "reserve_stock", 2, "trace", "corr", "worker-1", **more
    )


def test_every_event_has_a_level() -> None:
    """The table of levels and the vocabulary of events are the same words."""
    assert set(LEVELS) == set(get_args(EventName))


def test_an_event_is_one_json_line_with_all_its_ids() -> None:
    """A line says what, when, how bad, and to which step, run, workflow, trace and worker it belongs."""
    stream = io.StringIO()
    LogObserver(stream=stream).observe(step_event(seconds=0.25, more={"delay": 3}))
    (line,) = lines(stream)
    instant = line.pop("timestamp")
    assert instant.endswith("Z")
    assert line == {
        "level": "info",
        "event": "step.completed",
        "workflow_id": "order-1",
        "workflow": "fulfil",
        "step": "reserve",
        "activity": "reserve_stock",
        "attempt": 2,
        "trace_id": "trace",
        "correlation_id": "corr",
        "worker": "worker-1",
        "seconds": 0.25,
        "delay": 3,
    }


def test_what_an_event_does_not_have_is_left_out() -> None:
    """No empty ids: an event of a worker belongs to no run."""
    stream = io.StringIO()
    LogObserver(stream=stream).observe(Event("worker.lost", worker="worker-1"))
    assert IDS & set(lines(stream)[0]) == {"worker"}


def test_below_the_level_nothing_is_built() -> None:
    """An event below the level isn't even looked at."""

    class Untouchable(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("looked at")

    stream = io.StringIO()
    LogObserver(level="warning", stream=stream).observe(step_event(more=Untouchable()))
    assert stream.getvalue() == ""


def test_an_error_stands_in_its_line() -> None:
    """The error of a step, line breaks and all, stays on the one line of its event."""
    stream = io.StringIO()
    LogObserver(stream=stream).observe(step_event("step.failed", error="ValueError: a\nb"))
    assert (lines(stream)[0]["error"], lines(stream)[0]["level"]) == ("ValueError: a\nb", "error")


def test_the_console_leaves_out_what_says_nothing() -> None:
    """At a terminal the worker and ids that repeat another one are left out; run, step, attempt and trace stay."""
    stream = io.StringIO()
    event = Event(
        "step.completed", "order-1", "fulfil", "reserve", "reserve", 1, "trace", "order-1", "worker-1"
    )
    LogObserver(format="console", stream=stream).observe(event)
    text = stream.getvalue()
    assert [part for part in ("worker-1", "correlation_id", "activity=") if part in text] == []
    assert [part for part in ("order-1", "fulfil", "reserve", "attempt=1", "trace") if part not in text] == []


def test_users_logging_carries_the_ids_of_the_current_step() -> None:
    """A line that an activity logs through `logging` belongs to its step."""
    stream = io.StringIO()
    configured(stream)
    token = CURRENT.set({"workflow_id": "order-1", "step": "reserve"})
    logging.getLogger("shop").info("taking %d", 3, extra={"shelf": "B"})
    CURRENT.reset(token)
    (line,) = lines(stream)
    assert {name: line[name] for name in ("event", "logger", "workflow_id", "step", "shelf")} == {
        "event": "taking 3",
        "logger": "shop",
        "workflow_id": "order-1",
        "step": "reserve",
        "shelf": "B",
    }


def test_users_structlog_carries_the_ids_too() -> None:
    """An activity that logs through structlog, which nobody has configured, joins in."""
    stream = io.StringIO()
    configured(stream)
    token = CURRENT.set({"workflow_id": "order-1"})
    structlog.get_logger("shop").warning("low stock", sku="A-1")
    CURRENT.reset(token)
    (line,) = lines(stream)
    assert (line["event"], line["sku"], line["workflow_id"], line["level"]) == (
        "low stock",
        "A-1",
        "order-1",
        "warning",
    )


def test_a_traceback_is_part_of_its_line() -> None:
    """What `exc_info` adds is a field, so that a line stays a line."""
    stream = io.StringIO()
    configured(stream)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("shop").exception("failed")
    (line,) = lines(stream)
    assert line["exception"].endswith("ValueError: no")


def test_configuring_again_replaces_what_was_there() -> None:
    """One line stays one line, however often logging is configured."""
    first, second = io.StringIO(), io.StringIO()
    configured(first)
    configure(stream=second)
    logging.getLogger("shop").warning("once")
    assert (len(lines(first)), len(lines(second))) == (0, 1)


def test_handlers_of_the_application_stay() -> None:
    """Where the application has set up logging, its lines go where it said, and only ours come here."""
    theirs, ours = io.StringIO(), io.StringIO()
    logging.getLogger().handlers[:] = [logging.StreamHandler(theirs)]
    configure(stream=ours)
    logging.getLogger("shop").warning("theirs")
    logging.getLogger("paigeant.worker").warning("ours")
    assert (theirs.getvalue(), [line["event"] for line in lines(ours)]) == ("theirs\n", ["ours"])


def test_an_unknown_level_is_refused() -> None:
    """A level that isn't one is an error that names what there is."""
    with pytest.raises(ValueError, match="expected debug, info, warning or error"):
        LogObserver(level="loud")


async def test_each_line_of_a_real_step_has_the_ids_of_its_run() -> None:
    """What a real worker tells of a step, and what async and plain activities log, carry the same ids."""
    activity = ActivityRegistry()

    @activity.execute()
    async def first(ctx: StepContext) -> None:
        ctx.log.info("from first")

    @activity.execute()
    def second() -> None:
        logging.getLogger("shop").info("from second, in a thread")

    stream = io.StringIO()
    observer = configured(stream)
    async with MemoryApp(activity, observers=[observer]) as app:
        run = await app.dispatch(Workflow("pair", ["first", "second"]))
        await app.drain()
    await asyncio.sleep(0)
    of_steps = [line for line in lines(stream) if line.get("step")]
    seen = {(line["event"], line["workflow_id"], line["step"], line["attempt"]) for line in of_steps}
    assert seen >= {
        ("from first", run.id, "first", 1),
        ("from second, in a thread", run.id, "second", 1),
        ("step.completed", run.id, "first", 1),
        ("step.completed", run.id, "second", 1),
        ("run.completed", run.id, "second", 1),
    }
    assert [line for line in of_steps if not set(line) >= IDS] == []
    assert len({line["trace_id"] for line in of_steps}) == 1


async def test_the_traceback_of_an_attempt_has_the_ids_of_its_step() -> None:
    """Why an attempt failed is logged with its traceback and the step that it belongs to."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def break_down() -> None:
        raise RuntimeError("no steam")

    stream = io.StringIO()
    configured(stream)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("engine", ["break_down"]))
        await app.drain()
    (line,) = [line for line in lines(stream) if "exception" in line]
    assert line["exception"].endswith("RuntimeError: no steam")
    assert (line["workflow_id"], line["step"], line["attempt"]) == (run.id, "break_down", 1)
