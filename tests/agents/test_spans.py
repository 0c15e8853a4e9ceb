"""Late spans: they are what other spans are, but begin no sooner than something comes of them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan

from paigeant.agents.spans import LateTracer, tell_unit


class Noted(SpanProcessor):
    """Keeps spans as they begin and as they end."""

    def __init__(self) -> None:
        self.began: list[SdkSpan] = []
        self.ended: list[ReadableSpan] = []
        self.current: list[trace.SpanContext] = []

    def on_start(self, span: SdkSpan, parent_context: Any = None) -> None:
        self.began.append(span)
        self.current.append(trace.get_current_span().get_span_context())

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)


@pytest.fixture
def noted() -> Noted:
    """What has come of the spans of `tracer`."""
    return Noted()


@pytest.fixture
def tracer(noted: Noted) -> trace.Tracer:
    """A tracer of the SDK."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(noted)
    return provider.get_tracer("test")


@pytest.fixture
def late(tracer: trace.Tracer) -> LateTracer:
    """The same where everything may be a replay."""
    return LateTracer(tracer, lambda: True)


@pytest.mark.parametrize("begins", ["at its end", "before anything is said of it", "in between"])
def test_a_late_span_ends_as_any_other(
    begins: str, noted: Noted, tracer: trace.Tracer, late: LateTracer
) -> None:
    """With all that was said of it, before it began and after."""
    link = trace.SpanContext(1, 2, is_remote=True)
    for maker in (tracer, late):
        span = maker.start_span("one", kind=trace.SpanKind.CLIENT, attributes={"a": 1}, start_time=5)
        if begins == "before anything is said of it":
            span.get_span_context()
        span.update_name("two")
        span.set_attribute("b", 2)
        if begins == "in between":
            span.get_span_context()
        span.set_attributes({"a": 3, "c": 4})
        span.add_event("seen", {"d": 5}, timestamp=6)
        span.add_link(link, {"e": 6})
        span.record_exception(ValueError("no"), timestamp=7)
        span.set_status(trace.StatusCode.ERROR, "no")
        assert span.is_recording()
        assert span.attributes == {"a": 3, "b": 2, "c": 4}  # type: ignore[attr-defined]  # as those of the SDK have
        span.end(8)
        assert not span.is_recording()
    first, second = noted.ended
    assert first.attributes == second.attributes
    for same in ("name", "kind", "start_time", "end_time", "parent"):
        assert getattr(first, same) == getattr(second, same)
    assert (second.status.status_code, second.status.description) == (trace.StatusCode.ERROR, "no")
    assert [(event.name, event.timestamp) for event in second.events] == [("seen", 6), ("exception", 7)]
    assert [link.context for link in second.links] == [link]


def test_moments_are_those_at_which_they_were_told(noted: Noted, late: LateTracer) -> None:
    """Not the one at which the span began after all."""
    span = late.start_span("one")
    span.add_event("first")
    span.record_exception(ValueError("then"))
    told = time.time_ns()
    span.end()
    [ended] = noted.ended
    assert ended.start_time is not None
    assert max(ended.start_time, *(event.timestamp for event in ended.events)) <= told


def test_what_never_ends_never_begins(noted: Noted, late: LateTracer) -> None:
    """As with what is replayed, within what is replayed."""
    with trace.use_span(late.start_span("around"), end_on_exit=False):
        late.start_span("one").set_attribute("a", 1)
    assert noted.began == []


def test_a_span_under_it_has_it_begin(noted: Noted, tracer: trace.Tracer, late: LateTracer) -> None:
    """And what is above that, from the outside in, each once."""
    outer = late.start_span("outer")
    with trace.use_span(outer):
        inner = late.start_span("inner")
    with trace.use_span(inner):
        for name in ("one", "two"):
            tracer.start_span(name).end()
    assert [span.name for span in noted.began] == ["outer", "inner", "one", "two"]
    for above, span in ((0, 1), (1, 2), (1, 3)):
        assert noted.began[span].parent == noted.began[above].get_span_context()


def test_what_is_done_behind_what_was_replayed_is_under_the_same_span(
    noted: Noted, tracer: trace.Tracer
) -> None:
    """Which begins with it, although nothing was done in there until then."""
    left = ["a record"]
    late = LateTracer(tracer, lambda: bool(left))
    with trace.use_span(late.start_span("around")):
        left.clear()
        tell_unit(executed=False)
        late.start_span("done").end()
    around, done = noted.began
    assert done.parent == around.get_span_context()


def test_of_what_is_only_replayed_nobody_is_told(
    noted: Noted, tracer: trace.Tracer, late: LateTracer
) -> None:
    """What is made in there belongs to the span above. As soon as something is done, it belongs where it is made."""
    step = tracer.start_span("step")
    with trace.use_span(step), trace.use_span(late.start_span("goes on"), end_on_exit=True):
        with trace.use_span(late.start_span("replayed")) as replayed:
            tell_unit(executed=False)
            assert replayed.get_span_context() == step.get_span_context()
            tracer.start_span("hook").end()
        tracer.start_span("another hook").end()
        with trace.use_span(late.start_span("done"), end_on_exit=True):
            tell_unit(executed=True)
            tracer.start_span("hook of what is done").end()
        tracer.start_span("last hook").end()
    names = {span.get_span_context().span_id: span.name for span in noted.began}
    told = {span.name: names.get(span.parent.span_id) for span in noted.ended if span.parent is not None}
    assert told == {
        "hook": "step",
        "another hook": "step",
        "goes on": "step",
        "done": "goes on",
        "hook of what is done": "done",
        "last hook": "goes on",
    }
    assert sorted(names.values()) == sorted([*told, "step"])


def test_a_span_begins_when_something_is_done_in_it(noted: Noted, late: LateTracer) -> None:
    """Although something was replayed in it before."""
    outer = late.start_span("outer")
    with trace.use_span(outer), trace.use_span(late.start_span("inner")):
        tell_unit(executed=False)
        assert noted.began == []
        tell_unit(executed=True)
    assert [span.name for span in noted.began] == ["outer", "inner"]


def test_it_begins_where_it_was_made(noted: Noted, tracer: trace.Tracer, late: LateTracer) -> None:
    """Not as the current span, which it mostly is by then: whoever hears of it would ask for what isn't there yet."""
    for maker in (tracer, late):
        with tracer.start_as_current_span("step") as step, trace.use_span(maker.start_span("one")):
            tell_unit(executed=True)
        assert noted.current[-1] == step.get_span_context()


def test_threads_under_it_have_it_begin_once(noted: Noted, tracer: trace.Tracer, late: LateTracer) -> None:
    """Tools are called at once."""
    span = late.start_span("around")
    tool = threading.Thread(target=lambda: tracer.start_span("tool", trace.set_span_in_context(span)).end())

    def heard(begun: SdkSpan, parent_context: Any = None) -> None:
        noted.began.append(begun)
        if not tool.ident:
            tool.start()
            tool.join(0.1)  # it can't end before this has: if it could, it would have by then

    noted.on_start = heard  # type: ignore[assignment]
    span.end()
    tool.join()
    assert [each.name for each in noted.began] == ["around", "tool"]


def test_it_is_of_the_class_of_what_it_has_become(late: LateTracer) -> None:
    """Logfire looks at that of the current span, and asks of its own what others haven't."""
    span = late.start_span("one")
    assert isinstance(span, trace.Span)
    assert not isinstance(span, SdkSpan)
    with pytest.raises(AttributeError):
        _ = span.start_time  # type: ignore[attr-defined]
    span.get_span_context()
    assert isinstance(span, SdkSpan)
    assert span.start_time is not None


def test_nothing_is_late_where_nothing_is_left_to_replay(noted: Noted, tracer: trace.Tracer) -> None:
    """The spans are those of the tracer."""
    span = LateTracer(tracer, lambda: False).start_span("one")
    assert noted.began == [span]
