"""Spans of runs: how they hang together, what is current while an activity runs, and what is in none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from paigeant import ActivityRegistry, StepContext, WaitFor, Workflow
from paigeant.observer import Event, Observers, Work
from paigeant.observers.otlp import QuickProvider, WholeTraces
from paigeant.observers.traces import TraceObserver
from paigeant.testing import MemoryApp

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Spans:
    """A provider of its own, and what it was told. `is_quick`: the spans of runs are made as `paigeant run` does."""

    def __init__(self, *, is_quick: bool = False) -> None:
        self._exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(self._exporter)
        self.provider = TracerProvider()
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

    spans = Spans(is_quick=True)
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
    monkeypatch.setattr("paigeant.observers.otlp._MOST_HELD", 3)
    kept = Kept()
    whole = WholeTraces(kept)
    for _ in range(5):
        whole.export(nested()[1:2])
    assert kept.names == ["b", "b"]
