"""Spans of runs: how they hang together, what is current while an activity runs, and what is in none of them."""

from __future__ import annotations

import contextlib
import contextvars
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    AlwaysRecordSampler,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, StepContext, WaitFor, Workflow
from paigeant.observer import Event, Observers, Work
from paigeant.observers.otlp import QuickProvider, RedactedSpans, SpanQueue, WholeTraces
from paigeant.observers.otlp.spans import OwnIds
from paigeant.observers.otlp.written import together
from paigeant.observers.traces import TraceObserver, remote
from paigeant.redaction import Redactor
from paigeant.testing import MemoryApp

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Spans:
    """A provider of its own, and what it was told. `is_quick`: the spans of runs are made as `paigeant run` does."""

    def __init__(self, *, is_quick: bool = False, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(self._exporter)
        self.provider = TracerProvider(sampler)
        self.provider.add_span_processor(processor)
        self.observer = TraceObserver(QuickProvider(self.provider, processor) if is_quick else self.provider)

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def __getitem__(self, name: str) -> ReadableSpan:
        [found] = [span for span in self.all if span.name == name]
        return found

    def parent(self, name: str) -> str:
        """The name of the span that another one is under; its id where that isn't here."""
        above = self[name].parent
        assert above is not None
        return next(
            (span.name for span in self.all if span.context.span_id == above.span_id), f"{above.span_id:x}"
        )


class Seen:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def observe(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture(params=["library", "quick"])
def spans(request: pytest.FixtureRequest) -> Spans:
    """Spans, made in both ways."""
    return Spans(is_quick=request.param == "quick")


def activities() -> ActivityRegistry:
    """Two activities that make a span of their own; one fails."""
    activity = ActivityRegistry()

    @activity.execute(topic="shelf")
    async def pick(ctx: StepContext, secret: str) -> str:
        with trace.get_tracer("mine", tracer_provider=spans_of(ctx)).start_as_current_span("inside pick"):
            return secret

    @activity.compensate("pick")
    async def put_back(output: str) -> None:
        pass

    @activity.execute(retries=0)
    def fail(ctx: StepContext, secret: str) -> None:
        with trace.get_tracer("mine", tracer_provider=spans_of(ctx)).start_as_current_span("inside fail"):
            raise ValueError(secret)

    return activity


PROVIDERS: dict[str, TracerProvider] = {}


def spans_of(ctx: StepContext) -> TracerProvider:
    """The provider of the test whose run this is."""
    return PROVIDERS[ctx.workflow_id]


async def done(spans: Spans, *steps: str, observers: Sequence[Any] = (), **more: Any) -> str:
    """Do a run of these steps; gives the trace id that is recorded of it."""
    PROVIDERS["r"] = spans.provider
    async with MemoryApp(activities(), observers=[*observers, spans.observer]) as app:
        run = await app.dispatch(Workflow("w", steps), {"secret": "canary"}, workflow_id="r", **more)
        await app.drain()
        return (await run.detail()).run.trace_id


async def test_a_run_is_one_trace(spans: Spans) -> None:
    """Its trace id is the recorded one, and every span of ours is right under the dispatch."""
    trace_id = await done(spans, "pick", "fail")
    ours = [span for span in spans.all if not span.name.startswith("inside")]
    assert {f"{span.context.trace_id:032x}" for span in spans.all} == {trace_id}
    assert [span.name for span in ours] == [
        "dispatch w",
        "receive shelf",
        "step pick",
        "step fail",
        "undo pick",
        "run.compensated",
    ]
    assert {spans.parent(span.name) for span in ours[1:]} == {"dispatch w"}
    assert spans["dispatch w"].parent is None


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_run_that_ends_without_a_step_has_its_end(spans: Spans, how: str) -> None:
    """A run with nothing to undo that an operator cancels, or a sweep ends at its deadline, has a span of that end."""
    seen = Seen()
    async with MemoryApp(activities(), observers=[spans.observer, seen]) as app:
        workflow = Workflow("w", [WaitFor("go"), "pick"])
        run = await app.dispatch(workflow, {"secret": "s"}, deadline=60, correlation_id="c")
        await app.drain()
        if how == "cancel":
            await run.cancel("no more")
        else:
            app.clock.advance(61)
        await app.drain()
        status = await run.status()
        detail = await run.detail()
    assert status == ("cancelled" if how == "cancel" else "failed")
    end = f"run.{status}"
    assert spans.parent(end) == "dispatch w"
    assert f"{spans[end].context.trace_id:032x}" == detail.run.trace_id
    assert dict(spans[end].attributes or {}) == {
        "paigeant.workflow_id": run.id,
        "paigeant.run.status": str(status),
    }
    [told] = [event for event in seen.events if event.name == end]
    assert (told.workflow, told.trace_id, told.correlation_id) == ("w", detail.run.trace_id, "c")


async def test_what_an_activity_makes_is_under_its_step(spans: Spans) -> None:
    """The step's span is the current one in coroutines, and in functions that run in threads."""
    await done(spans, "pick", "fail")
    assert (spans.parent("inside pick"), spans.parent("inside fail")) == ("step pick", "step fail")


async def test_the_callers_trace_goes_on(spans: Spans) -> None:
    """A traceparent that a dispatch is given is the parent of its span."""
    assert await done(spans, "pick", headers={"traceparent": CALLER}) == CALLER.split("-")[1]
    assert spans.parent("dispatch w") == CALLER.split("-")[2]


STATE = "rojo=00f067aa0ba902b7,tenant@congo=t61rcWkgMzE"


@pytest.mark.parametrize("is_current", [True, False], ids=["current span", "headers"])
async def test_the_callers_tracestate_comes_out_at_all_spans(spans: Spans, is_current: bool) -> None:
    """What vendors add to a trace goes through all processes with it, and on into what an activity calls."""
    headers = {"traceparent": CALLER, "tracestate": STATE}
    seen = Seen()
    if is_current:
        token = context.attach(remote(CALLER, STATE) or context.Context())
        try:
            await done(spans, "pick", "fail", observers=[seen])
        finally:
            context.detach(token)
    else:
        await done(spans, "pick", "fail", observers=[seen], headers=headers)
    states = {span.name: span.context.trace_state.to_header() for span in spans.all}
    assert {"dispatch w", "receive shelf", "step pick", "inside pick", "undo pick", "run.compensated"} <= set(
        states
    )
    assert set(states.values()) == {STATE}
    told = {event.tracestate for event in seen.events if event.traceparent}
    assert told == {STATE}


@pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "not traced"])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (STATE, STATE),
        (" rojo=1 ,, b=2 ,", "rojo=1,b=2"),
        ("", None),
        ("no state", None),
        ("a=1,a=2", None),
        ("A=1", None),
        ("a=b=c", None),
        ("a=b ,c=é", None),
        (",".join(f"k{n}=v" for n in range(33)), None),
        (",".join(f"k{n}=v" for n in range(32)), ",".join(f"k{n}=v" for n in range(32))),
        (f"a=1,long={'x' * 200},b={'y' * 256},c=3,d={'z' * 120}", f"a=1,long={'x' * 200},c=3,d={'z' * 120}"),
        (
            ",".join(f"k{n:02}={'v' * 100}" for n in range(9)),
            ",".join(f"k{n:02}={'v' * 100}" for n in range(4)),
        ),
        (f"a={'x' * 257}", None),
    ],
)
async def test_only_a_tracestate_is_taken_for_one(given: str, taken: str | None, is_traced: bool) -> None:
    """In whole entries, of which 512 characters travel; what the standard forbids is left out."""
    spans = Spans()
    observers = [spans.observer] if is_traced else []
    async with MemoryApp(ActivityRegistry(), observers=observers) as app:
        headers = {"traceparent": CALLER, "tracestate": given}
        run = await app.dispatch(Workflow("w", ["pick"]), {}, headers=headers)
        record = (await app.store.load_run(run.id)).run
    assert record.headers.get("tracestate") == taken
    assert record.trace_id == CALLER.split("-")[1]


async def test_a_tracestate_without_its_trace_goes_nowhere() -> None:
    """It is about a trace of which nothing is known."""
    async with MemoryApp(ActivityRegistry()) as app:
        headers = {"traceparent": "none", "tracestate": STATE}
        run = await app.dispatch(Workflow("w", ["pick"]), {}, headers=headers)
        assert "tracestate" not in (await app.store.load_run(run.id)).run.headers


@pytest.mark.parametrize("is_traced", [True, False], ids=["traced", "not traced"])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (CALLER.upper(), True),
        (f"01{CALLER[2:]}-more", True),
        (f"ff{CALLER[2:]}", False),
        (f"{CALLER}-more", False),
        (f"00-{'z' * 32}-00f067aa0ba902b7-01", False),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", False),
        (f"00-{CALLER[3:35]}-{'0' * 16}-01", False),
        (f"00-{CALLER[3:35]}-1-01", False),
        ("no trace at all", False),
    ],
)
async def test_only_a_traceparent_is_taken_for_one(given: str, taken: bool, is_traced: bool) -> None:
    """A caller may hand on what a request had. What the standard forbids begins a new trace, with an id of its own."""
    spans = Spans()
    observers = [spans.observer] if is_traced else []
    async with MemoryApp(ActivityRegistry(), observers=observers) as app:
        run = await app.dispatch(Workflow("w", ["pick"]), {}, headers={"traceparent": given})
        record = (await app.store.load_run(run.id)).run
    _, trace_id, _, flags = record.headers["traceparent"].split("-")
    assert record.trace_id == trace_id
    assert (trace_id == CALLER.split("-")[1]) == taken
    assert re.fullmatch("[0-9a-f]{32}", trace_id)
    assert int(trace_id, 16)
    assert int(flags, 16) & 1


async def test_the_current_span_of_the_caller_is_the_parent(spans: Spans) -> None:
    """Without a traceparent a dispatch belongs to what its caller is in the middle of."""
    with trace.get_tracer("mine", tracer_provider=spans.provider).start_as_current_span("request"):
        await done(spans, "pick")
    assert spans.parent("dispatch w") == "request"


async def test_no_value_is_in_a_span(spans: Spans) -> None:
    """Neither input, output nor the text of an error; a failed attempt tells the error's class."""
    await done(spans, "pick", "fail")
    ours = [span for span in spans.all if not span.name.startswith("inside")]
    assert "canary" not in "".join(span.to_json() for span in ours)
    failed = spans["step fail"]
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "ValueError"
    assert spans["step pick"].status.status_code is trace.StatusCode.UNSET


async def test_a_message_is_described_by_the_conventions(spans: Spans) -> None:
    """Spans about a message have kind, system, operation and destination; a step that needed none has none of it."""
    await done(spans, "pick", "fail")
    expected = {
        "dispatch w": (trace.SpanKind.PRODUCER, "send", "shelf"),
        "receive shelf": (trace.SpanKind.CONSUMER, "receive", "shelf"),
        "step pick": (trace.SpanKind.CONSUMER, "process", "shelf"),
        "step fail": (trace.SpanKind.INTERNAL, None, None),
    }
    for name, (kind, operation, topic) in expected.items():
        attributes = spans[name].attributes or {}
        assert spans[name].kind is kind
        assert attributes.get("messaging.operation.type") == operation
        assert attributes.get("messaging.destination.name") == topic


def test_a_quick_span_is_like_any_other() -> None:
    """What finds it as the current one may tell it all that a span can be told; once it has ended, no more."""

    def told(span: trace.Span) -> None:
        span.set_attributes({"one": 1, "list": ["a", 2]})
        span.set_attribute("odd", object)  # type: ignore[arg-type]
        span.add_event("moment", {"at": "noon"})
        span.record_exception(ValueError("no"))
        span.add_link(trace.SpanContext(5, 6, is_remote=True))
        span.update_name("renamed")
        span.set_status(trace.StatusCode.OK)
        span.set_status(trace.StatusCode.ERROR, "too late")

    spans = Spans()
    tracer = spans.observer.tracer
    with tracer.start_as_current_span("outer") as outer, tracer.start_as_current_span("inner") as inner:
        assert inner.is_recording()
        told(inner)
    told(outer)
    outer.end()
    found = spans["renamed"]
    assert dict(found.attributes or {}) == {"one": 1, "list": ("a", 2), "odd": str(object)}
    assert [event.name for event in found.events] == ["moment", "exception"]
    assert (len(found.links), found.status.status_code) == (1, trace.StatusCode.OK)
    assert spans.parent("renamed") == "outer"
    assert not spans["outer"].attributes
    assert found.to_json()


@pytest.mark.parametrize("is_quick", [True, False])
async def test_a_trace_that_is_not_sampled_is_empty_and_goes_on(is_quick: bool) -> None:
    """No span of it is made, and its id is that of the run all the same."""
    spans = Spans(is_quick=is_quick)
    not_sampled = f"{CALLER[:-2]}00"
    assert await done(spans, "pick", "fail", headers={"traceparent": not_sampled}) == CALLER.split("-")[1]
    assert spans.all == []


SAMPLERS = {
    "default": None,
    "on": ALWAYS_ON,
    "off": ALWAYS_OFF,
    "half": TraceIdRatioBased(0.5),
    "half of roots": ParentBased(TraceIdRatioBased(0.5)),
    "never below a caller": ParentBased(ALWAYS_ON, remote_parent_sampled=ALWAYS_OFF),
    "always below a caller": ParentBased(ALWAYS_OFF, remote_parent_not_sampled=ALWAYS_ON),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("flags", ["00", "01", "02", "03"])
@pytest.mark.parametrize("trace", [CALLER.split("-")[1], "f" * 32])
def test_quick_spans_are_sampled_as_the_librarys(sampler: str, flags: str, trace: str) -> None:
    """By whatever sampler, below whatever is above; those that are have the same ids, flags and parent."""
    found = []
    for is_quick in (True, False):
        spans = Spans(is_quick=is_quick, sampler=SAMPLERS[sampler])
        span = spans.observer.tracer.start_span("s", remote(f"00-{trace}-{CALLER.split('-')[2]}-{flags}"))
        span.end()
        context = span.get_span_context()
        parents = [each.parent for each in spans.all]
        found.append(
            (context.trace_id, context.trace_flags, context.is_valid, context.is_remote and 0, parents)
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("sampler", ["default", "on", "off", "always below a caller"])
def test_quick_spans_of_a_new_trace_are_sampled_as_the_librarys(sampler: str) -> None:
    """There the sampler of roots decides."""
    found = []
    for is_quick in (True, False):
        spans = Spans(is_quick=is_quick, sampler=SAMPLERS[sampler])
        span = spans.observer.tracer.start_span("s")
        span.end()
        context = span.get_span_context()
        found.append((context.trace_flags, context.trace_state, context.is_valid, len(spans.all)))
        assert [each.context for each in spans.all] == [context] * len(spans.all)
    assert found[0] == found[1]


def test_quick_spans_have_ids_of_their_own() -> None:
    """Their own and those that the provider's generator makes."""
    spans = Spans()
    for _ in range(100):
        spans.observer.tracer.start_span("s", remote(CALLER)).end()
    assert len({span.context.span_id for span in spans.all}) == 100
    assert {f"{span.context.trace_id:x}" for span in spans.all} == {f"{int(CALLER.split('-')[1], 16):x}"}


class Broken:
    """An observer that fails in every way there is."""

    def observe(self, event: Event) -> None:
        raise RuntimeError

    def around(self, work: Work) -> Any:
        if work.kind == "dispatch":
            raise RuntimeError
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        raise RuntimeError


async def test_an_observer_that_fails_around_a_step_changes_nothing(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes its way, the other observers are told, and the log has the trouble."""
    await done(spans, "pick", observers=[Broken()])
    assert spans["run.completed"].status.status_code is trace.StatusCode.OK
    assert "observer failed around dispatch" in caplog.text
    assert "observer failed around do" in caplog.text


def test_nothing_is_described_where_nobody_is_around() -> None:
    """Observers that only want to be told cost no description of each work."""

    class Told:
        def observe(self, event: Event) -> None:
            pass

    assert not Observers([Told()]).surrounds
    assert Observers([Told(), Broken()]).surrounds


class Kept(SpanExporter):
    """An exporter that keeps the names of what it gets."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS


def nested() -> list[ReadableSpan]:
    """Spans in the order in which they end: c and b in a, which has a parent in another process; then late, in a."""
    found = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    tracer = provider.get_tracer("t")
    above = trace.set_span_in_context(
        trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(1)))
    )
    with tracer.start_as_current_span("a", context=above):
        with tracer.start_as_current_span("b"), tracer.start_as_current_span("c"):
            pass
        late = tracer.start_span("late")
    late.end()
    return list(found.get_finished_spans())


@pytest.mark.parametrize("together", [True, False])
def test_a_span_goes_out_behind_its_parent(together: bool) -> None:
    """Whatever batches they come in, and at once when that is gone already."""
    kept = Kept()
    whole = WholeTraces(kept)
    spans = nested()
    assert [span.name for span in spans] == ["c", "b", "a", "late"]
    for batch in [spans] if together else [[span] for span in spans]:
        whole.export(batch)
    assert kept.names == ["a", "b", "c", "late"]


def test_what_a_dead_process_left_open_keeps_its_inside_back() -> None:
    """Without the span of the step nothing of it is sent; what is left at an orderly end is."""
    kept = Kept()
    whole = WholeTraces(kept)
    whole.export(nested()[:2])
    assert kept.names == []
    whole.shutdown()
    assert sorted(kept.names) == ["b", "c"]


def test_spans_that_wait_for_their_parent_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the oldest go out without it."""
    monkeypatch.setattr("paigeant.observers.otlp.exporters._MOST_HELD", 3)
    kept = Kept()
    whole = WholeTraces(kept)
    for _ in range(5):
        whole.export(nested()[1:2])
    assert kept.names == ["b", "b"]


TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJjYW5hcnkifQ.Y2FuYXJ5"


def test_secrets_in_spans_are_hidden_on_their_way_out(spans: Spans) -> None:
    """In exceptions, statuses, names, attributes, events and links; all else of such a span is what it was."""
    tracer = spans.observer.tracer
    link = trace.Link(trace.SpanContext(1, 2, is_remote=True), {"url": "amqp://ada:canary-1@host/"})
    with (
        contextlib.suppress(RuntimeError),
        tracer.start_as_current_span(f"call {TOKEN}", kind=trace.SpanKind.CLIENT) as span,
    ):
        span.add_link(link.context, link.attributes)
        span.set_attributes({"x.password": "canary-2", "pin": 7, "api_key": 4111, "ratio": float("inf")})
        span.set_attribute("said", ["fine", f"Bearer {TOKEN}"])
        span.add_event("sent", {"body": '{"obo_token": "canary-3"}', "size": 3})
        span.add_event("known to the settings: hunter2hunter2")
        raise RuntimeError(f"401 for {TOKEN}")
    kept = InMemorySpanExporter()
    redactor = Redactor(["postgresql://ada:hunter2hunter2@host/db"])
    RedactedSpans(kept, redactor).export(spans.all)
    ([before], [after]) = (spans.all, kept.get_finished_spans())
    for text in (TOKEN, "canary-1", "canary-2", "canary-3", "4111", "hunter2hunter2"):
        assert text in before.to_json()
        assert text not in after.to_json()
    assert after.attributes == {
        "x.password": "***",
        "pin": 7,
        "api_key": "***",
        "ratio": float("inf"),
        "said": ["fine", "Bearer ***"],
    }
    assert after.name == "call ***"
    assert after.status.description == "RuntimeError: 401 for ***"
    [sent, _, failed] = after.events
    assert sent.attributes == {"body": '{"obo_token": ***}', "size": 3}
    assert failed.attributes is not None
    assert failed.attributes["exception.message"] == "401 for ***"
    assert "RuntimeError: 401 for ***" in str(failed.attributes["exception.stacktrace"])
    for same in ("context", "parent", "kind", "start_time", "end_time", "resource", "instrumentation_scope"):
        assert getattr(after, same) == getattr(before, same)


def test_a_text_that_is_no_unicode_takes_no_other_span_with_it(spans: Spans) -> None:
    """The name of a file may have any bytes, and stands in the status of whatever fails with it."""
    tracer = spans.observer.tracer
    tracer.start_span("fine").end()
    with contextlib.suppress(FileNotFoundError), tracer.start_as_current_span("read caf\udce9") as span:
        span.set_attribute("file", "caf\udce9")
        span.add_event("caf\udce9")
        raise FileNotFoundError("no file caf\udce9")
    named = tracer.start_span("step pick")
    named.update_name("wrote caf\udce9")
    named.end()
    kept = InMemorySpanExporter()
    RedactedSpans(kept).export(spans.all)
    assert kept.get_finished_spans()[0] is spans.all[0]
    sent = encode_spans(kept.get_finished_spans()).SerializeToString()
    for text in (
        rb"read caf\udce9",
        rb"FileNotFoundError: no file caf\udce9",
        rb"wrote caf\udce9",
        b"fine",
    ):
        assert text in sent


@pytest.mark.parametrize(
    "say",
    [
        lambda span: span.set_attribute("said", f"Bearer {TOKEN}"),
        lambda span: span.add_event("sent", {"said": f"Bearer {TOKEN}"}),
        lambda span: span.add_link(trace.SpanContext(1, 2, is_remote=True), {"said": f"Bearer {TOKEN}"}),
        lambda span: span.update_name(f"Bearer {TOKEN}"),
        lambda span: span.set_status(trace.StatusCode.ERROR, f"Bearer {TOKEN}"),
        lambda span: span.record_exception(RuntimeError(f"Bearer {TOKEN}")),
    ],
    ids=["attribute", "event", "link", "name", "status", "exception"],
)
def test_whatever_is_said_of_a_quick_span_later_is_looked_through(say: Callable[[trace.Span], None]) -> None:
    """By itself: one that is as it was made isn't looked through."""
    spans = Spans()
    span = spans.observer.tracer.start_span("step charge", attributes={"paigeant.step": "charge"})
    say(span)
    span.end()
    kept = InMemorySpanExporter()
    RedactedSpans(kept).export(spans.all)
    ([before], [after]) = (spans.all, kept.get_finished_spans())
    assert TOKEN in before.to_json()
    assert TOKEN not in after.to_json()


async def test_spans_of_runs_go_out_as_they_are(spans: Spans) -> None:
    """Ids and names are not looked through, and no copy is made of what hides nothing."""
    await done(spans, "pick")
    kept = InMemorySpanExporter()
    RedactedSpans(kept).export(spans.all)
    assert [id(span) for span in kept.get_finished_spans()] == [id(span) for span in spans.all]


class Unfailing(SpanProcessor):
    """A processor of spans that fails."""

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError


async def test_a_processor_that_fails_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The step has gone well, and the log has the trouble."""
    spans = Spans()
    spans.observer = TraceObserver(QuickProvider(spans.provider, Unfailing()))
    await done(spans, "pick")
    assert "a span can't be ended" in caplog.text


# -- the queue


class Gate(Kept):
    """An exporter that is held up until it may go on, and fails if it is to."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()
        self.fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.has_begun.set()
        assert self.may_go.wait(PATIENCE)
        if self.fails:
            raise RuntimeError
        return super().export(spans)


def queue(
    monkeypatch: pytest.MonkeyPatch, exporter: SpanExporter, **settings: str
) -> tuple[trace.Tracer, SpanQueue]:
    """A queue with these `OTEL_BSP_*` settings, and a tracer whose spans go there."""
    for name, value in settings.items():
        monkeypatch.setenv(f"OTEL_BSP_{name.upper()}", value)
    processor = SpanQueue(exporter)
    return TraceObserver(QuickProvider(TracerProvider(), processor)).tracer, processor


def test_all_that_has_ended_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills a batch by itself, all of it on demand, and the rest at the end; then nothing more."""
    exporter = Kept()
    tracer, spans = queue(monkeypatch, exporter, max_export_batch_size="10")
    for number in range(25):
        tracer.start_span(f"{number}").end()
    spans.force_flush()
    assert exporter.names == [f"{number}" for number in range(25)]
    tracer.start_span("last").end()
    spans.shutdown()
    spans.shutdown()
    tracer.start_span("late").end()
    assert exporter.names[25:] == ["last"]


def test_spans_are_exported_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few they are."""
    exporter = Gate()
    tracer, spans = queue(monkeypatch, exporter, schedule_delay="10")
    tracer.start_span("one").end()
    assert exporter.has_begun.wait(PATIENCE)
    spans.shutdown()
    assert exporter.names == ["one"]


def test_spans_beyond_the_bound_are_lost_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that ended first are kept; no step waits for an exporter."""
    exporter = Gate()
    exporter.may_go.clear()
    tracer, spans = queue(monkeypatch, exporter, max_queue_size="5", max_export_batch_size="1")
    tracer.start_span("first").end()
    assert exporter.has_begun.wait(PATIENCE)
    for number in range(8):
        tracer.start_span(f"{number}").end()
    assert spans.lost == 3
    exporter.may_go.set()
    spans.shutdown()
    assert exporter.names == ["first", "0", "1", "2", "3", "4"]
    assert caplog.text.count("3 spans were lost") == 1
    assert spans.lost == 3  # a counter never falls


@pytest.mark.parametrize("most", [65, 100, 500, 8192])
def test_no_span_is_lost_to_an_exporter_that_keeps_up(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """However many may wait: it is asked before what is written together finds no room."""
    exported = threading.Condition()
    written: list[int] = []

    class KeepsUp(InMemorySpanExporter):
        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            with exported:
                written.append(sum(each.many for each in spans))
                exported.notify()
            return SpanExportResult.SUCCESS

    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", f"{most}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    spans = SpanQueue(KeepsUp(), lambda spans: together(spans, lambda name: False))
    tracer = QuickProvider(TracerProvider(), spans).get_tracer("paigeant")
    pieces = -(-spans._many // 64)
    for turn in range(1, 6):
        for _ in range(64 * pieces):
            tracer.start_span("step").end()
        with exported:
            assert exported.wait_for(lambda turn=turn: sum(written) == 64 * pieces * turn, PATIENCE)  # type: ignore[misc]
    assert spans.lost == 0
    spans.shutdown()


def test_an_exporter_that_fails_is_told_of_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The spans of that time are lost, and counted."""
    exporter = Gate()
    tracer, spans = queue(monkeypatch, exporter)
    exporter.fails = True
    tracer.start_span("lost").end()
    spans.force_flush()
    exporter.fails = False
    tracer.start_span("kept").end()
    spans.shutdown()
    assert exporter.names == ["kept"]
    assert "spans can't be exported" in caplog.text
    assert "1 spans were lost" in caplog.text


def test_the_end_waits_once_for_a_collector_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not again for each batch, nor for spans that wait for their parent: a worker would be killed before its end."""
    tries: list[int] = []

    class Away(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            tries.append(len(spans))
            return SpanExportResult.FAILURE

    tracer, spans = queue(
        monkeypatch, WholeTraces(Away()), max_export_batch_size="10", schedule_delay="60000"
    )
    above = trace.set_span_in_context(tracer.start_span("never ends"))
    tracer.start_span("inside", above).end()
    monkeypatch.setattr(spans, "_batch", 100)  # nothing is sent before the end
    for number in range(50):
        tracer.start_span(f"{number}").end()
    monkeypatch.setattr(spans, "_batch", 10)
    spans.shutdown()
    assert tries == [9]
    assert "51 spans were lost" in caplog.text


def test_what_the_library_does_not_sample_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that are only recorded end here as well."""
    exporter = Kept()
    _, spans = queue(monkeypatch, exporter)
    for sampler in (AlwaysRecordSampler(ALWAYS_OFF), ALWAYS_ON):
        provider = TracerProvider(sampler)
        provider.add_span_processor(spans)
        provider.get_tracer("t").start_span(sampler.get_description()).end()
    spans.shutdown()
    assert exporter.names == ["AlwaysOnSampler"]


def test_ids_do_not_depend_on_the_seed_that_an_activity_sets() -> None:
    """Who trains or samples sets it, each time the same: of the spans of one run several would have one id."""
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider = TracerProvider(id_generator=OwnIds())
    provider.add_span_processor(processor)
    for of in (QuickProvider(provider, processor), provider):
        tracer = of.get_tracer("t")
        for _ in range(2):
            random.seed(7)
            above = tracer.start_span("above")
            tracer.start_span("below", trace.set_span_in_context(above)).end()
            above.end()
    contexts = [span.context for span in exporter.get_finished_spans()]
    assert len({context.span_id for context in contexts}) == 8
    assert len({context.trace_id for context in contexts}) == 4


async def test_the_traces_of_runs_do_not_depend_on_a_seed() -> None:
    """A program that sets it and then starts a run would have the next one in the same trace."""
    async with MemoryApp(ActivityRegistry()) as app:
        traces = set()
        for _ in range(2):
            random.seed(7)
            run = await app.dispatch(Workflow("w", ["elsewhere"]))
            traces.add((await run.detail()).run.trace_id)
    assert len(traces) == 2


def test_a_setting_that_is_none_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The default holds."""
    for many, never in (("many", "0"), ("9" * 20, "9" * 5000)):
        caplog.clear()
        exporter = Kept()
        tracer, spans = queue(monkeypatch, exporter, max_queue_size=many, schedule_delay=never)
        assert (spans._most, spans._delay) == (8192, 5.0)
        tracer.start_span("sent").end()
        spans.shutdown()
        assert exporter.names == ["sent"]
        assert caplog.text.count("expected a whole number above 0") == 2


def test_a_process_that_was_forked_off_exports_its_own() -> None:
    """And nothing of its parent's."""
    code = """
import os, sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry import trace
from paigeant.observers.otlp import QuickProvider, SpanQueue, WholeTraces
shown = ConsoleSpanExporter(formatter=lambda span: f"{os.getpid() == parent} {span.name}\\n")
spans = SpanQueue(WholeTraces(shown))
parent = os.getpid()
tracer = QuickProvider(TracerProvider(), spans).get_tracer("t")
above = trace.set_span_in_context(tracer.start_span("goes on"))
tracer.start_span("inside", above).end()
spans.force_flush()
tracer.start_span("before").end()
child = os.fork()
tracer.start_span("after").end()
spans.shutdown()
if child:
    os.waitpid(child, 0)
else:
    os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.splitlines()) == ["False after", "True after", "True before", "True inside"]


def test_a_span_ends_where_its_attempt_is_ended_in_another_context(spans: Spans) -> None:
    """As the garbage collector does with a coroutine that nobody goes on with; what is current there stays so."""
    around = spans.observer.around(Work("do", "r", "w", activity="pick", attempt=1))
    contextvars.copy_context().run(around.__enter__)
    around.__exit__(None, None, None)
    assert [span.name for span in spans.all] == ["step pick"]
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_secret_that_is_only_in_how_a_span_went_is_hidden(spans: Spans) -> None:
    """Nothing else tells that such a span is to be looked at."""
    span = spans.observer.tracer.start_span("step pick")
    span.set_status(trace.StatusCode.ERROR, f"401 for {TOKEN}")
    span.end()
    kept = InMemorySpanExporter()
    RedactedSpans(kept).export(spans.all)
    assert [span.status.description for span in kept.get_finished_spans()] == ["401 for ***"]


@pytest.mark.parametrize("when", ["before", "after", "without"])
def test_what_is_current_is_told_to_whoever_keeps_that(when: str) -> None:
    """Libraries put their own in the place of the library's keeper, to do something besides, before or after us."""
    code = f"""
from opentelemetry import context, trace
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext

told = []

class Own(ContextVarsRuntimeContext):
    def attach(self, context):
        told.append("attached")
        return super().attach(context)

    def detach(self, token):
        told.append("detached")
        super().detach(token)

if {when!r} == "before":
    context._RUNTIME_CONTEXT = Own()
from paigeant.observer import Work
from paigeant.observers.traces import TraceObserver
if {when!r} == "after":
    context._RUNTIME_CONTEXT = Own()
work = Work("do", "r", "w", activity="pick", traceparent=f"00-{{1:032x}}-{{2:016x}}-01")
with TraceObserver().around(work):
    assert trace.get_current_span().get_span_context().trace_id == 1
assert trace.get_current_span() is trace.INVALID_SPAN
print(*told)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ([] if when == "without" else ["attached", "detached"])


def test_a_traceparent_that_is_none_is_not_kept() -> None:
    """Who writes a message chooses how long it is, and what is known of others is kept in memory."""
    spans, before = Spans(), remote.cache_info().currsize
    for number in range(3):
        with spans.observer.around(Work("do", "r", "w", "s", "a", traceparent=f"{CALLER}{number}" * 100)):
            pass
    assert remote.cache_info().currsize == before
    assert [span.parent for span in spans.all] == [None] * 3
