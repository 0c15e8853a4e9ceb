"""An OpenTelemetry collector's other end: takes traces and metrics over OTLP/HTTP, decodes and keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.services.http import HttpServer, Incoming

__all__ = ["Collector", "Received", "under"]


@dataclass(frozen=True)
class Received:
    """A span as it came, with ids as hexadecimal texts; `parent` is empty for a root."""

    trace_id: str
    span_id: str
    parent: str
    name: str
    kind: int
    is_error: bool
    attributes: Mapping[str, Any]
    service: str
    scope: str
    began: int
    ended: int


class Collector(HttpServer):
    """A server for OTLP over HTTP on a port of its own, for as long as the block lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Received] = []
        self.metrics: dict[str, list[tuple[dict[str, Any], float]]] = {}
        self.bytes = b""
        self.url = self.origin

    def serve(self, request: Incoming) -> None:
        self.take(request.path, request.body())
        request.reply(200, kind="application/x-protobuf")

    def take(self, path: str, body: bytes) -> None:
        """Keep what a request brings."""
        self.bytes += body
        if path == "/v1/traces":
            self.spans += _spans(ExportTraceServiceRequest.FromString(body))
        else:
            assert path == "/v1/metrics"
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        data = getattr(metric, metric.WhichOneof("data"))
                        self.metrics[metric.name] = [
                            (_attributes(point.attributes), _value(point)) for point in data.data_points
                        ]


def under(spans: Iterable[Received], above: Received) -> list[Received]:
    """The spans right under another one, in the order in which they began."""
    return sorted((span for span in spans if span.parent == above.span_id), key=lambda span: span.began)


def _spans(request: ExportTraceServiceRequest) -> Iterable[Received]:
    for resource in request.resource_spans:
        service = str(_attributes(resource.resource.attributes)["service.name"])
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.name,
                    span.kind,
                    span.status.code == 2,
                    _attributes(span.attributes),
                    service,
                    scope.scope.name,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                )


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


def _value(point: Any) -> float:
    if hasattr(point, "count"):  # of a histogram, of whichever kind
        return float(point.count)
    return float(getattr(point, point.WhichOneof("value")))
