"""Spans that are written as they end say what the library would have said of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from tests.integration.collector import Collector

from paigeant.observers.otlp import QuickProvider, to_collector
from paigeant.observers.otlp.spans import Described, QuickSpan
from paigeant.observers.otlp.written import OF_ONE, Sender, Written, together, written
from paigeant.observers.traces import Remote, remote

RESOURCE = Resource({"service.name": "shop", "service.instance.id": "ä"})
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
STATUSES = [Status(StatusCode.UNSET), Status(StatusCode.OK), Status(StatusCode.ERROR)]
CALLERS = [None, remote(CALLER), remote(CALLER[:-1] + "3"), remote(CALLER, "vendor=1,other=a:b")]


class Ended(SpanProcessor):
    """Keeps the spans that have ended."""

    def __init__(self) -> None:
        self.spans: list[QuickSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        assert isinstance(span, QuickSpan)
        self.spans.append(span)


def tracer_to(processor: SpanProcessor) -> Tracer:
    """A tracer of the spans of runs, which go there."""
    return QuickProvider(TracerProvider(resource=RESOURCE), processor).get_tracer("paigeant", "1.0")


def ended(
    above: Remote | None = None, attributes: Mapping[str, Any] | None = None, name: str = "step pack"
) -> QuickSpan:
    """A span of a run that has ended."""
    spans = Ended()
    tracer_to(spans).start_span(name, above, attributes=dict(attributes or {})).end()
    return spans.spans[0]


@given(
    st.sampled_from(CALLERS),
    TEXTS,
    st.sampled_from(SpanKind),
    st.sampled_from(STATUSES),
    st.builds(
        dict.__or__,
        st.dictionaries(TEXTS, TEXTS | st.integers(0, 2**63 - 1)),
        st.dictionaries(st.sampled_from(sorted(OF_ONE)), TEXTS),
    ),
    st.integers(0, 2**64 - 1),
)
def test_a_span_is_written_as_the_library_writes_it(
    above: Remote | None, name: str, kind: SpanKind, status: Status, attributes: dict[str, Any], began: int
) -> None:
    """Whatever it is called, of whatever kind, under whichever context, and however it went."""
    spans = Ended()
    span = tracer_to(spans).start_span(name, above, kind, attributes, start_time=began)
    span.set_status(status)
    span.end()
    found = written(spans.spans[0])
    assert found is not None
    [as_library] = encode_spans(spans.spans).resource_spans[0].scope_spans[0].spans
    assert list(ScopeSpans.FromString(found).spans) == [as_library]


def test_a_span_is_described_when_somebody_wants_to_know() -> None:
    """Which is when it is written, and then once."""
    asked: list[str] = []

    def tell(step: str) -> Described:
        asked.append(step)
        return f"step {step}", SpanKind.CONSUMER, {"paigeant.step": step}

    spans = Ended()
    tracer: Any = tracer_to(spans)
    with trace.use_span(tracer.start_told(tell, "pack", remote(CALLER)), end_on_exit=True):
        assert trace.get_current_span().is_recording()
    assert asked == []
    [span] = spans.spans
    assert (span.name, span.kind, dict(span.attributes or {})) == (
        "step pack",
        SpanKind.CONSUMER,
        {"paigeant.step": "pack"},
    )
    assert written(span) is not None
    assert asked == ["pack"]


def test_a_span_of_which_more_is_said_is_left_to_the_library() -> None:
    """And one that hangs under another of this process, which may not have ended."""
    spans = Ended()
    tracer = tracer_to(spans)

    def begun() -> Any:
        return tracer.start_span("step pack", remote(CALLER), attributes={})

    for say in (
        lambda span: span.set_attribute("cost", 1.5),
        lambda span: span.add_event("packed"),
        lambda span: span.record_exception(RuntimeError("no box")),
        lambda span: span.set_status(StatusCode.ERROR, "no box"),
    ):
        span = begun()
        say(span)
        span.end()
    above = begun()
    tracer.start_span("inside", trace.set_span_in_context(above), attributes={}).end()
    assert [written(span) for span in spans.spans] == [None] * 5


@pytest.mark.parametrize("value", ["half \ud800", -1, 2**63, 1.5, True, b"x", ("a", "b"), None])
def test_a_value_that_can_not_be_written_has_its_span_looked_at(value: Any) -> None:
    """As one is that an activity has said more of."""
    span = ended(remote(CALLER), {"paigeant.step": value})
    assert written(span) is None
    assert not span.is_as_made


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, which the environment names."""
    with Collector() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        yield server


def test_what_is_sent_is_what_the_library_sends(collector: Collector) -> None:
    """Also of whom it comes, and with spans that the library writes in the same batch."""
    kept = Ended()
    tracer = tracer_to(kept)
    for number in range(200):
        tracer.start_span("step pack", remote(CALLER), attributes={"paigeant.step": f"{number}"}).end()
    spans = kept.spans
    OTLPSpanExporter().export(spans)
    as_library, collector.spans = collector.spans, []
    ready = [each for part in (spans[:100], spans[100:150]) for each in together(part, lambda name: False)]
    Sender(RESOURCE).export([*spans[150:], *ready])
    assert collector.spans == as_library
    assert {span.service for span in collector.spans} == {"shop"}


def test_a_queue_writes_what_it_can_and_sends_it_all(collector: Collector) -> None:
    """Spans of steps, of what is within them, and those of which an activity has said more."""
    queue = to_collector(RESOURCE)
    provider = TracerProvider(resource=RESOURCE)
    provider.add_span_processor(queue)
    tracer = QuickProvider(provider, queue).get_tracer("paigeant")
    for number in range(150):
        step = tracer.start_span("step pack", remote(CALLER), attributes={"paigeant.step": f"{number}"})
        if number % 3 == 0:
            provider.get_tracer("agent").start_span("chat", trace.set_span_in_context(step)).end()
        if number % 5 == 0:
            step.set_attribute("password", "hunter2")
        step.end()
    queue.shutdown()
    steps = [span for span in collector.spans if span.name == "step pack"]
    assert sorted(int(span.attributes["paigeant.step"]) for span in steps) == list(range(150))
    assert {span.parent for span in collector.spans if span.name == "chat"} < {span.span_id for span in steps}
    assert b"hunter2" not in collector.bytes
    assert queue.lost == 0


def test_what_begins_under_a_step_that_has_ended_waits_for_nothing(collector: Collector) -> None:
    """As what an activity has left behind may do: of its step nobody had asked, and it may have been sent."""
    queue = to_collector(RESOURCE)
    provider = TracerProvider(resource=RESOURCE)
    provider.add_span_processor(queue)
    step = QuickProvider(provider, queue).get_tracer("paigeant").start_span("step pack", remote(CALLER))
    step.end()
    queue.force_flush()
    provider.get_tracer("left behind").start_span("chat", trace.set_span_in_context(step)).end()
    queue.force_flush()
    [sent, late] = collector.spans
    assert (sent.name, late.name, late.parent) == ("step pack", "chat", sent.span_id)
    queue.shutdown()


def test_batches_are_no_larger_than_the_environment_says(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of what is written nor of what isn't, nor of both."""
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "50")
    sizes: list[int] = []
    export = Sender.export

    def look(self: Sender, spans: Any) -> Any:
        sizes.append(sum(each.many if isinstance(each, Written) else 1 for each in spans))
        return export(self, spans)

    monkeypatch.setattr(Sender, "export", look)
    queue = to_collector(RESOURCE)
    for number in range(220):
        name = "step https://user:hunter2@host" if number % 3 == 0 else "step pack"
        tracer_to(queue).start_span(name, remote(CALLER), attributes={}).end()
    queue.shutdown()
    assert max(sizes) <= 50
    assert sum(sizes) == len(collector.spans) == 220


def test_spans_of_two_scopes_are_sent_each_as_of_its_own(collector: Collector) -> None:
    """Two applications of one process may send by one provider."""
    queue = to_collector(RESOURCE)
    provider = QuickProvider(TracerProvider(resource=RESOURCE), queue)
    one, other = provider.get_tracer("one"), provider.get_tracer("other")
    for _ in range(3):
        for tracer in (one, other):
            tracer.start_span("step pack", remote(CALLER), attributes={}).end()
    queue.shutdown()
    assert sorted(span.scope for span in collector.spans) == ["one"] * 3 + ["other"] * 3


def test_a_name_with_a_secret_is_sent_with_stars(collector: Collector) -> None:
    """It isn't written as it ends."""
    queue = to_collector(RESOURCE)
    tracer_to(queue).start_span("step https://user:hunter2@host", remote(CALLER), attributes={}).end()
    queue.shutdown()
    assert [span.name for span in collector.spans] == ["step https://user:***@host"]


@pytest.mark.parametrize(
    "misuse", [lambda span: span.end(1.5), lambda span: span.end(-1), lambda span: span.set_status("well")]
)
def test_a_span_that_nobody_can_write_keeps_no_other_from_being_sent(
    misuse: Callable[[Any], object], collector: Collector
) -> None:
    """An activity may do anything with that of its step: the thread that sends doesn't end by it."""
    queue = to_collector(RESOURCE)
    for number in range(3):
        span = tracer_to(queue).start_span("step pack", remote(CALLER), attributes={"number": number})
        if number == 1:
            misuse(span)
        span.end()
    queue.shutdown()
    assert [span.attributes["number"] for span in collector.spans] == [0, 2]


def test_spans_that_a_collector_refuses_are_lost_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """As those are that the library writes."""

    class Refusing(Collector):
        def serve(self, request: Any) -> None:
            request.body()
            request.reply(400)

    with Refusing() as server, pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        queue = to_collector(RESOURCE)
        for _ in range(3):
            tracer_to(queue).start_span("step pack", remote(CALLER), attributes={}).end()
        queue.shutdown()
    assert queue.lost == 3
    assert "3 spans were lost" in caplog.text


def test_a_library_that_takes_nothing_written_gets_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older ones have another way to send, which is their own."""
    monkeypatch.setattr(Sender, "takes_written", False)
    kept: list[object] = []
    export = Sender.export

    def look(self: Sender, spans: Any) -> Any:
        kept.extend(spans)
        return export(self, spans)

    monkeypatch.setattr(Sender, "export", look)
    queue = to_collector(RESOURCE)
    tracer_to(queue).start_span("step pack", remote(CALLER), attributes={}).end()
    queue.shutdown()
    assert not any(isinstance(span, Written) for span in kept)
    assert [span.name for span in collector.spans] == ["step pack"]


def test_the_library_that_is_installed_takes_what_is_written() -> None:
    """Else all would be slower, and nothing would say so."""
    assert Sender(RESOURCE).takes_written
