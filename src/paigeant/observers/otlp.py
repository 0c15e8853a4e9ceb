"""Sends the traces and metrics of this process to an OpenTelemetry collector. Needs the extra `otel`.

Where to, how often and how much is told by the standard `OTEL_*` variables of the environment. A provider that is there
already (Logfire's, or one that a handler module has set) stays, and all goes there.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

__all__ = ["WholeTraces", "send_metrics", "send_traces"]

_MOST_HELD = 10_000


def send_traces(resource: Resource | None = None, *, patience: float | None = None) -> Callable[[], None]:
    """Set the global tracer provider up, unless there is one; gives what sends the last spans and ends it.

    A collector that is away holds the end up for `patience` seconds, if the environment doesn't say otherwise.
    """
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return lambda: None
    provider = TracerProvider(resource=resource or resource_of_process(), shutdown_on_exit=False)
    is_told = any(f"OTEL_EXPORTER_OTLP_{which}TIMEOUT" in os.environ for which in ("", "TRACES_"))
    exporter = OTLPSpanExporter(timeout=None if is_told else patience)
    provider.add_span_processor(BatchSpanProcessor(WholeTraces(exporter)))
    trace.set_tracer_provider(provider)
    return provider.shutdown


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
        self._held: OrderedDict[int, list[ReadableSpan]] = OrderedDict()
        self._waiting = 0
        self._gone: OrderedDict[int, None] = OrderedDict()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hand on what is whole."""
        ready: list[ReadableSpan] = []
        for span in spans:
            above = span.parent
            if above is None or above.is_remote or above.span_id in self._gone:
                self._release(span, ready)
            else:
                self._held.setdefault(above.span_id, []).append(span)
                self._waiting += 1
        while self._waiting > _MOST_HELD:
            _, oldest = self._held.popitem(last=False)
            self._waiting -= len(oldest)
            for span in oldest:
                self._release(span, ready)
        return self._exporter.export(ready) if ready else SpanExportResult.SUCCESS

    def _release(self, span: ReadableSpan, ready: list[ReadableSpan]) -> None:
        stack = [span]
        while stack:
            found = stack.pop()
            ready.append(found)
            own = found.get_span_context()
            if own is None:
                continue
            self._gone[own.span_id] = None
            below = self._held.pop(own.span_id, [])
            self._waiting -= len(below)
            stack += reversed(below)
        while len(self._gone) > _MOST_HELD:
            self._gone.popitem(last=False)

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
