"""Sends the traces and metrics of this process to an OpenTelemetry collector. Needs the extra `otel`.

Where to, how often and how much is told by the standard `OTEL_*` variables of the environment. A provider that is there
already (Logfire's, or one that a handler module has set) stays, and all goes there. `spans` makes the spans of runs,
`exporters` are what they go through.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

from paigeant.observers.otlp.exporters import RedactedSpans, SpanQueue, WholeTraces
from paigeant.observers.otlp.spans import OwnIds, QuickProvider
from paigeant.observers.otlp.written import Sender
from paigeant.redaction import Redactor

__all__ = [
    "QuickProvider",
    "RedactedSpans",
    "SpanQueue",
    "WholeTraces",
    "send_metrics",
    "send_traces",
    "to_collector",
]


def send_traces(
    resource: Resource | None = None, *, patience: float | None = None, redactor: Redactor | None = None
) -> tuple[trace.TracerProvider, Callable[[], None]]:
    """Set the global tracer provider up, unless there is one.

    Gives the provider for the spans of runs, and what sends the last spans and ends it. A collector that is away holds
    the end up for `patience` seconds, if the environment doesn't say otherwise. `redactor` hides what is secret.
    """
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return trace.get_tracer_provider(), lambda: None
    if _is_off("OTEL_TRACES_EXPORTER"):
        return trace.NoOpTracerProvider(), lambda: None
    resource = resource or resource_of_process()
    provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=OwnIds())
    is_told = any(f"OTEL_EXPORTER_OTLP_{which}TIMEOUT" in os.environ for which in ("", "TRACES_"))
    processor = to_collector(provider.resource, None if is_told else patience, redactor)
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    return QuickProvider(provider, processor), provider.shutdown


def to_collector(
    resource: Resource, timeout: float | None = None, redactor: Redactor | None = None
) -> SpanQueue:
    """Where spans of a process of this resource go to be sent to the collector that the environment names.

    `timeout` is in seconds, for each batch; None is what the environment says.
    """
    sender = Sender(resource, timeout=timeout)
    redacted = RedactedSpans(sender, redactor)
    return SpanQueue(WholeTraces(redacted), redacted.write if sender.takes_written else None)


def send_metrics(resource: Resource | None = None) -> Callable[[], None]:
    """Set the global meter provider up, unless there is one; gives what sends the last metrics and ends it."""
    if not type(metrics.get_meter_provider()).__name__.startswith("_Proxy") or _is_off(
        "OTEL_METRICS_EXPORTER"
    ):
        return lambda: None
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    provider = MeterProvider([reader], resource or resource_of_process(), shutdown_on_exit=False)
    metrics.set_meter_provider(provider)
    return provider.shutdown


def _is_off(exporter: str) -> bool:
    """Whether the environment says that nothing is to be sent: nothing at all, or by this kind of exporter."""
    # The library's own provider looks at the first, and isn't asked for spans of ours; at the second nobody looks here.
    said = {name: os.environ.get(name, "").strip().lower() for name in ("OTEL_SDK_DISABLED", exporter)}
    return said["OTEL_SDK_DISABLED"] == "true" or said[exporter] == "none"


def resource_of_process() -> Resource:
    """What the environment says this process is; a service `paigeant` where it says nothing."""
    found = Resource.create()
    if "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        return found
    return found.merge(Resource({"service.name": "paigeant"}))
