"""Sends the traces and metrics of this process to an OpenTelemetry collector. Needs the extra `otel`.

Where to, how often and how much is told by the standard `OTEL_*` variables of the environment. A provider that is there
already (Logfire's, or one that a handler module has set) stays, and all goes there.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AnyValue, Attributes

__all__ = ["QuickProvider", "WholeTraces", "send_metrics", "send_traces"]

_MOST_HELD = 10_000


def send_traces(
    resource: Resource | None = None, *, patience: float | None = None
) -> tuple[trace.TracerProvider, Callable[[], None]]:
    """Set the global tracer provider up, unless there is one.

    Gives the provider for the spans of runs, and what sends the last spans and ends it. A collector that is away holds
    the end up for `patience` seconds, if the environment doesn't say otherwise.
    """
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return trace.get_tracer_provider(), lambda: None
    provider = TracerProvider(resource=resource or resource_of_process(), shutdown_on_exit=False)
    is_told = any(f"OTEL_EXPORTER_OTLP_{which}TIMEOUT" in os.environ for which in ("", "TRACES_"))
    exporter = OTLPSpanExporter(timeout=None if is_told else patience)
    processor = BatchSpanProcessor(WholeTraces(exporter))
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    return QuickProvider(provider, processor), provider.shutdown


def send_metrics(resource: Resource | None = None) -> Callable[[], None]:
    """Set the global meter provider up, unless there is one; gives what sends the last metrics and ends it."""
    if not type(metrics.get_meter_provider()).__name__.startswith("_Proxy"):
        return lambda: None
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    provider = MeterProvider([reader], resource or resource_of_process(), shutdown_on_exit=False)
    metrics.set_meter_provider(provider)
    return provider.shutdown


def resource_of_process() -> Resource:
    """What the environment says this process is; a service `paigeant` where it says nothing."""
    found = Resource.create()
    if "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        return found
    return found.merge(Resource({"service.name": "paigeant"}))


class WholeTraces(SpanExporter):
    """Hands spans on to another exporter, each behind the one it hangs under.

    Spans end from the inside out: what an agent has done goes out long before the span of its step. Were the process
    killed in between, they would hang in the air for good. So a span waits here for its parent of this process; the
    parent in another one, such as the dispatch, has ended before. At most 10,000 wait: beyond, the oldest go. This is
    the exporter's thread, not that of the work.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._held: dict[int, list[ReadableSpan]] = {}
        self._waiting = 0
        self._gone: dict[int, None] = {}

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hand on what is whole."""
        ready: list[ReadableSpan] = []
        gone = self._gone
        for span in spans:
            above = span.parent
            if above is None or above.is_remote or above.span_id in gone:
                self._release(span, ready)
            else:
                self._held.setdefault(above.span_id, []).append(span)
                self._waiting += 1
        while self._waiting > _MOST_HELD:
            oldest = self._held.pop(next(iter(self._held)))
            self._waiting -= len(oldest)
            for span in oldest:
                self._release(span, ready)
        if len(gone) > 2 * _MOST_HELD:
            for known in list(islice(gone, len(gone) - _MOST_HELD)):
                del gone[known]
        return self._exporter.export(ready) if ready else SpanExportResult.SUCCESS

    def _release(self, span: ReadableSpan, ready: list[ReadableSpan]) -> None:
        ready.append(span)
        own = span.context
        if own is None:
            return
        self._gone[own.span_id] = None
        below = self._held.pop(own.span_id, ())
        self._waiting -= len(below)
        for each in below:
            self._release(each, ready)

    def shutdown(self) -> None:
        """Hand on what is left: the process ends in good order, and nothing else will come."""
        left = [span for spans in self._held.values() for span in spans]
        self._held.clear()
        self._waiting = 0
        if left:
            self._exporter.export(left)
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Hand on what the exporter itself keeps; what waits for its parent goes on waiting."""
        return self._exporter.force_flush(timeout_millis)


class QuickProvider(trace.TracerProvider):
    """Spans for the same end as those of `provider`, at half of what the library's own cost.

    They are for what we make ourselves, many times a second and with attributes that are known to be right: nothing is
    limited, cleaned or measured on the way to `processor`, which is told only when a span has ended. Samplers, ids and
    the resource are those of `provider`. Whoever finds such a span as the current one can do with it what any span can.
    """

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        self.provider = provider
        self.processor = processor

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> trace.Tracer:
        """A tracer of that name."""
        scope = InstrumentationScope(instrumenting_module_name, instrumenting_library_version, schema_url)
        return _QuickTracer(self.provider, self.processor, scope)


class _QuickTracer(trace.Tracer):
    def __init__(
        self, provider: TracerProvider, processor: SpanProcessor, scope: InstrumentationScope
    ) -> None:
        self._sampler = provider.sampler
        self._ids = provider.id_generator
        self._random = TraceFlags.RANDOM_TRACE_ID if self._ids.is_trace_id_random() else 0
        self.resource = provider.resource
        self.processor = processor
        self.scope = scope

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> trace.Span:
        """A span that has begun; an empty one where its trace isn't sampled."""
        above: SpanContext | None = trace.get_current_span(context).get_span_context()
        if above is not None and above.is_valid:
            trace_id, random = above.trace_id, above.trace_flags & TraceFlags.RANDOM_TRACE_ID
        else:
            above, trace_id, random = None, self._ids.generate_trace_id(), self._random
        decided = self._sampler.should_sample(context, trace_id, name, kind, None, links)
        sampled = TraceFlags.SAMPLED if decided.decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT
        own = SpanContext(
            trace_id, self._ids.generate_span_id(), False, TraceFlags(sampled | random), decided.trace_state
        )
        if decided.decision is Decision.DROP:
            return trace.NonRecordingSpan(own)
        return _QuickSpan(self, name, own, above, kind, dict(attributes or {}), start_time or time.time_ns())

    @contextmanager
    def _as_current(self, *args: Any, end_on_exit: bool = True, **more: Any) -> Iterator[trace.Span]:
        with trace.use_span(self.start_span(*args, **more), end_on_exit=end_on_exit) as span:
            yield span

    start_as_current_span: Any = _as_current


class _QuickSpan(trace.Span, ReadableSpan):
    def __init__(
        self,
        tracer: _QuickTracer,
        name: str,
        own: SpanContext,
        above: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, Any],
        start_time: int,
    ) -> None:
        self._tracer = tracer
        self._known = attributes
        self._told: list[Event] = []
        ReadableSpan.__init__(
            self,
            name,
            own,
            above,
            tracer.resource,
            attributes,
            self._told,
            kind=kind,
            start_time=start_time,
            instrumentation_scope=tracer.scope,
        )

    def get_span_context(self) -> SpanContext:
        """What others are told of it."""
        assert self._context is not None
        return self._context

    def is_recording(self) -> bool:
        """Whether it hasn't ended."""
        return self._end_time is None

    def set_attributes(self, attributes: Mapping[str, AnyValue]) -> None:
        """Set these attributes."""
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def set_attribute(self, key: str, value: AnyValue) -> None:
        """Set an attribute; what no exporter could write becomes a text."""
        if self.is_recording():
            plain = isinstance(value, (bool, str, bytes, int, float))
            if not plain and isinstance(value, Sequence):
                value = tuple(
                    each if isinstance(each, (bool, str, int, float)) else str(each) for each in value
                )
            self._known[key] = value if plain or isinstance(value, tuple) else str(value)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Add a moment within it."""
        if self.is_recording():
            self._told.append(Event(name, attributes, timestamp))

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        """Add a link to another span."""
        if self.is_recording():
            self._links = [*self._links, Link(context, attributes)]

    def update_name(self, name: str) -> None:
        """Give it another name."""
        if self.is_recording():
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Say how it went; once it is said to have gone well, that stands."""
        if self.is_recording() and self._status.status_code is not StatusCode.OK:
            self._status = status if isinstance(status, Status) else Status(status, description)

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add the moment at which `exception` was raised."""
        told = {
            "exception.type": type(exception).__qualname__,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**told, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """End it and hand it on, once."""
        if self.is_recording():
            self._end_time = time.time_ns() if end_time is None else end_time
            self._tracer.processor.on_end(self)
