"""Sends the traces and metrics of this process to an OpenTelemetry collector. Needs the extra `otel`.

Where to, how often and how much is told by the standard `OTEL_*` variables of the environment. A provider that is there
already (Logfire's, or one that a handler module has set) stays, and all goes there.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context, attach, detach, set_value
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AnyValue, Attributes

from paigeant.redaction import Redactor, is_secret

__all__ = ["QuickProvider", "RedactedSpans", "SpanQueue", "WholeTraces", "send_metrics", "send_traces"]

log = logging.getLogger("paigeant.traces")

_MOST_HELD = 10_000


def send_traces(
    resource: Resource | None = None, *, patience: float | None = None, redactor: Redactor | None = None
) -> tuple[trace.TracerProvider, Callable[[], None]]:
    """Set the global tracer provider up, unless there is one.

    Gives the provider for the spans of runs, and what sends the last spans and ends it. A collector that is away holds
    the end up for `patience` seconds, if the environment doesn't say otherwise. `redactor` hides what is secret.
    """
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return trace.get_tracer_provider(), lambda: None
    provider = TracerProvider(resource=resource or resource_of_process(), shutdown_on_exit=False)
    is_told = any(f"OTEL_EXPORTER_OTLP_{which}TIMEOUT" in os.environ for which in ("", "TRACES_"))
    exporter = OTLPSpanExporter(timeout=None if is_told else patience)
    processor = SpanQueue(WholeTraces(RedactedSpans(exporter, redactor)))
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
        own = _id_of(span)
        self._gone[own] = None
        if own in self._held:
            below = self._held.pop(own)
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


def _id_of(span: ReadableSpan) -> int:
    if isinstance(span, _QuickSpan):
        return span.id
    return span.context.span_id if span.context is not None else 0


class RedactedSpans(SpanExporter):
    """Hands spans on to another exporter, with stars for what is secret in what they say.

    A span that an activity makes itself has the texts of its exceptions, and what its libraries say. Spans in which
    nothing looks like a secret are handed on as they are. This, too, is the exporter's thread.
    """

    def __init__(self, exporter: SpanExporter, redactor: Redactor | None = None) -> None:
        self._exporter = exporter
        self._redactor = redactor or Redactor()
        self._hides_in_name = lru_cache(maxsize=1024)(self._redactor.may_hide)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hand them on."""
        return self._exporter.export([self._shown(span) for span in spans])

    def shutdown(self) -> None:
        """Nothing is kept here."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Hand on what the exporter itself keeps."""
        return self._exporter.force_flush(timeout_millis)

    def _shown(self, span: ReadableSpan) -> ReadableSpan:
        text = self._redactor.text
        if not self._may_hide(span):
            return span
        status = span.status
        return ReadableSpan(
            text(span.name),
            span.context,
            span.parent,
            span.resource,
            self._attributes(span.attributes),
            [
                Event(text(event.name), self._attributes(event.attributes), event.timestamp)
                for event in span.events
            ],
            [Link(link.context, self._attributes(link.attributes)) for link in span.links],
            span.kind,
            status=Status(status.status_code, text(status.description)) if status.description else status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )

    def _may_hide(self, span: ReadableSpan) -> bool:
        if _IDS.issuperset(span.attributes or ()) and not (
            span.events or span.links or span.status.description
        ):
            return self._hides_in_name(span.name)  # one of ours, as most are
        said = [span.name]
        if span.status.description:
            said.append(span.status.description)
        told = [span.attributes]
        for event in span.events:
            said.append(event.name)
            told.append(event.attributes)
        told += [link.attributes for link in span.links]
        for attributes in told:
            for name, value in (attributes or {}).items():
                if name in _IDS:
                    continue
                if _is_secret(name):
                    return True
                if not isinstance(value, (int, float)):
                    said.append(str(value))
        return self._redactor.may_hide("\n".join(said))

    def _attributes(self, attributes: Attributes) -> dict[str, AnyValue]:
        return {name: self._value(name, value) for name, value in (attributes or {}).items()}

    def _value(self, name: str, value: AnyValue) -> AnyValue:
        shown: AnyValue = self._redactor.value(name, value)
        return (
            value if shown == repr(value) else shown
        )  # what is no text, and hides nothing, stays what it is


_IDS = frozenset(
    f"{group}.{name}"
    for group, names in {
        "paigeant": "workflow_id step attempt worker run.status",
        "messaging": "system destination.name message.id message.conversation_id operation.name operation.type",
        "gen_ai": "operation.name workflow.name",
    }.items()
    for name in names.split()
)
"""What `traces.py` says of runs, which is most of what is said. As in log lines, ids and names hold no secrets."""

_is_secret = lru_cache(maxsize=1024)(is_secret)
"""As `is_secret`, of the names of attributes, of which there are few."""


class SpanQueue(SpanProcessor):
    """Ended spans on their way to `exporter`, in batches, by a thread of its own.

    What the library's BatchSpanProcessor is, under the same `OTEL_BSP_*` variables, for a sixth of what that costs the
    one who ends a span. While the exporter can't keep up, spans beyond the bound are lost, and a warning says how many.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._most = _setting("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
        self._batch = min(_setting("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), self._most)
        self._delay = _setting("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000
        self._spans: deque[ReadableSpan] = deque()
        self.lost = 0
        """Spans that were lost and not yet told of."""
        self._begin()
        again = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := again()) is not None and begin())

    def _begin(self) -> None:
        """Start anew, in this process: one that was forked off has no thread, and its parent's spans aren't its own."""
        self._spans.clear()
        self._exporting = threading.Lock()
        self._enough = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="paigeant-spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span; never waits."""
        if not isinstance(span, _QuickSpan) and not (span.context and span.context.trace_flags.sampled):
            return
        spans = self._spans
        waiting = len(spans)
        if waiting >= self._most or self._closed:
            self.lost += 1
            return
        spans.append(span)
        if waiting + 1 >= self._batch and not self._enough.is_set():
            self._enough.set()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Export all that has ended; whether the exporter has handed on what it keeps."""
        self._export(least=1)
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self) -> None:
        """Export all that has ended, and take no more."""
        if not self._closed:
            self._closed = True
            self._enough.set()
            self._thread.join(_LAST_SECONDS)
            self._exporter.shutdown()

    def _run(self) -> None:
        while not self._closed:
            is_enough = self._enough.wait(self._delay)
            self._enough.clear()
            self._export(least=self._batch if is_enough and not self._closed else 1)
        self._export(least=1)

    def _export(self, *, least: int) -> None:
        """Export for as long as so many are there."""
        with self._exporting:
            while len(self._spans) >= least:
                batch = [self._spans.popleft() for _ in range(min(len(self._spans), self._batch))]
                token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))  # no spans of the sending
                try:
                    self._exporter.export(batch)
                except Exception:  # whatever it is, the spans to come are worth another try
                    self.lost += len(batch)
                    log.exception("spans can't be exported")
                finally:
                    detach(token)
            if self.lost:
                lost, self.lost = self.lost, 0
                log.warning("%d spans were lost; expected an exporter that keeps up", lost)


_LAST_SECONDS = 30.0


def _setting(name: str, default: int) -> int:
    """A whole number above 0 from the environment."""
    text = os.environ.get(name, "").strip()
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    if text:
        log.warning("%s is %r; expected a whole number above 0, so %d holds", name, text, default)
    return default


class QuickProvider(trace.TracerProvider):
    """Spans for the same end as those of `provider`, at a fraction of what the library's own cost.

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
        self._follows = _follows_parents(provider.sampler)
        self._keeps_new = self._follows and provider.sampler.get_description().startswith(_KEEPS_NEW)
        self._ids = provider.id_generator
        self._new_id: Callable[[], int] = (
            partial(random.getrandbits, 64)
            if type(self._ids) is RandomIdGenerator
            else self._ids.generate_span_id
        )
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
        # A context of `traces.py` has it at hand.
        above: SpanContext | None = getattr(context, "above", None)
        if above is None:
            above = trace.get_current_span(context).get_span_context()
        if above is not None and above.is_valid:
            if self._follows:  # sampled, or not, as what is above; of what isn't, nothing is made
                if not above.trace_flags & TraceFlags.SAMPLED:
                    return trace.NonRecordingSpan(above)
                return _QuickSpan(self, name, self._new_id(), above, kind, attributes, start_time)
            trace_id, random = above.trace_id, above.trace_flags & TraceFlags.RANDOM_TRACE_ID
        else:
            above, trace_id, random = None, self._ids.generate_trace_id(), self._random
            if self._keeps_new:
                own = SpanContext(trace_id, self._new_id(), False, _SAMPLED_RANDOM if random else _SAMPLED)
                return _QuickSpan(self, name, own.span_id, None, kind, attributes, start_time, own)
        decided = self._sampler.should_sample(context, trace_id, name, kind, None, links)
        is_sampled = decided.decision is Decision.RECORD_AND_SAMPLE
        sampled = TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT
        own = SpanContext(
            trace_id, self._ids.generate_span_id(), False, TraceFlags(sampled | random), decided.trace_state
        )
        if not is_sampled:  # what is only to be recorded isn't for the end to which these go
            return trace.NonRecordingSpan(own)
        return _QuickSpan(self, name, own.span_id, above, kind, attributes, start_time, own)

    @contextmanager
    def _as_current(self, *args: Any, end_on_exit: bool = True, **more: Any) -> Iterator[trace.Span]:
        with trace.use_span(self.start_span(*args, **more), end_on_exit=end_on_exit) as span:
            yield span

    start_as_current_span: Any = _as_current


_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SAMPLED_RANDOM = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)
_KEEPS_NEW = "ParentBased{root:AlwaysOnSampler,"


def _follows_parents(sampler: Sampler) -> bool:
    """Whether a span with a parent is sampled exactly if that is. Asking each time costs as much as all else of it."""
    return type(sampler) is ParentBased and _of_parents(sampler) == _of_parents(ParentBased(ALWAYS_OFF))


def _of_parents(sampler: Sampler) -> str:
    """What a sampler says of itself, without what it does where there is no parent."""
    said: str = sampler.get_description()
    return said[said.index("remoteParentSampled") :]


class _QuickSpan(trace.Span, ReadableSpan):
    # What most spans have in common is here and not in each of them. All of this is what ReadableSpan() would set.
    _instrumentation_info = None
    _end_time: int | None = None
    _status = Status(StatusCode.UNSET)
    _events: Sequence[Event] = ()
    _links: Sequence[Link] = ()

    def __init__(
        self,
        tracer: _QuickTracer,
        name: str,
        id: int,
        above: SpanContext | None,
        kind: SpanKind,
        attributes: Attributes,
        start_time: int | None,
        context: SpanContext | None = None,
    ) -> None:
        self.id = id
        self._name = name
        self._parent = above
        self._kind = kind
        self._attributes = self._known = dict(attributes) if attributes else {}
        self._start_time = time.time_ns() if start_time is None else start_time
        self._resource = tracer.resource
        self._instrumentation_scope = tracer.scope
        self._processor = tracer.processor
        self._own = context

    @property
    def _context(self) -> SpanContext:  # type: ignore[override]  # nobody sets it: each asks for it
        """What others are told of it; that of the one above but for the id, and made when it is asked for."""
        if self._own is None:
            assert self._parent is not None
            trace_id, _, _, flags, state, _ = self._parent
            kept = _SAMPLED_RANDOM if flags & TraceFlags.RANDOM_TRACE_ID else _SAMPLED
            self._own = SpanContext(trace_id, self.id, False, kept, state)
        return self._own

    def get_span_context(self) -> SpanContext:
        """What others are told of it."""
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
            self._events = [*self._events, Event(name, attributes, timestamp)]

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
        if self._end_time is None:
            self._end_time = time.time_ns() if end_time is None else end_time
            self._processor.on_end(self)
