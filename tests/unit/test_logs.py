"""The log lines of events and of users' code, and the ids that they carry."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import logging
import logging.config
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import structlog
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, StepContext, Workflow
from paigeant.errors import ConfigurationError
from paigeant.observer import CURRENT, Event, EventName, Observers
from paigeant.observers.logs import LEVELS, LogFile, LogHandler, LogObserver, configure
from paigeant.observers.logs.destinations import StreamLog
from paigeant.observers.logs.lines import HEADS, fields_of, text_of
from paigeant.redaction import Redactor
from paigeant.testing import MemoryApp
from paigeant.usage import Usage

IDS_IN_ORDER = (
    "workflow_id",
    "workflow",
    "step",
    "activity",
    "attempt",
    "trace_id",
    "correlation_id",
    "worker",
)
IDS = set(IDS_IN_ORDER)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("paigeant")
    levels, hook = (root.level, own.level), threading.excepthook
    yield
    logging.captureWarnings(False)
    threading.excepthook = hook
    for name in list(root.manager.loggerDict):
        logging.getLogger(name).disabled = False
    root.handlers.clear()
    own.handlers[:] = [handler for handler in own.handlers if isinstance(handler, logging.NullHandler)]
    own.propagate = True
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    for library in ("aiormq", "aio_pika", "alembic"):
        logging.getLogger(library).setLevel(logging.NOTSET)
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
    """At a terminal the worker, the trace and ids that repeat another one are left out; run, step and attempt stay."""
    stream = io.StringIO()
    event = Event(
        "step.completed", "order-1", "fulfil", "reserve", "reserve", 1, "trace", "order-1", "worker-1"
    )
    LogObserver(format="console", stream=stream).observe(event)
    text = stream.getvalue()
    assert [part for part in ("worker-1", "correlation_id", "activity=", "trace") if part in text] == []
    assert [part for part in ("order-1", "fulfil", "reserve", "attempt=1") if part not in text] == []


def at_terminal(name: EventName, more: dict[str, Any]) -> str:
    """What the console says of an event, behind its name."""
    stream = io.StringIO()
    LogObserver(format="console", stream=stream).observe(Event(name, more=more))
    return stream.getvalue().rstrip().partition(name)[2].strip()


def test_the_console_tells_in_one_breath_what_agents_used() -> None:
    """Numbers that are nought and the models are left out; a cost that is known is told."""
    usage = Usage(2, 0, 112, 14, Decimal("0.0012"), {"test": Usage(2, 0, 112, 14)})
    assert at_terminal("step.completed", {"usage": usage.as_json()}) == (
        "usage='2 requests, 112 tokens in, 14 tokens out, $0.0012'"
    )


def test_the_console_shows_values_as_a_person_reads_them() -> None:
    """Names stand side by side, an instant is a time of this place, and what isn't there isn't told."""
    until = datetime(2026, 11, 28, 12, 30, tzinfo=UTC)
    waits = {"waits_for": ["paid", "cancelled"], "until": until.timestamp()}
    assert at_terminal("step.waiting", waits) == (
        f"waits_for=paid,cancelled until='{until.astimezone():%Y-%m-%d %H:%M:%S}'"
    )
    assert at_terminal("step.waiting", {"waits_for": ["paid"], "until": None}) == "waits_for=paid"
    assert at_terminal("step.waiting", {"until": 1e18}) == "until=1e+18"


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


def test_what_a_record_has_besides_takes_no_fields_place() -> None:
    """What happened, how bad it is, when and who says so stay what they are, and nothing is lost."""
    stream = io.StringIO()
    configured(stream)
    said = {"event": "click", "level": "gold", "timestamp": "password=pass1", "logger": "password=pass2"}
    logging.getLogger("shop").error("boom", extra={**said, "sku": "A-1"})
    structlog.get_logger().error("boom", timestamp="password=pass3")
    first, second = lines(stream)
    assert (first["event"], first["level"], first["logger"], first["sku"]) == ("boom", "error", "shop", "A-1")
    assert (first["event_"], first["level_"], first["logger_"]) == ("click", "gold", "password=***")
    for line in (first, second):
        assert line["timestamp"].startswith("20")
        assert line["timestamp_"] == "password=***"


def test_fields_of_the_users_called_like_ids_hide_what_is_secret() -> None:
    """`step`, `activity` and `worker` are words of others as well. The ids themselves stay what they are."""
    stream = io.StringIO()
    configured(stream)
    token = CURRENT.set({"workflow_id": "token=mine", "step": "reserve"})
    logging.getLogger("shop").info(
        "told",
        extra={"step": "with password=hunter2", "worker": {"password": "hunter2", "more": "x" * 50_000}},
    )
    structlog.get_logger("shop").info("told", activity="token=hunter2")
    CURRENT.reset(token)
    told, other = lines(stream)
    assert (told["step"], other["activity"]) == ("with password=***", "token=***")
    assert told["workflow_id"] == other["workflow_id"] == "token=mine"
    assert "hunter2" not in stream.getvalue()
    assert len(stream.getvalue()) < 20_000


def test_a_value_of_many_parts_is_bounded() -> None:
    """A line stays a line, whatever is logged with it: one of 10 MB puts a whole log file aside."""
    stream = io.StringIO()
    observer = configured(stream)
    logging.getLogger("shop").info("rows", extra={"rows": [{"sku": "A-1"}] * 100_000, "few": [1, 2]})
    observer.observe(step_event(more={"rows": ["x" * 1000] * 1000}))
    assert lines(stream)[0]["few"] == [1, 2]
    for line in lines(stream):
        assert len(line["rows"]) == 16_003


def test_the_end_of_a_long_traceback_is_kept() -> None:
    """What went wrong is told there."""
    stream = io.StringIO()
    configured(stream)
    try:
        raise ValueError("x" * 20_000)
    except ValueError:
        try:
            raise RuntimeError("the last straw")
        except RuntimeError:
            logging.getLogger("shop").exception("no")
    (line,) = lines(stream)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("RuntimeError: the last straw")
    assert len(line["exception"]) <= 16_010


def test_configuring_again_replaces_what_was_there() -> None:
    """One line stays one line, however often logging is configured."""
    first, second = io.StringIO(), io.StringIO()
    configured(first)
    configure(stream=second)
    logging.getLogger("shop").warning("once")
    assert (len(lines(first)), len(lines(second))) == (0, 1)


@pytest.mark.parametrize(("level", "heard"), [("info", False), ("debug", True)])
def test_what_paigeant_tells_itself_no_library_tells_again(level: str, heard: bool) -> None:
    """But where everything is wanted. Other libraries are heard as ever."""
    stream = io.StringIO()
    logging.getLogger().handlers.clear()
    configure(level=level, stream=stream)
    logging.getLogger("aiormq.connection").error("error when creating transport")
    logging.getLogger("another.library").warning("something else")
    assert ("creating transport" in stream.getvalue()) is heard
    assert "something else" in stream.getvalue()


def test_handlers_of_the_application_stay() -> None:
    """Where the application has set up logging, its lines go where it said, and only ours come here."""
    theirs, ours = io.StringIO(), io.StringIO()
    logging.getLogger().handlers[:] = [logging.StreamHandler(theirs)]
    configure(stream=ours)
    logging.getLogger("shop").warning("theirs")
    logging.getLogger("paigeant.worker").warning("ours")
    assert (theirs.getvalue(), [line["event"] for line in lines(ours)]) == ("theirs\n", ["ours"])


def test_an_application_that_configures_logging_does_not_silence_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`dictConfig` disables by default each logger that is there, and leaves its text in each record."""
    log = logging.getLogger("paigeant.worker")
    logging.config.dictConfig(
        {
            "version": 1,
            "formatters": {"f": {"format": "%(asctime)s %(message)s"}},
            "handlers": {"theirs": {"class": "logging.StreamHandler", "formatter": "f"}},
            "root": {"handlers": ["theirs"]},
        }
    )
    stream = io.StringIO()
    configure(stream=stream)
    log.warning("worker.serving")
    logging.getLogger().addHandler(LogHandler([StreamLog(stream, least=0, format="json")]))
    logging.getLogger("made later").warning("taking %d", 3)
    ours, theirs = lines(stream)
    assert ours["event"] == "worker.serving"
    assert {**theirs, "timestamp": ""} == {
        "timestamp": "",
        "level": "warning",
        "event": "taking 3",
        "logger": "made later",
    }
    assert " taking 3\n" in capsys.readouterr().err


def test_what_another_handler_keeps_is_let_through() -> None:
    """Though the stream takes less of it; of others than Paigeant `debug` is only had where the stream takes it."""
    kept: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    stream = io.StringIO()
    logging.getLogger().handlers.clear()
    configure(stream=stream, level="warning", kept="debug")
    logging.getLogger().addHandler(Keeper())
    for name in ("shop", "paigeant.step"):
        logging.getLogger(name).debug("%s debug", name)
        logging.getLogger(name).info("%s info", name)
    structlog.get_logger("shop").info("structlog info")
    assert kept[:3] == ["shop info", "paigeant.step debug", "paigeant.step info"]
    assert len(kept) == 4
    assert stream.getvalue() == ""


def test_a_record_that_is_wrong_is_told_of_without_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Logging writes such a one raw to standard error, with all of its arguments."""
    stream = io.StringIO()
    configured(stream)
    log = logging.getLogger("mine")
    log.warning("of %s: %d", "password=hunter2", "token=hunter2", extra={"shelf": "B"})
    log.warning("unlike password=hunter2", "hunter2")
    wrong, other = lines(stream)
    assert wrong["event"].startswith("the line 'of %s: %d' of ")
    assert wrong["event"].endswith(" can't be made: TypeError")
    assert (wrong["level"], wrong["logger"], wrong["shelf"]) == ("warning", "mine", "B")
    assert "'unlike password=***'" in other["event"]
    assert "hunter2" not in stream.getvalue() + "".join(capsys.readouterr())


def test_warnings_and_ends_of_threads_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python writes them raw to standard error, in several lines and with the secrets in their texts."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    stream = io.StringIO()
    configured(stream)

    def fail() -> None:
        raise ValueError("password=hunter2")

    class Careless:
        def __del__(self) -> None:
            fail()

    with warnings.catch_warnings():
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.simplefilter("always")
        warnings.warn("token=hunter2 is old", stacklevel=1)
    thread = threading.Thread(target=fail, name="mine")
    thread.start()
    thread.join()
    Careless()
    warned, ended, ignored = lines(stream)
    assert "UserWarning: token=*** is old" in warned["event"]
    assert (ended["event"], ended["level"]) == ("the thread mine has ended with an error", "error")
    assert ended["exception"].endswith("ValueError: password=***")
    assert "Careless.__del__ was ignored" in ignored["event"]
    assert ignored["exception"].endswith("ValueError: password=***")
    assert "hunter2" not in stream.getvalue()


def test_an_unknown_level_is_refused() -> None:
    """A level that isn't one is an error that names what there is."""
    with pytest.raises(ConfigurationError, match="expected debug, info, warning or error"):
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


async def test_what_a_step_logs_has_its_ids_in_any_thread() -> None:
    """A thread of its own knows of no step, but the logger of the step does; what is said besides is there, too."""
    activity = ActivityRegistry()

    @activity.execute()
    async def pack(ctx: StepContext) -> None:
        thread = threading.Thread(target=ctx.log.info, args=("packing",), kwargs={"extra": {"sku": "A-1"}})
        thread.start()
        await asyncio.to_thread(thread.join)

    stream = io.StringIO()
    configured(stream)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("one", ["pack"]))
        await app.drain()
    (line,) = (line for line in lines(stream) if line["event"] == "packing")
    assert set(line) >= IDS
    assert (line["workflow_id"], line["step"], line["sku"]) == (run.id, "pack", "A-1")


async def test_a_step_may_say_fields_by_keyword() -> None:
    """As with structlog, whatever they are called; logging's own keywords mean what they do there."""
    activity = ActivityRegistry()

    @activity.execute()
    async def pack(ctx: StepContext) -> None:
        ctx.log.info("packing %s", "soon", sku="A-1", name="box", process=7, password="pass1", event="click")
        try:
            raise ValueError("no box")
        except ValueError:
            ctx.log.exception("failed", sku="A-2", extra={"shelf": 3})

    stream = io.StringIO()
    configured(stream)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("one", ["pack"]))
        await app.drain()
        assert (await run.wait()).status == "completed"
    first, second = (line for line in lines(stream) if line.get("logger") == "paigeant.step")
    assert (first["event"], first["sku"], first["name"], first["process"]) == (
        "packing soon",
        "A-1",
        "box",
        7,
    )
    assert (first["password"], first["event_"]) == ("***", "click")
    assert (second["event"], second["sku"], second["shelf"]) == ("failed", "A-2", 3)
    assert second["exception"].endswith("ValueError: no box")
    for line in (first, second):
        assert (line["workflow_id"], line["step"], line["attempt"]) == (run.id, "pack", 1)


@pytest.fixture
def with_correlation_ids() -> Iterator[None]:
    """Records that have a `correlation_id` from the beginning, as many applications make them."""
    before = logging.getLogRecordFactory()

    def made(*given: Any, **more: Any) -> logging.LogRecord:
        record = before(*given, **more)
        record.correlation_id = "theirs"
        return record

    logging.setLogRecordFactory(made)
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.usefixtures("with_correlation_ids")
async def test_records_may_have_ids_of_their_own() -> None:
    """logging lets nobody set what a record has already: to log would fail the step, and how it failed be lost."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def pack(ctx: StepContext) -> None:
        ctx.log.info("packing")
        raise RuntimeError("no box")

    stream = io.StringIO()
    configured(stream)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("one", ["pack"]))
        await app.drain()
        assert (await run.wait()).error == "pack: RuntimeError: no box"
    told = [line for line in lines(stream) if line["event"] in ("packing", "attempt failed")]
    assert [(line["step"], line["correlation_id"]) for line in told] == [("pack", "theirs")] * 2


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


async def tracebacks(activity: ActivityRegistry, steps: list[str]) -> str:
    """What is logged of the one attempt that fails, with the names of files and functions."""
    stream = io.StringIO()
    configured(stream)
    async with MemoryApp(activity) as app:
        await app.dispatch(Workflow("shop", steps))
        await app.drain()
    (line,) = [line for line in lines(stream) if line["event"] == "attempt failed"]
    return str(line["exception"])


def packs() -> str:
    """What activities call to fail."""
    raise RuntimeError("no box")


async def test_a_traceback_begins_in_the_activity() -> None:
    """How the worker got there is the same for all errors, and would only stand before what matters."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def pack() -> str:
        return packs()

    told = await tracebacks(activity, ["pack"])
    assert [line.rpartition(" ")[2] for line in told.splitlines() if "File" in line] == ["pack", "packs"]


async def test_a_traceback_begins_in_a_plain_function_as_well() -> None:
    """The thread that it is done in is of no interest either."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    def pack() -> str:
        return packs()

    told = await tracebacks(activity, ["pack"])
    assert [line.rpartition(" ")[2] for line in told.splitlines() if "File" in line] == ["pack", "packs"]


# -- lines of events


def test_the_ids_of_an_event_stand_as_lines_have_them() -> None:
    """Lines take them by their place."""
    assert Event._fields[1:9] == IDS_IN_ORDER


@pytest.mark.parametrize(
    "event",
    [
        step_event(seconds=0.25),
        step_event(
            "step.failed", error='"quoted" \\ \u00fc\u2028\ud800', more={"delay": 1.5, "workflow_id": "other"}
        ),
        step_event(more={"waits_for": ["a", ("b", {"c": None})], "until": float("inf"), "n": float("nan")}),
        step_event(more={"token": "secret", "odd": object, "usage": {"requests": 3, "cost": "0.1"}}),
        Event("step.started", "\u00fc" * 500, "w" * 300, "s", "a", 1, "t", "c\n" * 200, "k"),
        Event("run.completed", "r", "w", trace_id="t"),
        Event("worker.stopped", worker="w\\1"),
        Event("delivery.rejected", error="Bearer abcdefghijkl", more={"reason": "signature"}),
    ],
)
def test_the_text_of_an_event_says_what_its_fields_do(event: Event) -> None:
    """It is JSON whatever is in it, and the same at a terminal as in a file."""
    members, fields = HEADS[event.name] + text_of(event, Redactor()), fields_of(event, Redactor())
    assert json.loads(f"{{{members[2:]}}}", parse_constant=None) == json.loads(json.dumps(fields))
    assert members.isascii()
    assert "NaN" not in members
    assert "secret" not in members
    assert "abcdefghijkl" not in members


class Counted(io.StringIO):
    """A stream that keeps what it is given in each call, and fails as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.is_broken = False

    def write(self, text: str) -> int:
        if self.is_broken:
            raise BrokenPipeError
        self.parts.append(text)
        return super().write(text)


async def test_events_of_one_turn_are_written_together() -> None:
    """In the order in which they were told, in writes that no other process can cut in two."""
    stream = Counted()
    observer = LogObserver(stream=stream)
    for number in range(100):
        observer.observe(step_event(more={"number": number}))
    assert stream.parts == []
    await asyncio.sleep(0)
    assert [line["number"] for line in lines(stream)] == list(range(100))
    assert 1 < len(stream.parts) < 15
    assert max(map(len, stream.parts)) <= 4096


async def test_what_cannot_wait_is_written_at_once_behind_what_waits() -> None:
    """Troubles, what is told in detail, and users' own lines: whatever comes next, a crash too, they are there."""
    stream = Counted()
    logging.getLogger().handlers.clear()
    observer = configure(stream=stream, level="debug")
    for name in ("step.failed", "step.started"):
        observer.observe(step_event("step.completed"))
        observer.observe(step_event(name))
        assert [line["event"] for line in lines(stream)][-2:] == ["step.completed", name]
    observer.observe(step_event("step.completed"))
    logging.getLogger("shop").info("sold")
    assert [line["event"] for line in lines(stream)][-2:] == ["step.completed", "sold"]


def test_a_loop_that_ends_before_its_turn_keeps_no_line_back() -> None:
    """The next loop writes it."""
    stream = Counted()
    observer = LogObserver(stream=stream)

    async def tell() -> None:
        observer.observe(step_event())

    loop = asyncio.new_event_loop()
    with contextlib.suppress(StopIteration):
        asyncio._set_running_loop(loop)
        try:
            tell().send(None)
        finally:
            asyncio._set_running_loop(None)
    loop.close()
    assert stream.parts == []
    asyncio.run(tell())
    assert len(lines(stream)) == 2


def test_lines_that_a_stream_does_not_take_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """No step fails for them; it is told once, and how many were lost when it goes on."""
    stream = Counted()
    observer = LogObserver(stream=stream)
    stream.is_broken = True
    for _ in range(3):
        observer.observe(step_event())
    stream.is_broken = False
    observer.observe(step_event())
    assert capsys.readouterr().err.count("can't write log lines") == 1
    assert [(line["event"], line.get("lines")) for line in lines(stream)] == [
        ("step.completed", None),
        ("log.lost", 3),
    ]


async def test_a_line_that_cannot_be_made_does_not_take_others_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is told which it was."""
    stream = Counted()
    observer = LogObserver(stream=stream)
    observer.observe(step_event())
    observer.observe(step_event(more=cast("Any", 5)))
    observer.observe(step_event())
    await asyncio.sleep(0)
    assert len(lines(stream)) == 2
    assert "the line of step.completed can't be made" in caplog.text


# -- files


def log_file(path: Path, **more: int) -> LogFile:
    """A file for lines of any level."""
    return LogFile(path, least=0, **{"most_bytes": 4096, "files": 3, **more})


def numbers(path: Path) -> list[int]:
    """The numbers in the lines of all files, the oldest file first."""
    files = sorted(path.parent.glob(f"{path.name}*"), key=lambda file: file.name, reverse=True)
    return [json.loads(line)["number"] for file in files for line in file.read_text().splitlines()]


def test_a_log_file_stays_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a process which changes its working directory, as an activity may."""
    monkeypatch.chdir(tmp_path)
    log = log_file(Path("a.log"))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    for number in range(100):
        log.write(20, {"event": "told", "number": number})
    log.close()
    assert list(elsewhere.iterdir()) == []
    assert numbers(tmp_path / "a.log")[-1] == 99


def test_long_lines_of_processes_on_one_pipe_stay_whole() -> None:
    """A pipe takes 4096 bytes in one piece; a traceback of several workers at once is longer."""
    code = """if True:
        import sys
        from paigeant.observers.logs import LogObserver
        log = LogObserver(shared=True).destinations[0]
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(100):
            log.write(20, {"event": "told", "text": sys.argv[1] * 15_000})
    """
    there, here = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, name], stderr=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in "abcd"
    ]
    os.close(here)
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    with os.fdopen(there, "rb") as pipe:
        told = [json.loads(line)["text"] for line in pipe]
    assert sorted(told) == sorted(name * 15_000 for name in "abcd" for _ in range(100))
    assert [process.wait() for process in processes] == [0, 0, 0, 0]


def test_a_file_that_is_full_is_put_aside(tmp_path: Path) -> None:
    """So many files are kept, none larger than it may be, with the newest lines."""
    path = tmp_path / "x.log"
    file = log_file(path)
    for number in range(500):
        file.write(20, {"level": "info", "event": "told", "number": number})
    file.close()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2"]
    assert max(found.stat().st_size for found in tmp_path.iterdir()) <= 4096
    kept = numbers(path)
    assert kept == list(range(500))[-len(kept) :]


def test_a_process_that_was_forked_off_writes_its_own_lines(tmp_path: Path) -> None:
    """Not those that its parent is about to write, and it waits for no lock of a thread that it doesn't have."""
    code = """
import asyncio, io, logging, os, signal, sys, threading, warnings
from paigeant.observer import Event
from paigeant.observers.logs import LogFile, configure

warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads, in a line that would wait, too
parent, is_writing, may_go = os.getpid(), threading.Event(), threading.Event()

class Slow(io.StringIO):
    def write(self, text):
        if "slow" in text and os.getpid() == parent:
            is_writing.set()
            may_go.wait()
        return sys.stderr.write(text)

file = LogFile(sys.argv[1], least=20, most_bytes=10**6, files=2)
observer = configure(stream=Slow(), also=[file])
log = logging.getLogger("mine")

async def main():
    thread = threading.Thread(target=log.warning, args=("slow",))
    thread.start()
    is_writing.wait()
    observer.observe(Event("step.completed", "r"))
    child = os.fork()
    if not child:
        signal.alarm(10)
        log.warning("child")
        os._exit(0)
    os.waitpid(child, 0)
    may_go.set()
    thread.join()

asyncio.run(main())
"""
    path = tmp_path / "log.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    for said in (done.stderr, path.read_text()):
        events = [json.loads(line)["event"] for line in said.splitlines() if line.startswith("{")]
        assert sorted(events) == ["child", "slow", "step.completed"]


def test_a_process_that_was_forked_off_opens_the_file_anew(tmp_path: Path) -> None:
    """A lock is that of an opening: with the same one both might put the file aside, and lines be gone too soon."""
    log = log_file(tmp_path / "log.json")
    child = os.fork()
    if not child:
        os._exit(log._file is not None)
    assert os.waitpid(child, 0) == (child, 0)
    log.close()


def test_several_may_share_a_file(tmp_path: Path) -> None:
    """Whoever puts it aside, each line is there once and whole."""
    path = tmp_path / "x.log"
    files = [log_file(path, files=100) for _ in range(3)]

    def write(writer: int) -> None:
        for number in range(100):
            files[writer].write(20, {"event": "told", "number": writer * 100 + number})

    threads = [threading.Thread(target=write, args=[writer]) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files:
        file.close()
    assert sorted(numbers(path)) == list(range(300))


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    """As tools that rotate logs do."""
    path = tmp_path / "x.log"
    file = log_file(path)
    file.write(20, {"event": "told", "number": 1})
    path.rename(tmp_path / "moved")
    file.write(20, {"event": "told", "number": 2})
    file.close()
    assert numbers(path) == [2]


def test_lines_that_cannot_be_written_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is gone is told of once, and how many lines were lost once it is back."""
    folder = tmp_path / "logs"
    folder.mkdir()
    file = log_file(folder / "x.log")
    folder.rename(tmp_path / "away")
    for number in range(3):
        file.write(20, {"event": "told", "number": number})
    folder.mkdir()
    file.write(20, {"event": "told", "number": 3})
    file.close()
    assert capsys.readouterr().err.count("can't write the log file") == 1
    lost = [json.loads(line).get("lines") for line in (folder / "x.log").read_text().splitlines()]
    assert lost == [None, 3]


def test_a_full_disk_takes_no_line_with_it_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends within a line as a rule; what is written once there is space again begins a line of its own."""
    room = 60
    real = os.write

    def write(file: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, data[:room])
        room -= written
        return written

    log = LogFile(tmp_path / "a.log", least=logging.INFO, most_bytes=10_000, files=2)
    monkeypatch.setattr(os, "write", write)
    for number in range(3):
        log.write(logging.INFO, {"event": "told", "number": number})
    room = 10_000
    for number in range(3, 5):
        log.write(logging.INFO, {"event": "told", "number": number})
    log.close()
    torn, *whole = (tmp_path / "a.log").read_text().splitlines()
    assert len(torn) == 60
    told = [json.loads(line) for line in whole]
    assert [line.get("number", line.get("lines")) for line in told] == [3, 3, 4]
    assert "No space left" in capsys.readouterr().err


def test_a_file_in_no_folder_is_a_mistake(tmp_path: Path) -> None:
    """It is told at once."""
    with pytest.raises(ConfigurationError, match="can't write the log file"):
        log_file(tmp_path / "nowhere" / "x.log")


def test_each_destination_gets_a_record_once(tmp_path: Path) -> None:
    """Though a record comes by two handlers, and with the level that the destination takes."""
    stream, path = io.StringIO(), tmp_path / "x.log"
    logging.getLogger().handlers.clear()
    file = LogFile(path, least=logging.WARNING, most_bytes=4096, files=2)
    configure(stream=stream, also=[file])
    logging.getLogger("shop").addHandler(LogHandler([file]))
    logging.getLogger("shop").warning("loud")
    logging.getLogger("shop").info("soft")
    logging.getLogger("shop").handlers.clear()
    file.close()
    assert [line["event"] for line in lines(stream)] == ["loud", "soft"]
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["loud"]


def test_events_that_nobody_wants_are_not_made() -> None:
    """What all observers want together is known before an event is made."""
    warnings = LogObserver(level="warning", stream=io.StringIO())
    assert not Observers([warnings]).want("step.started")
    assert Observers([warnings]).want("step.failed")
    assert not Observers([]).want("step.failed")


@pytest.mark.parametrize(
    ("environ", "is_coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_has_colours_unless_its_user_wants_none(
    environ: dict[str, str], is_coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR is a setting of the user's for all programs, and a dumb terminal would show the codes."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    StreamLog(stream, least=0, format="console").write(20, {"level": "info", "event": "told"})
    assert ("\x1b" in stream.getvalue()) is is_coloured


@pytest.mark.parametrize("name", ["event", "text", "exception"])
def test_no_text_passes_for_a_line_at_the_terminal(name: str) -> None:
    """Line breaks and control characters are written out, and a traceback is indented."""
    stream = io.StringIO()
    fields = {"event": "told", name: "one\n12:00:00 \x1b[31mtwo\u202e"}
    StreamLog(stream, least=0, format="console").write(20, {"level": "info", **fields})
    text = stream.getvalue()
    assert "\x1b[31m" not in text
    assert "\u202e" not in text
    assert [line for line in text.splitlines()[1:] if not line.startswith("    ")] == []
